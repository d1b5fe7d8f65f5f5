"""what a user passes to a run of latent and molecular dynamics -> numbers that fit together, or a clear refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.trajectories import select_atoms
from openmm_mlff.sampling.back_mapping import RelaxationSettings
from openmm_mlff.sampling.propagators import Propagator
from openmm_mlff.sampling.settings import require_positive
from openmm_mlff.sampling.systems import select


def bare(value: Any, in_unit: Any) -> Any:
    """A Quantity's value in a unit; other things as they are."""
    return value.value_in_unit(in_unit) if unit.is_quantity(value) else value


def number(name: str, value: Any, in_unit: Any) -> Any:
    """`bare`; raises `ValueError` naming the argument for a Quantity of another dimension."""
    try:
        return bare(value, in_unit)
    except TypeError as error:
        raise ValueError(f"{name}: expected a number or a quantity in {in_unit}, got {value}") from error


def positive(name: str, value: Any, in_unit: Any) -> float:
    """A positive number in OpenMM's unit, from a number or a Quantity; raises `ValueError` naming the argument."""
    found = number(name, value, in_unit)
    require_positive(name, found)
    return float(found)


def start_positions(positions: Any, n_walkers: int, n_particles: int) -> np.ndarray:
    """Positions of all walkers ``(n_walkers, n_particles, 3)`` nm, from theirs or from those of one; a copy.

    Raises `ValueError` for another shape or numbers that are not finite.
    """
    values = np.asarray(number("positions", positions, unit.nanometer), dtype=np.float64)
    every = (n_walkers, n_particles, 3)
    if values.shape not in (every[1:], every):
        raise ValueError(f"positions: expected shape {every[1:]} or {every}, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    return np.array(np.broadcast_to(values, every))


def relaxation_settings(equilibration: float | unit.Quantity) -> RelaxationSettings:
    """The default ones with so many ps of dynamics, a quarter of it restrained."""
    length = number("equilibration", equilibration, unit.picosecond)
    if not 0 <= length < float("inf"):
        raise ValueError(f"equilibration: expected a time >= 0 (ps), got {equilibration!r}")
    return RelaxationSettings(restrained=0.25 * length, free=0.75 * length)


def find_solute(topology: app.Topology, solute: Sequence[int] | str | None) -> np.ndarray:
    """Ascending indices of a list, of an mdtraj selection, or of all but water and ions."""
    if solute is None:
        return np.array(select(topology, "auto"), dtype=np.int64)
    import mdtraj

    try:
        return np.sort(select_atoms(mdtraj.Topology.from_openmm(topology), solute))
    except ValueError as error:
        raise ValueError(str(error).replace("atoms:", "solute:", 1)) from error


def check_temperature(model: Propagator, temperature: float, allow: bool) -> None:
    """Refuse another temperature than the model's unless it is allowed."""
    trained = model.temperature
    if trained is not None and abs(trained - temperature) > 1e-3 and not allow:
        raise ValueError(
            f"temperature: expected {trained:g} K, at which the model was trained, got {temperature:g} K (pass "
            "allow_other_temperature=True if that is meant)"
        )


def check_model(model: Propagator, topology: app.Topology) -> None:
    """Refuse a model of another molecule than the solute."""
    if model.n_atoms != topology.getNumAtoms():
        raise ValueError(
            f"model: it was trained on {model.n_atoms} atoms, but the solute has {topology.getNumAtoms()} (pass solute "
            "to say which atoms it is)"
        )
    model.check_topology(topology)


def make_integrator(
    given: openmm.Integrator | None, temperature: float, friction: Any, timestep: Any
) -> openmm.Integrator:
    """The integrator passed, or the Langevin one; refuses one whose thermostat has another temperature."""
    if given is None:
        rate = positive("friction", friction, unit.picosecond**-1)
        step = positive("timestep", timestep, unit.picosecond)
        return openmm.LangevinMiddleIntegrator(temperature, rate, step)
    own = given.getTemperature()._value if hasattr(given, "getTemperature") else temperature
    if abs(own - temperature) > 1e-3:
        raise ValueError(f"integrator: expected a thermostat at the temperature of {temperature:g} K, got {own:g} K")
    return given
