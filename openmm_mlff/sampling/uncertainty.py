"""Uncertainty of a running simulation -> a table, by a reporter for OpenMM's own loops or with a run in a folder.

Both read what the forces of an ensemble kept from their last evaluation; nothing is evaluated for it. And a limit of
the uncertainty for one system, by a short run of it (`limit_of_run`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.forces import running
from openmm_mlff.forces.python_force import ForceComputation
from openmm_mlff.forces.serialization import without_guards
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.sampling.platforms import PlatformChoice, choose_platform
from openmm_mlff.sampling.reporters import Table
from openmm_mlff.sampling.settings import require_positive, require_whole

logger = logging.getLogger(__name__)

HEADER = "step,time_ps,energy_uncertainty_eV,largest_force_uncertainty_eV_A,atom"

#: length of a trial run, ps, and how much of it comes first and does not count
TRIAL_PS, FIRST_PART = 1.0, 0.2
#: 1/ps; energy of motion is shared with the other half of the energy, and with the bath, within the first part
TRIAL_FRICTION = 10.0
#: iterations of the minimiser before it, at most
TRIAL_MINIMIZATION = 100
#: steps of a trial run, at least
TRIAL_STEPS = 10
#: what would change box or velocities beside the trial run's own thermostat
_BATHS = (
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.AndersenThermostat,
)


class UncertaintyTable(Table):
    """One row per frame: step, time, uncertainty of the energy (eV), of the worst force (eV/angstrom), and its atom.

    Args:
        path: of the CSV file.
        keep: rows up to this step stay; None starts a new file.

    Raises `ValueError` if the file to go on from has other columns.
    """

    def __init__(self, path: str | Path, keep: int | None = None) -> None:
        super().__init__(path, HEADER, keep)

    def write(self, step: int, time_ps: float, system: openmm.System) -> None:
        """Append the row of the last evaluation of a system's forces; atom indices are those of the system.

        An ensemble that has fallen back to another model has no uncertainty: ``nan`` and atom -1.
        """
        found = running.most_uncertain(system)
        values = "nan,nan,-1" if found is None else f"{found[0]:.6g},{found[1]:.6g},{found[2]}"
        self._append(f"{step},{time_ps:.6f},{values}")


class UncertaintyReporter:
    """Reporter for `openmm.app.Simulation`: writes an `UncertaintyTable` while it runs.

    It asks for the energy, as OpenMM's StateDataReporter does, so that the row belongs to the frame that is reported.

    Args:
        file: path of the CSV file. reportInterval: steps. append: go on with the rows that the file has.

    Raises `ValueError` for an interval that is not a positive whole number; and at the first report, if no force of the
    simulation is an ensemble.
    """

    def __init__(self, file: str | Path, reportInterval: int, append: bool = False) -> None:
        if isinstance(reportInterval, bool) or not isinstance(reportInterval, int) or reportInterval < 1:
            raise ValueError(f"reportInterval: expected a whole number of steps >= 1, got {reportInterval!r}")
        self._interval = reportInterval
        self._table = UncertaintyTable(file, keep=2**62 if append else None)
        self._checked = False

    def describeNextReport(self, simulation: app.Simulation) -> dict[str, Any]:
        """What OpenMM asks a reporter before it makes the steps up to the next report."""
        steps = self._interval - simulation.currentStep % self._interval
        return {"steps": steps, "periodic": None, "include": ["energy"]}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Append a row."""
        if not self._checked and running.most_uncertain(simulation.system) is None:
            raise ValueError("simulation: expected a force of an ensemble, whose members disagree, found none")
        self._checked = True
        self._table.write(simulation.currentStep, state.getTime()._value, simulation.system)

    def __del__(self) -> None:
        if hasattr(self, "_table"):
            self._table.close()


# -- a limit from the run's own system -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialRun:
    """A limit of the uncertainty from a short run of a system, and what it came from; plain JSON values.

    Attributes:
        limit: `margin` times `largest`, or `of_file` where that is less, eV/angstrom.
        largest: uncertainty of the force on any atom in the run after its first part, eV/angstrom.
        atom: the one that it was found at; its index in the system.
        of_file: limit of the model file, eV/angstrom; None if it names none.
        margin, temperature (K), duration (ps), timestep (fs), seed: of the run.
    """

    limit: float
    largest: float
    atom: int
    of_file: float | None
    margin: float
    temperature: float
    duration: float
    timestep: float
    seed: int

    @property
    def bounded(self) -> bool:
        """Whether the limit of the model file is the smaller one."""
        return self.limit < self.margin * self.largest


def limit_of_run(
    system: openmm.System,
    positions: Any,
    *,
    temperature: float = 300.0,
    duration: float = TRIAL_PS,
    margin: float = 2.0,
    timestep: float = 0.5,
    seed: int = 1,
    platform: str | None = None,
    threads: int | None = None,
    box_vectors: Any = None,
) -> float:
    """A limit for ``createSystem(..., on_uncertain=..., uncertainty_limit=limit)`` from a short run of a system itself.

    The limit of a model file is for all that the model was validated on, radicals and stretched bonds included, and
    may be too wide for one molecule. This one is `margin` times the largest uncertainty of the force on any atom in a
    run of the system by the ensemble, after the first fifth of it, and at most the limit of the file. No labels are
    needed, and none are used: it says what is usual for the model here, so start where you trust it. Where the limit of
    the file decides, a warning says so.

    The run: minimised (at most 100 iterations), then Langevin dynamics at constant volume, 10/ps. It is made with a
    copy: the System stays as it is, and its own ``on_uncertain`` does not act.

    Args:
        system: from `createSystem` or `createMixedSystem`, with or without ``on_uncertain``.
        positions: of all its particles, ``(n_particles, 3)`` nm or a Quantity; whole molecules and a sound start.
        temperature: K. duration: ps. margin: at least 1. timestep: fs. seed: of velocities and thermostat.
        platform: OpenMM's name; None chooses by size. threads: of the CPU platform.
        box_vectors: three vectors, nm or a Quantity; None takes the System's default ones.

    Returns eV/angstrom.

    Raises `ValueError` naming the argument for a System without an ensemble, for bad numbers, and if the run breaks.
    """
    return trial_run(
        system, positions, temperature=temperature, duration=duration, margin=margin, timestep=timestep, seed=seed,
        platform=platform, threads=threads, box_vectors=box_vectors,
    ).limit  # fmt: skip


def trial_run(
    system: openmm.System,
    positions: Any,
    *,
    temperature: float = 300.0,
    duration: float = TRIAL_PS,
    margin: float = 2.0,
    timestep: float = 0.5,
    seed: int = 1,
    platform: str | None = None,
    threads: int | None = None,
    box_vectors: Any = None,
) -> TrialRun:
    """As `limit_of_run`, with what the limit came from."""
    for name, value in (("temperature", temperature), ("duration", duration), ("timestep", timestep)):
        require_positive(name, value)
    require_whole("seed", seed, 1)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 1 <= margin < float("inf"):
        raise ValueError(f"margin: expected a number >= 1, got {margin!r}")
    steps = round(1e3 * duration / timestep)
    if steps < TRIAL_STEPS:
        raise ValueError(f"duration: expected at least {TRIAL_STEPS} steps of {timestep:g} fs, got {duration!r} ps")
    free = _free_copy(system)
    of_file = _limit_of_file(free)
    choice = choose_platform(free.getNumParticles(), platform, threads)
    trial = _Trial(free, _coordinates(positions, free), choice, temperature, timestep, seed, box_vectors)
    largest, atom = trial.run(steps)
    limit = margin * largest if of_file is None else min(margin * largest, of_file)
    found = TrialRun(limit, largest, atom, of_file, float(margin), float(temperature), float(duration),
                     float(timestep), seed)  # fmt: skip
    _report(found)
    return found


def _report(found: TrialRun) -> None:
    """Say what the limit is; a warning if the file's decides, since the start may be out of the model's domain."""
    where = (
        f"the largest uncertainty of a force in a trial run of {found.duration:g} ps at {found.temperature:g} K "
        f"({found.largest:.3g} eV/angstrom, atom {found.atom})"
    )
    if found.bounded:
        logger.warning(
            "uncertainty_limit: %.3g eV/angstrom, that of the model file, which is less than %g times %s; the start "
            "may be outside of what the model was trained for", found.limit, found.margin, where,
        )  # fmt: skip
    else:
        unbounded = "; the model file names no limit that could bound it" if found.of_file is None else ""
        logger.info("uncertainty_limit: %.3g eV/angstrom, %g times %s%s", found.limit, found.margin, where, unbounded)


def _free_copy(system: openmm.System) -> openmm.System:
    """A System without guards, barostats and thermostats."""
    if not isinstance(system, openmm.System):
        raise TypeError(f"system: expected an openmm.System, got {type(system).__name__}")
    free = without_guards(system)
    for k in reversed(range(free.getNumForces())):
        if isinstance(free.getForce(k), _BATHS):
            free.removeForce(k)
    return free


def _limit_of_file(system: openmm.System) -> float | None:
    """The smallest limit that the files of a system's ensembles name; `ValueError` if there is no ensemble."""
    models = [c.model for c in running.computations(system)]
    ensembles = [model for model in models if isinstance(model, Ensemble)]
    if not ensembles:
        raise ValueError("system: expected a force of an ensemble, whose members disagree, found none")
    limits = [model.config.force_limit for model in ensembles]
    return min((limit for limit in limits if limit is not None), default=None)


def _coordinates(positions: Any, system: openmm.System) -> np.ndarray:
    """``(n_particles, 3)`` nm."""
    given = positions.value_in_unit(unit.nanometer) if unit.is_quantity(positions) else positions
    found, n = np.array(given, dtype=np.float64), system.getNumParticles()
    if found.shape != (n, 3) or not np.isfinite(found).all():
        wrong = f"shape {found.shape}" if found.shape != (n, 3) else "NaN or infinity"
        raise ValueError(f"positions: expected finite numbers of shape ({n}, 3), nm, got {wrong}")
    return found


class _Trial:
    """The run behind `limit_of_run`; arguments as there."""

    def __init__(self, system: openmm.System, positions: np.ndarray, choice: PlatformChoice, temperature: float,
                 timestep: float, seed: int, box_vectors: Any) -> None:  # fmt: skip
        self._system, self._temperature, self._seed = system, temperature, seed
        self._begin = time.monotonic()
        self._integrator = openmm.LangevinMiddleIntegrator(temperature, TRIAL_FRICTION, 1e-3 * timestep)
        self._integrator.setRandomNumberSeed(seed)
        self._context = openmm.Context(system, self._integrator, choice.platform, choice.properties)
        if box_vectors is not None:
            self._context.setPeriodicBoxVectors(*box_vectors)
        self._context.setPositions(positions)
        self._context.computeVirtualSites()

    def run(self, steps: int) -> tuple[float, int]:
        """The largest uncertainty of a force after the first part, eV/angstrom, and its atom in the system."""
        try:
            with running.without_force_limit(self._system):
                openmm.LocalEnergyMinimizer.minimize(self._context, 10.0, TRIAL_MINIMIZATION)
            self._context.setVelocitiesToTemperature(self._temperature, self._seed)
            first = round(FIRST_PART * steps)
            self._integrator.step(first)
            return max(self._step() for _ in range(first, steps))
        except openmm.OpenMMException as error:
            reason = running.last_error(self._system) or error
            if running.interrupted(error) or isinstance(reason, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            first_line = str(reason).partition("\n")[0]
            raise ValueError(
                f"positions: the trial run from them at {self._temperature:g} K broke at step "
                f"{self._context.getStepCount()} of {steps} ({first_line})"
            ) from error

    def _step(self) -> tuple[float, int]:
        self._integrator.step(1)
        found = []
        for computation in self._called:
            assert computation.uncertainty is not None
            worst = computation.uncertainty.worst
            found.append((float(computation.uncertainty.forces[worst]), computation.particle(worst)))
        return max(found)

    @cached_property
    def _called(self) -> list[ForceComputation]:
        """Those of this run; another Context may live with the same options."""
        called = [c for c in running.computations(self._system) if c.last_call >= self._begin]
        return [c for c in called if c.uncertainty is not None]
