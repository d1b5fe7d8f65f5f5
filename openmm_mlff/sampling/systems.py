"""structure file, model, force field -> the System of a run.

Three kinds: everything machine-learned (in the open or in a periodic box), a machine-learned region in a force-field
surrounding (mechanical embedding, ML/MM), and the force field alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.analysis.observables import backbone_torsions
from openmm_mlff.data.structures import formula
from openmm_mlff.forces.running import computations
from openmm_mlff.sampling.settings import OWN, RunSettings
from openmm_mlff.sampling.structure_checks import whole
from openmm_mlff.sampling.uncertainty import TRIAL_PS, trial_run

WATER = frozenset({"HOH", "WAT", "TIP3", "TP3", "SOL", "H2O"})
#: nm; direct-space cutoff of the force field where the box is large enough for it.
NONBONDED_CUTOFF = 0.9
#: settings that are keywords of createSystem under the same name
_UNCERTAIN = ("on_uncertain", "uncertainty_limit", "uncertain_interval", "fall_back")
#: production and equilibration steps from which compiling the model pays for itself.
COMPILE_FROM_STEPS = 20_000


@dataclass
class BuiltSystem:
    """A System with what a run needs to know about it.

    Attributes:
        positions: ``(n_particles, 3)`` nm. ml_atoms: machine-learned particles, link atoms included.
        bonds: ``(n, 2)`` pairs inside the machine-learned region. torsions: name -> four atoms, for the table.
        description: plain data for the configuration file.
    """

    system: openmm.System
    topology: app.Topology
    positions: np.ndarray
    ml_atoms: list[int] = field(default_factory=list)
    bonds: list[tuple[int, int]] = field(default_factory=list)
    torsions: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)


def build(settings: RunSettings) -> BuiltSystem:
    """Read the input, add water if asked, and make the System.

    With ``uncertainty_limit = 'own'`` the limit comes from a trial run at the run's temperature, which `description`
    then holds; the System is the one of a run with that number given.

    Raises `FileNotFoundError` or `ValueError` naming the setting for a file that cannot be read, a selection that
    matches nothing, a residue without parameters, a box that is too small, or constant pressure where the box is fixed
    or missing; and what the potential raises for an element, charge or multiplicity that it cannot describe.
    """
    if settings.uncertainty_limit == OWN:
        return _with_own_limit(settings)
    topology, positions = read_structure(settings.input)
    if not settings.use_box:
        topology.setPeriodicBoxVectors(None)
    if settings.padding is not None:
        topology, positions = solvate(topology, positions, settings)
    region = select(topology, settings.ml_region)
    if len(region) == topology.getNumAtoms():
        built = _all_learned(settings, topology, positions)
    elif region:
        built = _mixed(settings, topology, positions, region)
    else:
        built = BuiltSystem(_force_field_system(settings, topology), topology, positions)
        _add_motion_remover(built.system)
    if settings.ensemble == "npt":
        _check_box_may_change(built)
    built.bonds = _bonds(built)
    wanted = built.ml_atoms or None
    automatic = backbone_torsions(built.topology, wanted)
    built.torsions = (automatic if len(automatic) <= 12 else {}) | dict(settings.torsions)
    _check_torsions(settings, built.system.getNumParticles())
    built.description = _describe(built)
    return built


def _with_own_limit(settings: RunSettings) -> BuiltSystem:
    steps = round(1e3 * TRIAL_PS / settings.timestep)
    unguarded = {"on_uncertain": None, "uncertainty_limit": None, "fall_back": None}
    # whether compiling pays depends on the number of steps
    free = build(settings.replace(**unguarded, steps=steps, equilibration_steps=0))
    trial = trial_run(
        free.system, free.positions, temperature=settings.temperature, duration=TRIAL_PS, timestep=settings.timestep,
        seed=settings.seed, platform=settings.platform, threads=settings.threads,
    )  # fmt: skip
    built = build(settings.replace(uncertainty_limit=trial.limit))
    built.description["uncertainty_limit"] = dataclasses.asdict(trial)
    return built


def read_structure(path: str | Path) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions ``(n_atoms, 3)`` nm of a PDB or mmCIF file; `ValueError` if it is neither."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"input: no file at {path}")
    try:
        file = app.PDBxFile(str(path)) if path.suffix.lower() in (".cif", ".mmcif", ".pdbx") else app.PDBFile(str(path))
        positions = np.array(file.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    except Exception as error:
        raise ValueError(f"input: {path.name} cannot be read as a structure ({error})") from error
    if len(positions) == 0:
        raise ValueError(f"input: expected atoms, got none in {path.name}")
    return file.topology, positions


def select(topology: app.Topology, region: str) -> list[int]:
    """Atoms of the machine-learned region (see `RunSettings.ml_region`), ascending."""
    everything = list(range(topology.getNumAtoms()))
    if region == "all":
        return everything
    if region == "none":
        return []
    if region == "auto":
        solute = [a.index for r in topology.residues() if not _is_solvent(r) for a in r.atoms()]
        return solute or everything
    import mdtraj

    try:
        chosen = sorted(int(i) for i in mdtraj.Topology.from_openmm(topology).select(region))
    except Exception as error:
        raise ValueError(
            f"ml_region: expected auto, all, none or a selection such as 'resname ALA', got {region!r} ({error})"
        ) from error
    if not chosen:
        names = sorted({r.name for r in topology.residues()})
        raise ValueError(f"ml_region: {region!r} selects no atom; residues here: {', '.join(names[:12])}")
    return chosen


def solvate(topology: app.Topology, positions: np.ndarray, settings: RunSettings) -> tuple[app.Topology, np.ndarray]:
    """Put the structure into a box of TIP3P water with `padding` nm around it, with ions against its charge."""
    modeller = app.Modeller(topology, positions * unit.nanometer)
    # ions replace random waters; OpenMM draws them from Python's generator
    state = random.getstate()
    random.seed(settings.seed)
    try:
        modeller.addSolvent(_force_field(settings), model="tip3p", padding=settings.padding * unit.nanometer)
    except Exception as error:
        raise ValueError(f"padding: no water can be added ({error})") from error
    finally:
        random.setstate(state)
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


def _is_solvent(residue: app.topology.Residue) -> bool:
    """Water, or a monatomic ion."""
    return residue.name in WATER or (len(residue) == 1 and next(residue.atoms()).element is not None)


def _force_field(settings: RunSettings) -> app.ForceField:
    try:
        return app.ForceField(*settings.forcefield)
    except Exception as error:
        raise ValueError(f"forcefield: {', '.join(settings.forcefield)} cannot be loaded ({error})") from error


def _force_field_system(settings: RunSettings, topology: app.Topology) -> openmm.System:
    options: dict[str, Any] = {"nonbondedMethod": app.NoCutoff}
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        width = min(box[k][k].value_in_unit(unit.nanometer) for k in range(3))
        # at constant pressure the box must be able to shrink without becoming smaller than two cutoffs
        cutoff = min(NONBONDED_CUTOFF, (0.45 if settings.ensemble == "npt" else 0.49) * width)
        if cutoff < 0.6:
            raise ValueError(f"input: expected a box at least 1.35 nm wide for the force field, got {width:.3f} nm")
        options = {"nonbondedMethod": app.PME, "nonbondedCutoff": cutoff * unit.nanometer}
    force_field = _force_field(settings)
    try:
        return force_field.createSystem(
            topology, constraints=app.HBonds, rigidWater=True, removeCMMotion=False, **options
        )
    except ValueError as error:
        raise ValueError(
            f"forcefield: {', '.join(settings.forcefield)} has no parameters for this structure ({error}); name "
            "further OpenMM XML files, or simulate the molecule alone with ml_region 'all'"
        ) from error


def _potential(settings: RunSettings) -> Any:
    from openmmml import MLPotential

    arguments = {} if settings.model_path is None else {"modelPath": str(settings.model_path)}
    return MLPotential(settings.model, **arguments)


def _model_options(settings: RunSettings) -> dict[str, Any]:
    compiled: dict[str, bool | str] = {"yes": True, "no": False, "auto": "auto"}
    compile_model = compiled[settings.compile]
    if compile_model == "auto" and settings.steps + settings.equilibration_steps >= COMPILE_FROM_STEPS:
        compile_model = True
    options: dict[str, Any] = {
        "charge": settings.charge,
        "multiplicity": settings.multiplicity,
        "compile": compile_model,
    }
    for name, value in (("precision", settings.precision), ("device", settings.device)):
        if value is not None:
            options[name] = value
    if settings.long_range_cutoff is not None:
        options["longRangeCutoff"] = settings.long_range_cutoff
    if settings.long_range_method is not None:
        options["longRangeMethod"] = settings.long_range_method
    if settings.phase is not None:
        options["phase"] = settings.phase
    if settings.on_uncertain is not None:
        options |= {name: getattr(settings, name) for name in _UNCERTAIN}
    return options


def _all_learned(settings: RunSettings, topology: app.Topology, positions: np.ndarray) -> BuiltSystem:
    if settings.ensemble == "npt" and topology.getPeriodicBoxVectors() is not None:
        positions = _with_molecules(topology, positions)
    system = _potential(settings).createSystem(topology, removeCMMotion=False, **_model_options(settings))
    _add_motion_remover(system)
    return BuiltSystem(system, topology, positions, list(range(topology.getNumAtoms())))


def _mixed(settings: RunSettings, topology: app.Topology, positions: np.ndarray, region: list[int]) -> BuiltSystem:
    surroundings = _force_field_system(settings, topology)
    info = _potential(settings).createMixedSystem(
        topology, surroundings, region, embedding=settings.embedding, returnInfo=True, **_model_options(settings)
    )
    system, mixed_topology = info["system"], info["topology"]
    _add_motion_remover(system)
    # link atoms are massless virtual sites behind the atoms of the input
    links = list(range(len(positions), system.getNumParticles()))
    everywhere = np.concatenate([positions, np.zeros((len(links), 3))])
    if links:
        everywhere = _place_virtual_sites(system, everywhere)
    return BuiltSystem(system, mixed_topology, everywhere, [*region, *links])


def _with_molecules(topology: app.Topology, positions: np.ndarray) -> np.ndarray:
    """Molecules in one piece, as the barostat moves them; bonds by distance where the input names none.

    What hangs together throughout the box (a crystal) gets no bonds and is scaled atom by atom.
    """
    box = np.array(topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))
    atoms = list(topology.atoms())
    numbers = _numbers(topology)
    if topology.getNumBonds() == 0 and (numbers > 0).all():
        pairs = bonds_by_distance(numbers, positions * 10.0, range(len(atoms)), box * 10.0)
        if len(_parts(len(atoms), pairs)) > 1:
            for a, b in pairs:
                topology.addBond(atoms[a], atoms[b])
    return whole(topology, positions, box)


def _parts(n: int, pairs: Sequence[tuple[int, int]]) -> set[int]:
    """One atom of every set of `n` atoms that `pairs` connect."""
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for a, b in pairs:
        root[find(a)] = find(b)
    return {find(i) for i in range(n)}


def _place_virtual_sites(system: openmm.System, positions: np.ndarray) -> np.ndarray:
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    context.computeVirtualSites()
    return context.getState(positions=True).getPositions(asNumpy=True)._value


def _check_box_may_change(built: BuiltSystem) -> None:
    if built.topology.getPeriodicBoxVectors() is None:
        raise ValueError("ensemble: npt needs a periodic box, but the input has none (add water with padding)")
    # OpenMM would find out at the first attempt to change the box
    if any(c.spec.region == "periodic" and c.model.fixed_lattice for c in computations(built.system)):
        raise ValueError(
            "ensemble: expected nve or nvt, got 'npt'; this model was trained in one lattice and describes no other, "
            "so that the box cannot change"
        )


def _add_motion_remover(system: openmm.System) -> None:
    """Stop the drift of the whole; a single atom has no other motion, so it keeps it."""
    if sum(system.getParticleMass(i)._value > 0 for i in range(system.getNumParticles())) > 1:
        system.addForce(openmm.CMMotionRemover())


def _bonds(built: BuiltSystem) -> list[tuple[int, int]]:
    """Bonds inside the machine-learned region: the topology's, or by distance where it has none there."""
    region = set(built.ml_atoms)
    listed = {tuple(sorted((a.index, b.index))) for a, b in built.topology.bonds() if {a.index, b.index} <= region}
    if listed or len(region) < 2:
        return sorted(listed)
    return [(a, b) for a, b in bonds_by_distance(_numbers(built.topology), built.positions * 10.0, sorted(region))]


def bonds_by_distance(
    numbers: np.ndarray, positions: np.ndarray, atoms: Sequence[int], box: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Pairs of `atoms` closer than 1.25 times the sum of their covalent radii; positions in angstrom.

    Of their nearest images if there is a `box` (vectors as rows in OpenMM's reduced form, angstrom).
    """
    from ase.data import covalent_radii

    index = np.asarray(atoms)
    radii, where = covalent_radii[numbers[index]], positions[index]
    found = []
    for k in range(len(index) - 1):
        apart = where[k + 1 :] - where[k]
        if box is not None:
            for axis in (2, 1, 0):
                apart = apart - np.rint(apart[:, axis] / box[axis, axis])[:, None] * box[axis]
        distance = np.linalg.norm(apart, axis=1)
        partners = np.flatnonzero(distance < 1.25 * (radii[k + 1 :] + radii[k])) + k + 1
        found += [(int(index[k]), int(index[m])) for m in partners]
    return found


def _numbers(topology: app.Topology) -> np.ndarray:
    return np.array([0 if a.element is None else a.element.atomic_number for a in topology.atoms()])


def _check_torsions(settings: RunSettings, n_particles: int) -> None:
    for name, atoms in settings.torsions.items():
        if max(atoms) >= n_particles:
            raise ValueError(f"torsions: expected atom indices below {n_particles} for {name!r}, got {max(atoms)}")


def _describe(built: BuiltSystem) -> dict[str, Any]:
    numbers = _numbers(built.topology)
    waters = sum(r.name in WATER for r in built.topology.residues())
    learned = numbers[built.ml_atoms]
    return {
        "particles": built.system.getNumParticles(),
        "ml_atoms": built.ml_atoms,
        "ml_formula": formula(learned[learned > 0]) if len(learned) else None,
        "waters": waters,
        "periodic": built.topology.getPeriodicBoxVectors() is not None,
        "bonds": [list(b) for b in built.bonds],
        "torsions": {name: list(atoms) for name, atoms in built.torsions.items()},
    }
