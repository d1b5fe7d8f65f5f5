"""Pairs of potentials: files, phases and lambda in OpenMM, and what is refused. Truth: each potential alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff import cli
from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.serialization import load_system
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.sampling.molecules import Molecules
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_resolv import LAMBDA, BothEnergies, ResolvPotential, both_energies, save_pair

from .resolv_pairs import AMMONIA, METHANOL, METHANOL_BONDS, WATER, pair, so3krates

KJ = KJ_PER_MOL_PER_EV


@pytest.fixture(scope="module")
def model() -> ResolvPotential:
    return pair()


@pytest.fixture(scope="module")
def path(model: ResolvPotential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(model.water, model.vacuum, tmp_path_factory.mktemp("pair") / "pair.safetensors", licence="none")


@pytest.fixture(scope="module")
def potential(path: Path) -> MLPotential:
    return MLPotential("resolv", modelPath=str(path))


def topology_of(*molecules: Structure, bonds: list[list[tuple[int, int]]] | None = None) -> app.Topology:
    topology = app.Topology()
    for k, molecule in enumerate(molecules):
        residue = topology.addResidue(f"M{k}", topology.addChain())
        numbers = molecule.numbers.tolist()
        atoms = [topology.addAtom(f"A{i}", app.Element.getByAtomicNumber(z), residue) for i, z in enumerate(numbers)]
        for i, j in bonds[k] if bonds else []:
            topology.addBond(atoms[i], atoms[j])
    return topology


def context_of(system: openmm.System, positions: np.ndarray, step: float = 0.001) -> openmm.Context:
    integrator = openmm.VerletIntegrator(step)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions / 10.0)
    return context


def energy_of(context: openmm.Context) -> float:
    return context.getState(energy=True).getPotentialEnergy()._value


def forces_of(context: openmm.Context) -> np.ndarray:
    return context.getState(forces=True).getForces(asNumpy=True)._value


def system_of(potential: MLPotential, **options: Any) -> openmm.System:
    return potential.createSystem(topology_of(METHANOL), precision="double", **options)


# -- files -----------------------------------------------------------------------------------------------------------


def test_one_file_holds_both(model: ResolvPotential, path: Path) -> None:
    loaded = load_potential(path, "resolv")
    assert isinstance(loaded, ResolvPotential) and loaded.phase == "water"
    for name, member in model.members.items():
        again = loaded.members[name]
        assert type(again) is type(member) and again.config == member.config
        for key, tensor in member.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor)
    card = model_file.load_card(path)
    assert card["kind"] == "composite" and card["family"] == "resolv" and card["licence"] == "none"
    assert card["members"]["vacuum"]["config"]["cutoff"] == 4.0 and card["cutoff"] == 4.5
    assert card["supports"] == {"charge": False, "multiplicity": False, "periodic": False, "charges": False}


def test_saving_twice_gives_the_same_bytes(model: ResolvPotential, path: Path, tmp_path: Path) -> None:
    again = save_pair(model.water, model.vacuum, tmp_path / "again.safetensors", licence="none")
    assert model_file.sha256_of(again) == model_file.sha256_of(path)


def test_members_from_files_keep_their_cards(model: ResolvPotential, tmp_path: Path) -> None:
    vacuum = save_potential(model.vacuum, tmp_path / "v.safetensors", licence="CC0", name="first")
    both = save_pair(model.water, vacuum, tmp_path / "pair.safetensors", domain="small molecules")
    card = model_file.load_card(both)
    assert card["members"]["vacuum"]["licence"] == "CC0" and card["members"]["vacuum"]["name"] == "first"
    assert "licence" not in card["members"]["water"] and card["domain"] == "small molecules"
    assert load_potential(both).energy_and_forces(METHANOL)[0] == model.energy_and_forces(METHANOL)[0]


def test_a_pair_refuses_unknown_fields_and_names_the_member(model: ResolvPotential, tmp_path: Path) -> None:
    target, damaged = tmp_path / "pair.safetensors", tmp_path / "damaged.safetensors"
    with pytest.raises(ValueError, match=r"card: there is no field 'license'; did you mean 'licence'\?"):
        save_pair(model.water, model.vacuum, target, license="MIT")
    with pytest.raises(FileNotFoundError, match=r"^water: no file at .*missing\.safetensors"):
        save_pair(tmp_path / "missing.safetensors", model.vacuum, target)
    damaged.write_bytes(save_potential(model.vacuum, tmp_path / "whole.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"^vacuum: damaged\.safetensors is damaged"):
        save_pair(model.water, damaged, target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda card: card.pop("members"), "the card of a composite is incomplete"),
        (lambda card: card["members"].pop("water"), r"'water\..*' belongs to no member"),
        (lambda card: card["members"]["water"].pop("config"), "card of the member 'water' is incomplete"),
        (lambda card: card["members"]["water"].update(kind="composite"), "is incomplete, or it is no potential"),
        (lambda card: card["members"]["water"]["config"].update(num_layers=2), "the tensors do not fit the card"),
        (lambda card: card["members"].update(ice=card["members"]["water"]), "the tensors do not fit the card"),
        (lambda card: card.update(kind="potential"), "of kind 'potential', which it is not"),
        (lambda card: card.update(config={"phase": "steam"}), "phase: expected 'water', .* got 'steam'"),
        (lambda card: card.update(config={"solvent": 1}), "config has 'solvent', which this version of resolv"),
    ],
    ids=["no members", "a member less", "no config", "nested", "config", "a member more", "kind", "phase", "option"],
)  # fmt: skip
def test_damaged_cards(path: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    card, tensors = model_file.load(path)
    damage(card)
    broken = model_file.save(tmp_path / "broken.safetensors", card, tensors)
    with pytest.raises(ValueError, match=f"modelPath: .*{message}"):
        load_potential(broken)


def test_a_network_is_no_pair(model: ResolvPotential, tmp_path: Path) -> None:
    single = save_potential(model.water, tmp_path / "single.safetensors")
    with pytest.raises(ValueError, match="is a 'so3krates' model, expected 'resolv'"):
        MLPotential("resolv", modelPath=str(single))
    with pytest.raises(TypeError, match="water: expected a Potential"):
        save_pair(None, model.vacuum, tmp_path / "none.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="water: expected one potential, got a pair of family 'resolv'"):
        save_pair(model, model.vacuum, tmp_path / "none.safetensors")


# -- phases and lambda in OpenMM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "member"), [(None, "water"), ("water", "water"), ("vacuum", "vacuum")])
def test_a_phase_is_one_potential(
    model: ResolvPotential, potential: MLPotential, phase: str | None, member: str
) -> None:
    context = context_of(system_of(potential, phase=phase), METHANOL.positions)
    energy, forces = model.members[member].energy_and_forces(METHANOL)
    assert energy_of(context) == pytest.approx(energy * KJ, abs=1e-8)
    np.testing.assert_allclose(forces_of(context), forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM, atol=1e-6)
    assert LAMBDA not in context.getParameters()


def test_lambda_interpolates(model: ResolvPotential, potential: MLPotential) -> None:
    context = context_of(system_of(potential, phase="both"), METHANOL.positions)
    assert dict(context.getParameters()) == {"lambda_solvation": 1.0}
    (u0, f0), (u1, f1) = (m.energy_and_forces(METHANOL) for m in (model.vacuum, model.water))
    assert abs(u1 - u0) > 0.1
    for x in (1.0, 0.0, 0.3, 0.75):
        context.setParameter(LAMBDA, x)
        assert energy_of(context) == pytest.approx(((1 - x) * u0 + x * u1) * KJ, abs=1e-8)
        mixed = ((1 - x) * f0 + x * f1) * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        np.testing.assert_allclose(forces_of(context), mixed, atol=1e-6)
        both = both_energies(context)
        np.testing.assert_allclose([both.vacuum[0], both.water[0]], [u0 * KJ, u1 * KJ], atol=1e-8)
    step = 1e-3
    values = []
    for x in (0.5 - step, 0.5 + step):
        context.setParameter(LAMBDA, x)
        values.append(energy_of(context))
    assert both.derivative[0] == pytest.approx((values[1] - values[0]) / (2 * step), rel=1e-6)


def test_contexts_of_one_system_have_a_lambda_each(model: ResolvPotential, potential: MLPotential) -> None:
    system = system_of(potential, phase="both")
    contexts = [context_of(system, METHANOL.positions) for _ in range(3)]
    for x, context in zip((0.0, 0.5, 1.0), contexts, strict=True):
        context.setParameter(LAMBDA, x)
    u0, u1 = (m.energy_and_forces(METHANOL)[0] * KJ for m in (model.vacuum, model.water))
    for _ in range(2):
        assert [energy_of(c) for c in contexts] == pytest.approx([u0, 0.5 * (u0 + u1), u1], abs=1e-8)


def test_a_lambda_that_is_none(potential: MLPotential) -> None:
    context = context_of(system_of(potential, phase="both"), METHANOL.positions)
    context.setParameter(LAMBDA, 1.5)
    with pytest.raises(openmm.OpenMMException, match="coupling: expected a number from 0"):
        energy_of(context)


def test_reading_both_energies_leaves_a_run_as_it_is(potential: MLPotential) -> None:
    def run(ask: bool) -> np.ndarray:
        system = system_of(potential, phase="both", maxForce=None)
        context = context_of(system, METHANOL.positions, 0.0001)
        context.setParameter(LAMBDA, 0.5)
        reader = BothEnergies(system)
        for _ in range(5):
            context.getIntegrator().step(2)
            if ask:
                reader(context)
        return context.getState(positions=True).getPositions(asNumpy=True)._value

    assert np.array_equal(run(ask=True), run(ask=False))


def test_lambda_survives_a_system_xml(potential: MLPotential) -> None:
    system = system_of(potential, phase="both")
    before = context_of(system, METHANOL.positions)
    after = context_of(load_system(openmm.XmlSerializer.serialize(system)), METHANOL.positions)
    assert dict(after.getParameters()) == {LAMBDA: 1.0}
    for x in (1.0, 0.4):
        for context in (before, after):
            context.setParameter(LAMBDA, x)
        assert energy_of(after) == energy_of(before)
    # a vacuum one comes back as a vacuum one
    vacuum = system_of(potential, phase="vacuum")
    again = load_system(openmm.XmlSerializer.serialize(vacuum))
    energies = [energy_of(context_of(s, METHANOL.positions)) for s in (vacuum, again)]
    assert energies[0] == energies[1] != energy_of(before)


def test_copies_have_both_energies_each(model: ResolvPotential, potential: MLPotential) -> None:
    moved = METHANOL.positions + np.random.default_rng(1).normal(scale=0.03, size=(3, 6, 3))
    replicas = Replicas(system_of(potential, phase="both"), topology_of(METHANOL), 3)
    context = replicas.context(openmm.VerletIntegrator(0.001), "Reference")
    replicas.set_positions(context, moved / 10.0)
    context.setParameter(LAMBDA, 0.25)
    alone = np.array([[m.energy_and_forces(METHANOL.replace(positions=x))[0] for x in moved] for m in
                      (model.vacuum, model.water)]) * KJ  # fmt: skip
    np.testing.assert_allclose(replicas.potential_energies(context), 0.75 * alone[0] + 0.25 * alone[1], atol=1e-7)
    both = both_energies(context)
    np.testing.assert_allclose([both.vacuum, both.water], alone, atol=1e-7)


def test_different_molecules_have_both_energies_each(model: ResolvPotential, potential: MLPotential) -> None:
    """A molecule that breaks is held, and the others follow lambda."""
    molecules = [METHANOL, WATER, AMMONIA]
    topologies = [topology_of(s) for s in molecules]
    singles = [potential.createSystem(t, phase="both", precision="double") for t in topologies]
    many = Molecules(singles, topologies)
    context = many.context(openmm.VerletIntegrator(0.001))
    many.set_positions(context, [s.positions / 10.0 for s in molecules])
    alone = np.array([[m.energy_and_forces(s)[0] for s in molecules] for m in (model.vacuum, model.water)]) * KJ
    for x in (1.0, 0.25):
        context.setParameter(LAMBDA, x)
        np.testing.assert_allclose(many.potential_energies(context), (1 - x) * alone[0] + x * alone[1], atol=1e-7)
    both = both_energies(context)
    np.testing.assert_allclose([both.vacuum, both.water], alone, atol=1e-7)
    broken = [s.positions / 10.0 for s in molecules]
    broken[1] = broken[1] * 5.0
    context.setPositions(np.concatenate(broken))
    energies = many.potential_energies(context)
    assert [f.molecule for f in many.failures] == [1]
    np.testing.assert_allclose(energies[[0, 2]], (0.75 * alone[0] + 0.25 * alone[1])[[0, 2]], atol=1e-7)


def test_a_potential_in_memory_has_its_own_phase(model: ResolvPotential) -> None:
    memory = MLPotential("resolv", model=model.in_phase("vacuum"))
    energies = [energy_of(context_of(system_of(memory, phase=phase), METHANOL.positions)) for phase in (None, "water")]
    expected = [m.energy_and_forces(METHANOL)[0] * KJ for m in (model.vacuum, model.water)]
    assert energies == pytest.approx(expected, abs=1e-8)


def test_both_energies_need_a_lambda(potential: MLPotential) -> None:
    with pytest.raises(ValueError, match="system: expected one resolv force of phase 'both', got 0"):
        both_energies(context_of(system_of(potential, phase="water"), METHANOL.positions))


def test_phases_in_memory(model: ResolvPotential) -> None:
    vacuum = model.in_phase("vacuum")
    assert (vacuum.phase, vacuum.coupling, model.phase, model.coupling) == ("vacuum", 0.0, "water", 1.0)
    assert vacuum.energy_and_forces(METHANOL)[0] == model.vacuum.energy_and_forces(METHANOL)[0]
    with pytest.raises(ValueError, match="coupling: phase 'water' has none to set"):
        model.coupling = 0.5
    both = model.in_phase("both")
    both.coupling = 0.5
    assert model.coupling == 1.0 and both.coupling == 0.5
    with pytest.raises(ValueError, match="phase: expected 'water', 'vacuum' or 'both', got 'ice'"):
        model.in_phase("ice")


# -- molecules among other atoms -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside() -> tuple[app.Topology, openmm.System, np.ndarray]:
    """Methanol beside a water that OpenMM describes by plain springs and Lennard-Jones."""
    topology = topology_of(METHANOL, WATER, bonds=[METHANOL_BONDS, [(0, 1), (0, 2)]])
    system, nonbonded, bonds = openmm.System(), openmm.NonbondedForce(), openmm.HarmonicBondForce()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
        nonbonded.addParticle(0.1 * (-1) ** atom.index, 0.3, 0.2)
    for bond in topology.bonds():
        bonds.addBond(bond.atom1.index, bond.atom2.index, 0.1, 1000.0)
    system.addForce(nonbonded)
    system.addForce(bonds)
    return topology, system, np.concatenate([METHANOL.positions, WATER.positions + np.array([0.0, 0.0, 6.0])])


def test_the_vacuum_potential_in_real_surroundings(
    model: ResolvPotential, potential: MLPotential, beside: tuple[app.Topology, openmm.System, np.ndarray]
) -> None:
    topology, system, positions = beside
    options = {"precision": "double"}
    mixed = potential.createMixedSystem(topology, system, range(6), phase="vacuum", **options)
    alone = MLPotential("so3krates", model=model.vacuum).createMixedSystem(topology, system, range(6), **options)
    energies = [energy_of(context_of(s, positions)) for s in (mixed, alone)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-8)


@pytest.mark.parametrize("phase", [None, "water", "both"])
def test_implicit_water_in_real_surroundings(
    potential: MLPotential, beside: tuple[app.Topology, openmm.System, np.ndarray], phase: str | None
) -> None:
    topology, system, _ = beside
    with pytest.raises(ValueError, match=r"phase: the energy of resolv in phase .* expected 'vacuum'"):
        potential.createMixedSystem(topology, system, range(6), phase=phase)


def test_a_whole_molecule_between_force_field_and_pair(model: ResolvPotential, potential: MLPotential) -> None:
    """Both parameters at once: lambda_interpolate of openmm-ml and lambda_solvation."""
    topology = topology_of(METHANOL, bonds=[METHANOL_BONDS])
    system, bonds = openmm.System(), openmm.HarmonicBondForce()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    for i, j in METHANOL_BONDS:
        bonds.addBond(i, j, 0.12, 5000.0)
    system.addForce(bonds)
    options = {"interpolate": True, "precision": "double", "phase": "both"}
    mixed = potential.createMixedSystem(topology, system, range(6), **options)
    context = context_of(mixed, METHANOL.positions)
    mm = energy_of(context_of(system, METHANOL.positions))
    u0, u1 = (m.energy_and_forces(METHANOL)[0] * KJ for m in (model.vacuum, model.water))
    for x, y in ((1.0, 1.0), (1.0, 0.2), (0.5, 0.2), (0.0, 0.7)):
        context.setParameter("lambda_interpolate", x)
        context.setParameter(LAMBDA, y)
        assert energy_of(context) == pytest.approx((1 - x) * mm + x * ((1 - y) * u0 + y * u1), abs=1e-6)
    both = both_energies(context)
    np.testing.assert_allclose([both.vacuum[0], both.water[0]], [u0, u1], atol=1e-8)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_what_has_no_phases_refuses_one(model: ResolvPotential, potential: MLPotential) -> None:
    with pytest.raises(ValueError, match="phase: resolv offers 'water', 'vacuum' or 'both', got 'gas'"):
        system_of(potential, phase="gas")
    with pytest.raises(TypeError, match="solvent: not a keyword of createSystem; did you mean 'phase'"):
        system_of(potential, solvent="water")
    with pytest.raises(ValueError, match="phase: so3krates has one energy only"):
        system_of(MLPotential("so3krates", model=model.water), phase="water")


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ([9, 1], {}, "elements: expected atoms among H C N O .* got F"),
        ([8, 1, 1, 1], {"charge": 1}, "charge: resolv describes neutral systems only, got [+]1"),
        ([6, 1, 1], {"multiplicity": 3}, "multiplicity: resolv describes singlets only, got 3"),
        ([6, 1, 1, 1], {}, "multiplicity: CH3 with charge [+]0 has 9 electrons"),
        ([8, 1, 1], {"embedding": "electrostatic"}, "electrostatic"),
    ],
    ids=["element", "charge", "triplet", "radical", "embedding"],
)
def test_molecules_outside_the_domain(
    potential: MLPotential, numbers: list[int], options: dict[str, Any], message: str
) -> None:
    molecule = Structure(np.array(numbers), np.arange(3.0 * len(numbers)).reshape(-1, 3))
    topology = topology_of(molecule)
    if "embedding" in options:
        system = openmm.System()
        for _ in numbers:
            system.addParticle(1.0)
        with pytest.raises(ValueError, match=message):
            potential.createMixedSystem(topology, system, range(3), phase="vacuum", **options)
        return
    with pytest.raises(ValueError, match=message):
        potential.createSystem(topology, **options)


def test_boxes_are_refused(potential: MLPotential) -> None:
    topology = topology_of(METHANOL)
    topology.setPeriodicBoxVectors(3.0 * np.eye(3) * unit.nanometer)
    with pytest.raises(ValueError, match=r"cell: resolv .* open space.*setPeriodicBoxVectors\(None\)"):
        potential.createSystem(topology)


def test_two_molecules_are_refused_by_their_bonds(potential: MLPotential) -> None:
    topology = topology_of(METHANOL, WATER, bonds=[METHANOL_BONDS, [(0, 1), (0, 2)]])
    with pytest.raises(ValueError, match=r"molecule: .* got 2 fragments by the bonds of the topology \(CH4O, H2O\)"):
        potential.createSystem(topology)


def test_two_molecules_are_refused_by_distance(potential: MLPotential) -> None:
    """Without bonds, only the positions can tell; a hydrogen bond (1.9 angstrom here) is none."""
    system = potential.createSystem(topology_of(METHANOL, WATER))
    offset = METHANOL.positions[3] + np.array([1.3, -1.4, 0.0])
    context = context_of(system, np.concatenate([METHANOL.positions, WATER.positions + offset]))
    with pytest.raises(openmm.OpenMMException, match=r"got 2 fragments by the distances of their atoms \(CH4O, H2O\)"):
        energy_of(context)


def test_a_bond_that_vibrates_is_a_bond(model: ResolvPotential) -> None:
    stretched = METHANOL.positions.copy()
    stretched[[1, 3]] += [0.0, -0.45, 0.0]  # C-O of 1.87 angstrom
    model.check_geometry(METHANOL.replace(positions=stretched))
    stretched[[1, 3]] += [0.0, -0.5, 0.0]
    with pytest.raises(ValueError, match=r"got 2 fragments .* \(CH3, HO\)"):
        model.check_geometry(METHANOL.replace(positions=stretched))


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def molecule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pdb") / "methanol.pdb"
    topology = topology_of(METHANOL, bonds=[METHANOL_BONDS])
    with path.open("w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, METHANOL.positions * unit.angstrom, file)
    return path


def test_simulate_takes_a_phase(
    path: Path, molecule_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["simulate", str(molecule_file), "--model-path", str(path), "--minimize", "0", "--steps", "4"]
    common += ["--report", "2", "--timestep", "0.1", "--ignore-bonds", "--max-force", "1e7", "--quiet"]
    for phase in ("vacuum", "water"):
        assert cli.main([*common, "--output", str(tmp_path / phase), "--phase", phase]) == 0
    settings = json.loads((tmp_path / "vacuum" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert settings["model"] == "resolv" and settings["phase"] == "vacuum"
    assert cli.main([*common, "--output", str(tmp_path / "gas"), "--phase", "gas"]) == 1
    assert "phase: resolv offers 'water', 'vacuum' or 'both', got 'gas'" in capsys.readouterr().err


def test_evaluate_verify_and_convert(
    model: ResolvPotential, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openmm_mlff.data.formats import write_extxyz

    rng = np.random.default_rng(3)
    frames = [METHANOL.replace(positions=METHANOL.positions + rng.normal(scale=0.05, size=(6, 3))) for _ in range(4)]
    labels = [model.vacuum.energy_and_forces(s) for s in frames]
    frames = [s.replace(energy=e, forces=f, group=str(k)) for k, (s, (e, f)) in enumerate(zip(frames, labels,
              strict=True))]  # fmt: skip
    write_extxyz(tmp_path / "frames.extxyz", frames)
    common = ["evaluate", "--model", str(path), "--data", str(tmp_path / "frames.extxyz"), "--output", str(tmp_path)]
    for phase in ("vacuum", "water"):
        assert cli.main([*common, "--phase", phase, "--name", phase, "--precision", "double"]) == 0
    errors = {
        phase: json.loads((tmp_path / f"{phase}_errors.json").read_text(encoding="utf-8"))["tables"]["all"][0]
        for phase in ("vacuum", "water")
    }
    # the file holds eight decimals
    assert errors["vacuum"]["forces_mae"] < 1e-3 and errors["water"]["forces_mae"] > 1.0
    assert cli.main(["models", "verify", str(path)]) == 0
    assert "sound, resolv, 4 elements" in capsys.readouterr().out
    assert cli.main(["convert", str(path), str(tmp_path / "copy.safetensors"), "--licence", "none"]) == 0
    copied = load_potential(tmp_path / "copy.safetensors")
    assert copied.energy_and_forces(METHANOL)[0] == model.energy_and_forces(METHANOL)[0]


def test_pairs_are_not_trained_as_one_network(tmp_path: Path) -> None:
    from openmm_mlff.training.recipe import Recipe
    from openmm_mlff.training.run import _new_model

    with pytest.raises(ValueError, match="family: resolv models are made of others"):
        _new_model(Recipe(family="resolv"), None)  # type: ignore[arg-type]


def test_a_conversion_is_held_against_both_phases(model: ResolvPotential) -> None:
    from openmm_mlff.cli.convert import largest_difference

    other = pair(water=model.water, vacuum=so3krates(9, cutoff=4.0))
    assert largest_difference(model, model) == 0.0
    assert largest_difference(model, other) > 0.1
