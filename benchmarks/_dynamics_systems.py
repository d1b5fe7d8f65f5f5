"""What the benchmark of dynamics simulates: a tripeptide in a box of water, and ions in droplets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from ase.calculators.calculator import Calculator, all_changes
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data import classes
from openmm_mlff.data.assembling import add_waters, place_in_contact
from openmm_mlff.data.parts import Part, make_part
from openmm_mlff.data.reference import Driver, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.dataset_md import ReferenceForce
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM

CPU = openmm.Platform.getPlatform("CPU")
FIELD = ("amber14-all.xml", "amber14/tip3p.xml")
SEED = 5
#: nm, of the cube that water is filled into, and the cutoff of the force field
SIDE, CUTOFF = 2.5, 0.9
#: ps of classical dynamics at constant pressure from which the box of water starts
CLASSICAL = 20.0
#: amu; oscillations of hydrogens become slower, averages over positions stay what they are
HYDROGEN = 3.024
#: nm and kJ/mol/nm^2: a water whose oxygen is further from the middle of all oxygens is pulled back
WALL, SPRING = 0.85, 100.0

#: name -> molecules with the atom that makes the contact (mark 1), distance in angstrom, and waters
DROPLETS: dict[str, tuple[tuple[tuple[str, str], ...], float, int]] = {
    "bridge": ((("MAM", "C[NH2+][H:1]"), ("ACT", "CC(=O)[O-:1]")), 1.9, 24),
    "sodium": ((("NA", "[Na+]"),), 0.0, 30),
    "chloride": ((("CL", "[Cl-]"),), 0.0, 30),
}

#: as in docs/embedding.md
INDUCTION: dict[str, Any] = {
    "dampingLength": 0.129,
    "polarizabilities": {"H": 0.310, "C": 1.092, "N": 0.666, "O": 0.610},
    "inductionDamping": 1.62,
}


@dataclass(frozen=True, eq=False)
class Subject:
    """One system before it has a potential.

    Attributes:
        topology: of everything. positions: ``(n_atoms, 3)`` angstrom.
        region: atoms that the model or GFN2-xTB describes; the rest is the force field's.
        built: what the region was built as: elements, bonds, formal charges.
        embedding: of the region in the force field. induction: whether its charges induce dipoles on the region.
    """

    name: str
    topology: app.Topology
    positions: np.ndarray
    region: np.ndarray
    built: classes.Topology
    embedding: str = "electrostatic"
    induction: bool = False

    @property
    def structure(self) -> Structure:
        """The region at the start."""
        return Structure(self.built.numbers, self.positions[self.region], int(self.built.formal_charges.sum()))

    @property
    def mixed(self) -> bool:
        return len(self.region) < len(self.positions)

    def box(self) -> np.ndarray | None:
        """Edges in angstrom, ``(3,)``."""
        vectors = self.topology.getPeriodicBoxVectors()
        return None if vectors is None else np.diag(vectors.value_in_unit(unit.angstrom)).copy()

    def water(self) -> np.ndarray:
        """Indices of the oxygens of all waters."""
        return np.array(
            [a.index for a in self.topology.atoms() if a.residue.name == "HOH" and a.element == app.element.oxygen],
            dtype=np.int64,
        )

    def positive(self) -> np.ndarray:
        """Indices of atoms that were built with a positive charge, within the region."""
        return np.flatnonzero(self.built.formal_charges > 0)

    def negative(self) -> np.ndarray:
        """Indices of those with a negative one; of a carboxylate both oxygens."""
        found = set()
        pairs = self.built.bonds.tolist()
        for anion in np.flatnonzero(self.built.formal_charges < 0).tolist():
            carbons = {i + j - anion for i, j in pairs if anion in (i, j)}
            alike = {i + j - c for c in carbons for i, j in pairs if c in (i, j)}
            found |= {anion} | {k for k in alike if self.built.numbers[k] == self.built.numbers[anion]}
        return np.array(sorted(found), dtype=np.int64)


def subject(name: str, work: Path) -> Subject:
    """A system by its name; the box of water is made on the first call and then read from `work`."""
    if name in ("zwitterion", "induced", "mechanical"):
        return _in_box(name, work / "zwitterion.pdb")
    if name == "peptide":
        return _of_parts(name, [("ALA", make_part("peptide", "CC(=O)N[C@@H](C)C(=O)NC", seed=SEED))])
    return _droplet(name)


# -- Gly-Ala-Gly in TIP3P ---------------------------------------------------------------------------------------------


def _in_box(name: str, path: Path) -> Subject:
    if not path.exists():
        _solvate(path)
    pdb = app.PDBFile(str(path))
    solute = [a for r in pdb.topology.residues() if r.name != "HOH" for a in r.atoms()]
    region = np.array([a.index for a in solute])
    bonds = [(b[0].index, b[1].index) for b in pdb.topology.bonds() if b[0].residue.name != "HOH"]
    first, last = solute[0].residue, solute[-1].residue
    charges = [int(a.residue is first and a.name == "N") - int(a.residue is last and a.name == "OXT") for a in solute]
    numbers = np.array([a.element.atomic_number for a in solute])
    built = classes.Topology(numbers, np.array(charges), np.array(bonds), np.zeros(len(solute), dtype=np.int64))
    positions = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.angstrom))
    embedding = "mechanical" if name == "mechanical" else "electrostatic"
    return Subject(name, pdb.topology, positions, region, built, embedding, induction=name == "induced")


def _solvate(path: Path) -> None:
    """The zwitterion (protons as at pH 7) in water, after some classical dynamics at 300 K and 1 bar."""
    import random
    from io import StringIO

    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSequence("GAG"))
    AllChem.EmbedMolecule(molecule, randomSeed=SEED)
    heavy = app.PDBFile(StringIO(Chem.MolToPDBBlock(Chem.RemoveHs(molecule))))
    field = app.ForceField(*FIELD)
    modeller = app.Modeller(heavy.topology, heavy.positions)
    modeller.addHydrogens(field, pH=7.0, platform=CPU)
    random.seed(SEED)
    modeller.addSolvent(field, model="tip3p", boxSize=openmm.Vec3(SIDE, SIDE, SIDE) * unit.nanometer)
    system = field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=CUTOFF, constraints=app.HBonds
    )
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    integrator = openmm.LangevinMiddleIntegrator(300.0, 2.0, 0.002)
    integrator.setRandomNumberSeed(SEED)
    context = openmm.Context(system, integrator, CPU, {"Threads": "1"})
    context.setPositions(modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(300.0, SEED)
    integrator.step(round(CLASSICAL / 0.002))
    state = context.getState(positions=True)
    modeller.topology.setPeriodicBoxVectors(state.getPeriodicBoxVectors())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        app.PDBFile.writeFile(modeller.topology, state.getPositions(), file)


# -- droplets ----------------------------------------------------------------------------------------------------


def _droplet(name: str) -> Subject:
    molecules, distance, waters = DROPLETS[name]
    parts = [(residue, make_part(residue, smiles, seed=SEED)) for residue, smiles in molecules]
    rng = np.random.default_rng(SEED)
    placed = [parts[0][1].conformers[0]]
    if len(parts) == 2:
        first, second = ((p.numbers, p.conformers[0], p.bonds, p.marks[1]) for _, p in parts)
        placed.append(place_in_contact(first, second, distance, rng))
    numbers = np.concatenate([p.numbers for _, p in parts])
    charges = np.concatenate([p.formal_charges for _, p in parts]).astype(float)
    positions = add_waters(numbers, np.concatenate(placed), charges, waters, rng)[1]
    return _of_parts(name, [*parts, *[("HOH", make_part("water", "O"))] * waters], positions)


def _of_parts(name: str, parts: Sequence[tuple[str, Part]], positions: np.ndarray | None = None) -> Subject:
    """Molecules laid end to end as an OpenMM topology; atoms are named by element and number."""
    topology = app.Topology()
    chain = topology.addChain()
    for residue, part in parts:
        added = topology.addResidue(residue, chain)
        elements = [app.Element.getByAtomicNumber(int(z)) for z in part.numbers]
        atoms = [topology.addAtom(f"{e.symbol}{k}", e, added) for k, e in enumerate(elements)]
        for i, j in part.bonds.tolist():
            topology.addBond(atoms[i], atoms[j])
    built = classes.Topology.of([part for _, part in parts])
    where = np.concatenate([p.conformers[0] for _, p in parts]) if positions is None else positions
    return Subject(name, topology, where, np.arange(len(where)), built)


# -- potentials ----------------------------------------------------------------------------------------------------


class Teacher(Calculator):  # type: ignore[misc]
    """GFN2-xTB as an ASE calculator that starts from its last wavefunction; the cell is no part of it."""

    implemented_properties = ("energy", "forces")

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self._structure = structure
        self._driver: Driver | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_driver": None}

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = tuple(all_changes)
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        if self._driver is None:
            self._driver = TBLite().driver(self._structure)
        energy, forces = self._driver(self.atoms.positions)
        self.results = {"energy": energy, "forces": forces}


class Correction:
    """What GFN2-xTB's energy of the region is above the model's, for `openmm.PythonForce`."""

    def __init__(self, structure: Structure, model: Path) -> None:
        self._structure, self._model = structure, model
        self._both: tuple[Driver, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_both": None}

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        if self._both is None:
            evaluator = load_potential(self._model).evaluator(self._structure, compile=True)
            self._both = TBLite().driver(self._structure), evaluator
        driver, evaluator = self._both
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        energy, forces = driver(positions)
        energies, own = evaluator.arrays(positions)
        apart = np.ascontiguousarray((forces - own) * KJ_PER_MOL_NM_PER_EV_ANGSTROM)
        return (energy - float(energies[0])) * KJ_PER_MOL_PER_EV, apart


def force_limit(model: Path) -> float | None:
    """The limit of the uncertainty of a force that a model file names, eV/angstrom."""
    return getattr(load_potential(model).config, "force_limit", None)


def system_of(it: Subject, model: Path | None, teacher: bool = False, heavy_hydrogens: bool = True) -> openmm.System:
    """The System with a model file, or with GFN2-xTB (`teacher`); droplets with their wall.

    Where the force field does the water, GFN2-xTB takes the energy of the region only: with electrostatic embedding the
    water sees the model's charges in both, so that the two differ in nothing else.
    """
    if it.mixed:
        return _mixed(it, model, teacher)
    if teacher:
        system = openmm.System()
        for z in it.built.numbers.tolist():
            system.addParticle(app.Element.getByAtomicNumber(z).mass)
        system.addForce(openmm.PythonForce(ReferenceForce(TBLite(), it.structure)))
    else:
        assert model is not None
        system = _potential(model).createSystem(it.topology, removeCMMotion=False, **_options(it, model))
    if heavy_hydrogens:
        _repartition(system, it.built)
    _add_wall(system, it)
    return system


def _options(it: Subject, model: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"charge": it.structure.charge, "compile": True, "threads": 1}
    return options if force_limit(model) is None else {**options, "on_uncertain": "warn"}


def _mixed(it: Subject, model: Path | None, teacher: bool) -> openmm.System:
    field = app.ForceField(*FIELD).createSystem(
        it.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=CUTOFF,
        switchDistance=CUTOFF - 0.1,
        hydrogenMass=HYDROGEN,
        removeCMMotion=False,
    )
    region = it.region.tolist()
    if it.embedding == "mechanical" and teacher:
        force = Teacher(it.structure)
        return MLPotential("ase").createMixedSystem(it.topology, field, region, calculator=force, mlLongRange=False)
    assert model is not None
    options = _options(it, model)
    if it.induction:
        options |= INDUCTION
    system = _potential(model).createMixedSystem(it.topology, field, region, embedding=it.embedding, **options)
    if teacher:
        correction = openmm.PythonForce(Correction(it.structure, model))
        correction.setParticles(region)
        system.addForce(correction)
    return system


def _potential(model: Path) -> MLPotential:
    return MLPotential(load_potential(model).family, modelPath=str(model))


def _repartition(system: openmm.System, built: classes.Topology) -> None:
    """Move mass from heavy atoms to their hydrogens."""
    for hydrogen, heavy in built.hydrogens().items():
        gain = HYDROGEN - system.getParticleMass(hydrogen)._value
        system.setParticleMass(hydrogen, HYDROGEN)
        system.setParticleMass(heavy, system.getParticleMass(heavy)._value - gain)


def _add_wall(system: openmm.System, it: Subject) -> None:
    oxygens = it.water()
    if len(oxygens) == 0:
        return
    wall = openmm.CustomCentroidBondForce(2, f"{0.5 * SPRING}*max(0, distance(g1, g2) - {WALL})^2")
    wall.addGroup(oxygens.tolist(), [1.0] * len(oxygens))
    for k, oxygen in enumerate(oxygens.tolist()):
        wall.addGroup([oxygen], [1.0])
        wall.addBond([0, k + 1])
    system.addForce(wall)


def start_positions(it: Subject) -> np.ndarray:
    """``(n_atoms, 3)`` nm."""
    return it.positions * NM_PER_ANGSTROM
