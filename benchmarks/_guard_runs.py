"""Runs of one molecule by an ensemble, with and without a guard, and what GFN2-xTB says about their frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app
from openmmml import MLPotential

from openmm_mlff.data.reference import LabelError, ReferenceMethod
from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.forces import running
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM

#: eV; an energy that is off by more means nothing
WRONG = 0.5
#: angstrom per fs
PULLING = 0.002
#: kJ/mol/nm^2
SPRING = 3.0e5


@dataclass(frozen=True)
class Setting:
    """What the runs of a benchmark share.

    Attributes:
        model: file of the ensemble. limit: of the uncertainty of a force, eV/angstrom.
        timestep: fs. look: steps between two looks at a run. compile: see `MLPotential`.
        hydrogen: amu, of every hydrogen; None for its own mass.
    """

    model: Path
    limit: float
    timestep: float = 0.5
    look: int = 20
    compile: bool | str = "auto"
    hydrogen: float | None = None


class Run:
    """One run of a molecule from a frame: Langevin, 1/ps, with or without a guard.

    Args of the constructor: pulled: a bond whose length is prescribed, growing by `PULLING`. watched: the pair whose
    length is recorded if none is pulled.

    Attributes: record: columns by name, a row at each look (`peak`: the largest uncertainty since the one before).
    frames: positions at each look, angstrom. stopped: step and reason if the guard, or a force that is no number, ended
    it. last: positions then, angstrom.
    """

    def __init__(self, setting: Setting, start: Structure, temperature: float, seed: int, guarded: bool,
                 pulled: tuple[int, int] | None = None, watched: tuple[int, int] | None = None) -> None:  # fmt: skip
        options = {"on_uncertain": "stop", "uncertainty_limit": setting.limit} if guarded else {}
        self.system = system_of(setting, start, maxForce=None, **options)
        self.setting, self.start, self.pulled, self.watched = setting, start, pulled, pulled or watched
        if setting.hydrogen is not None:
            for k in np.flatnonzero(start.numbers == 1).tolist():
                self.system.setParticleMass(k, setting.hydrogen)
        if pulled is not None:
            bond = openmm.CustomBondForce(f"{0.5 * SPRING}*(r-length)^2")
            bond.addGlobalParameter("length", 0.0)
            bond.addBond(*pulled)
            bond.setForceGroup(1)
            self.system.addForce(bond)
        self.integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 1e-3 * setting.timestep)
        self.integrator.setRandomNumberSeed(seed)
        self.context = openmm.Context(self.system, self.integrator, openmm.Platform.getPlatform("Reference"))
        self.context.setPositions(start.positions * NM_PER_ANGSTROM)
        self.context.setVelocitiesToTemperature(temperature, seed)
        self.record: dict[str, list[float]] = {"ps": [], "uncertainty": [], "peak": [], "energy": []}
        self._peak = 0.0
        if self.watched is not None:
            self.record["length"] = []
        self.frames: list[np.ndarray] = []
        self.stopped: tuple[int, str] | None = None
        self.last: np.ndarray | None = None

    def go(self, ps: float) -> Run:
        setting = self.setting
        steps = round(1e3 * ps / setting.timestep)
        first = 0.0 if self.pulled is None else _length(self.start.positions, self.pulled)
        try:
            for step in range(0, steps + 1, setting.look):
                if self.pulled is not None:
                    length = first + PULLING * step * setting.timestep
                    self.context.setParameter("length", length * NM_PER_ANGSTROM)
                self.look(step)
                self._stretch()
        except openmm.OpenMMException as error:
            self._ended(error)
        return self

    def go_on(self, steps: int) -> Run:
        """Further steps, from wherever the context is, with a look after each stretch of them."""
        try:
            for step in range(self.setting.look, steps + 1, self.setting.look):
                self._stretch()
                self.look(step)
        except openmm.OpenMMException as error:
            self._ended(error)
        return self

    def energy_at(self, positions: np.ndarray) -> float:
        """The model's energy, eV; the run cannot go on after it."""
        self.context.setPositions(positions * NM_PER_ANGSTROM)
        return self.context.getState(energy=True, groups={0}).getPotentialEnergy()._value / KJ_PER_MOL_PER_EV

    def _ended(self, error: openmm.OpenMMException) -> None:
        if running.interrupted(error):
            raise KeyboardInterrupt from error
        reason = running.last_error(self.system)
        self.stopped = (self.context.getStepCount(), str(reason or error).splitlines()[0])
        self.last = self._positions(self.context.getState(positions=True))

    def _stretch(self) -> None:
        """The steps until the next look, one by one, to see the uncertainty of each."""
        self.integrator.step(1)
        # the last called one: that of this run, and not of one before that is still in memory
        force = running.computations(self.system)[0]
        for k in range(self.setting.look):
            if k:
                self.integrator.step(1)
            assert force.uncertainty is not None
            self._peak = max(self._peak, float(force.uncertainty.forces.max()))

    def look(self, step: int) -> None:
        # the spring that pulls is in another group
        state = self.context.getState(positions=True, energy=True, groups={0})
        positions = self._positions(state)
        found = running.uncertainty(self.system)
        assert found is not None
        self.record["ps"].append(1e-3 * step * self.setting.timestep)
        self.record["uncertainty"].append(float(found.forces.max()))
        self.record["peak"].append(max(self._peak, self.record["uncertainty"][-1]))
        self._peak = 0.0
        self.record["energy"].append(state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV)
        if self.watched is not None:
            self.record["length"].append(_length(positions, self.watched))
        self.frames.append(positions)

    @staticmethod
    def _positions(state: openmm.State) -> np.ndarray:
        return state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM


def system_of(setting: Setting, start: Structure, **options: Any) -> openmm.System:
    """A molecule by the ensemble."""
    return MLPotential("ensemble", modelPath=str(setting.model)).createSystem(
        topology(start),
        removeCMMotion=False,
        compile=setting.compile,
        charge=start.charge,
        multiplicity=start.multiplicity,
        **options,
    )


def _length(positions: np.ndarray, pair: tuple[int, int]) -> float:
    return float(np.linalg.norm(positions[pair[0]] - positions[pair[1]]))


def bond_of(structure: Structure, smarts: str) -> tuple[int, int]:
    """Indices of the first two atoms of the first match of a SMARTS.

    The molecule that it is held against has all hydrogens and knows who is bonded to whom by distance, without bond
    orders. Raises `ValueError` if there is no match.
    """
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    rows = zip(structure.numbers.tolist(), structure.positions, strict=True)
    lines = [f"{SYMBOLS[z]} {x[0]:.6f} {x[1]:.6f} {x[2]:.6f}" for z, x in rows]
    molecule = Chem.MolFromXYZBlock("\n".join([str(len(structure)), "", *lines]))
    rdDetermineBonds.DetermineConnectivity(molecule)
    Chem.FastFindRings(molecule)
    found = molecule.GetSubstructMatches(Chem.MolFromSmarts(smarts))
    if not found:
        raise ValueError(f"smarts: {structure.group or structure.formula} has no {smarts}")
    return int(found[0][0]), int(found[0][1])


def topology(structure: Structure) -> app.Topology:
    """One residue without bonds, which no force needs here."""
    made = app.Topology()
    residue = made.addResidue("MOL", made.addChain())
    for k, z in enumerate(structure.numbers.tolist()):
        made.addAtom(f"A{k}", app.Element.getByAtomicNumber(z), residue)
    return made


def reference(method: ReferenceMethod, start: Structure, frames: list[np.ndarray]) -> np.ndarray:
    """Energies (eV) by the method, relative to free atoms; NaN where it does not converge."""
    found = []
    for positions in frames:
        try:
            moved = start.replace(positions=positions, energy=None, forces=None)
            found.append(float(method.label(moved).energy))  # type: ignore[arg-type]
        except LabelError:
            found.append(np.nan)
    return np.array(found)


@dataclass(frozen=True)
class Case:
    """Where a run starts and what drives it out of the domain.

    Attributes:
        shift: eV, what the model's energies of this molecule are off by where all is well.
    """

    name: str
    start: Structure
    temperature: float
    seed: int
    ps: float
    shift: float
    pulled: tuple[int, int] | None = None
    watched: tuple[int, int] | None = None


def pair_of_runs(setting: Setting, case: Case) -> tuple[Run, Run]:
    """The run without a guard, and the same run with one."""
    free, guarded = (
        Run(setting, case.start, case.temperature, case.seed, guard, case.pulled, case.watched).go(case.ps)
        for guard in (False, True)
    )
    return free, guarded


def compared(case: Case, limit: float, free: Run, guarded: Run, error: np.ndarray) -> dict[str, Any]:
    """When the guard ended the run, and what the energies were off by until then and without it.

    Args:
        error: of the energy at each look of the run without a guard, eV, less `Case.shift`; NaN counts as wrong.
    """
    wrong = np.flatnonzero(~(np.abs(error) <= WRONG))
    beyond = np.flatnonzero(np.array(free.record["uncertainty"]) > limit)
    result: dict[str, Any] = {
        "name": case.name,
        "temperature": case.temperature,
        "seed": case.seed,
        "wrong_ps": None if len(wrong) == 0 else round(free.record["ps"][wrong[0]], 4),
        "largest_error_without_guard_eV": largest(error),
        "first_look_beyond_limit_ps": None if len(beyond) == 0 else round(free.record["ps"][beyond[0]], 4),
        "stopped_ps": None
        if guarded.stopped is None
        else round(1e-3 * guarded.setting.timestep * guarded.stopped[0], 4),
        "reason": None if guarded.stopped is None else guarded.stopped[1],
        "rows": {name: free.record[name] for name in ("ps", "uncertainty", "length") if name in free.record}
        | {"error": [None if np.isnan(e) else round(e, 4) for e in error.tolist()]},
    }
    if guarded.stopped is not None:
        # look by look the runs are the same until the guard ends one of them
        last = min(len(guarded.frames), len(error)) - 1
        result["error_at_last_look_before_eV"] = largest(error[last : last + 1], 4)
        result["largest_error_until_stopped_eV"] = largest(error[: last + 1], 4)
        if "length" in guarded.record:
            result["length_at_last_look"] = round(guarded.record["length"][-1], 3)
    return result


def largest(values: np.ndarray, digits: int = 3) -> float | None:
    """The largest size of an error; None if GFN2-xTB converged for none."""
    known = np.abs(values[~np.isnan(values)])
    return round(float(known.max()), digits) if len(known) else None


def in_time(run: dict[str, Any], when: str = "wrong_ps") -> bool:
    """Whether the guard ended a run before (or where) its energy went wrong in the run without a guard."""
    return run["stopped_ps"] is not None and run["stopped_ps"] <= run[when]


def without_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What goes into the JSON; the rows are in the picture."""
    return [{k: v for k, v in run.items() if k != "rows"} for run in runs]


def by_guard(run: dict[str, Any]) -> bool:
    """Whether it was the guard that ended a run."""
    return run["stopped_ps"] is not None and run["reason"].startswith("on_uncertain")


def counted(runs: Sequence[dict[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    """How often the guard was in time, by measures of an energy that is wrong (`<measure>_ps` is when it was)."""
    result: dict[str, Any] = {"runs": len(runs), "stopped": sum(map(by_guard, runs))}
    for when in measures:
        affected = [run for run in runs if run[f"{when}_ps"] is not None]
        result[when] = len(affected)
        result[f"{when}_and_stopped_before"] = sum(by_guard(r) and in_time(r, f"{when}_ps") for r in affected)
        result[f"{when}_before_stopped"] = [
            r["name"] for r in affected if not (by_guard(r) and in_time(r, f"{when}_ps"))
        ]
    where = [r["error_where_stopped_eV"] for r in runs if by_guard(r) and r["error_where_stopped_eV"] is not None]
    result["largest_error_where_stopped_eV"] = max(where, default=None)
    return result


def molecule_of(run: dict[str, Any]) -> str:
    """What comes before the comma in a run's name."""
    return run["name"].split(",")[0]


def with_own_limits(runs: Sequence[dict[str, Any]], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """The runs as limits by molecule would have ended them, read off the runs without a guard, to a look.

    A run with a guard is the one without, up to where it stops. The row `peak` holds the largest uncertainty of all
    steps since the look before.
    """
    result = []
    for run in runs:
        first = first_beyond(run, limits[molecule_of(run)])
        if first is None:
            result.append({**run, "stopped_ps": None})
            continue
        # where not every look has a label, the error there is not known
        error = None if "error_ps" in run["rows"] else run["rows"]["error"][first]
        ended = {"stopped_ps": run["rows"]["ps"][first], "reason": "on_uncertain"}
        result.append({**run, **ended, "error_where_stopped_eV": None if error is None else abs(error)})
    return result


def first_beyond(run: dict[str, Any], limit: float) -> int | None:
    """The first look at or before which the uncertainty was beyond a limit; None if it never was."""
    beyond = np.flatnonzero(np.array(run["rows"]["peak"]) > limit)
    return None if len(beyond) == 0 else int(beyond[0])


def agrees(check: Mapping[str, Any], run: dict[str, Any]) -> bool:
    """Whether a run that was made with a guard stopped where the one without says that it would, to a look.

    Args:
        check: `ps` that it was to last, `limit_eV_A`, and `stopped_ps` or None.
    """
    ps = run["rows"]["ps"]
    first = first_beyond(run, check["limit_eV_A"])
    stopped = check["stopped_ps"]
    if first is None or (first and ps[first - 1] >= check["ps"]):
        # a run ends with steps after its last look
        return stopped is None or stopped > ps[-1]
    # both are whole steps of at least 0.5 fs
    return stopped is not None and (ps[first - 1] if first else -1.0) < stopped <= ps[first] + 1e-6
