"""LED's features: trees of internal coordinates, distances and aligned positions, their ways back, and handedness."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from openmm import app, unit
from scipy.spatial.transform import Rotation

from openmm_led.features import Features
from openmm_led.geometry import superpose
from openmm_led.molecule import Molecule
from openmm_led.zmatrix import ZMatrix, build
from openmm_mlff.analysis.observables import backbone_torsions

FILES = {"ala2": "alanine-dipeptide-implicit.pdb", "trp-cage": "1l2y.pdb", "toluene": "toluene.pdb"}


class Case:
    """A topology, its positions in nm, and some distorted frames."""

    def __init__(self, path: Path, name: str) -> None:
        pdb = app.PDBFile(str(path))
        self.name, self.topology, self.molecule = name, pdb.topology, Molecule.of(pdb.topology)
        self.reference = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        noise = np.random.default_rng(1).normal(scale=0.004, size=(5, *self.reference.shape))
        self.frames = self.reference + noise

        self.trajectory = mdtraj.Trajectory(self.frames, mdtraj.Topology.from_openmm(self.topology))


@pytest.fixture(scope="module", params=list(FILES))
def case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return Case(shared / "data" / FILES[request.param], request.param)


@pytest.fixture(scope="module")
def ala2(shared: Path) -> Case:
    return Case(shared / "data" / FILES["ala2"], "ala2")


@pytest.fixture(scope="module")
def trp_cage(shared: Path) -> Case:
    return Case(shared / "data" / FILES["trp-cage"], "trp-cage")


def fit(mobile: np.ndarray, target: np.ndarray) -> np.ndarray:
    """One frame turned onto another by scipy, which never mirrors."""
    a, b = mobile - mobile.mean(0), target - target.mean(0)
    return Rotation.align_vectors(b, a)[0].apply(a) + target.mean(0)


def wrapped(angle: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * np.asarray(angle)))


def turned(frames: np.ndarray) -> np.ndarray:
    """Every frame turned and moved differently."""
    rotations = Rotation.random(len(frames), random_state=3).as_matrix()
    return np.einsum("nij,naj->nai", rotations, frames) + np.random.default_rng(4).normal(size=(len(frames), 1, 3))


def bonded_angles(molecule: Molecule) -> np.ndarray:
    """All (i, j, k) with bonds i-j and j-k."""
    around = molecule.neighbours
    return np.array([(i, j, k) for j in range(len(molecule)) for i in around[j] for k in around[j] if i < k])


# -------------------------------------------------------------------------------------------------- the tree
def test_columns_are_what_mdtraj_measures(case: Case) -> None:
    tree = build(case.molecule, case.molecule.select("heavy"))
    values = tree.values(case.frames)
    columns = {width: [q for q in tree.quadruples if len(q) == width] for width in (2, 3, 4)}
    expected = np.concatenate(
        [
            mdtraj.compute_distances(case.trajectory, columns[2], periodic=False),
            mdtraj.compute_angles(case.trajectory, columns[3], periodic=False),
            mdtraj.compute_dihedrals(case.trajectory, columns[4], periodic=False),
        ],
        axis=1,
    )
    assert values.shape == (5, 3 * len(case.molecule) - 6)
    # mdtraj keeps single precision, and torsions near a straight angle do not occur here
    assert np.abs(wrapped(values - expected)).max() < 2e-4


@pytest.mark.parametrize("atoms", ["all", "heavy", "backbone"])
def test_round_trip_is_exact_and_keeps_the_hand(case: Case, atoms: str) -> None:
    if atoms == "backbone" and case.name == "toluene":
        with pytest.raises(ValueError, match="atoms: expected at least one atom"):
            Features.internal(case.topology, atoms)
        return
    features = Features.internal(case.topology, atoms)
    tree = features.zmatrix
    back = tree.positions(tree.values(turned(case.frames)))
    for got, frame in zip(back, case.frames[:, features.atoms], strict=True):
        assert np.abs(fit(got, frame) - frame).max() < 1e-10
    assert np.abs(tree.positions(torch.from_numpy(tree.values(case.frames))).numpy() - back).max() < 1e-12


def test_a_mirror_image_has_other_values(case: Case) -> None:
    features = Features.internal(case.topology, "all")
    mirrored = case.frames * np.array([1.0, 1.0, -1.0])
    values, other = features.coordinates(case.frames), features.coordinates(mirrored)
    torsion = features.periodic
    assert np.abs(other[:, ~torsion] - values[:, ~torsion]).max() < 1e-12
    assert np.abs(wrapped(other[:, torsion] + values[:, torsion])).max() < 1e-9
    assert np.abs(features.inputs(mirrored) - features.inputs(case.frames)).max() > 0.1
    back = features.positions(other)[0]
    assert np.abs(fit(back, mirrored[0]) - mirrored[0]).max() < 1e-10
    assert np.abs(fit(back, case.frames[0]) - case.frames[0]).max() > 0.01


def test_every_rotatable_bond_has_one_dihedral(case: Case) -> None:
    tree = build(case.molecule, case.molecule.select("all"))
    axes = [frozenset(q[1:3]) for q, kind in zip(tree.quadruples, tree.kinds, strict=True) if kind == "dihedral"]
    assert len(axes) == len(set(axes))
    inner = {frozenset(bond) for bond in tree.quadruples if len(bond) == 2}
    # bonds of the tree with something to turn on either side, each exactly once
    ends = {atom: sum(atom in bond for bond in inner) for atom in tree.atoms}
    assert set(axes) == {bond for bond in inner if all(ends[atom] > 1 for atom in bond)}


def test_turning_any_dihedral_keeps_bonds_angles_and_hands(ala2: Case) -> None:
    """What the published features do not: there, noise on psi opens N-CA-CB and inverts CA."""
    features = Features.internal(ala2.topology, "all")
    values = np.repeat(features.coordinates(ala2.reference[None]), 200, axis=0)
    dihedrals = [k == "dihedral" for k in features.kinds]
    values[:, dihedrals] = np.random.default_rng(0).uniform(-np.pi, np.pi, (200, sum(dihedrals)))
    frames = features.positions(values)
    topology = mdtraj.Topology.from_openmm(ala2.topology)
    triples = bonded_angles(ala2.molecule)
    got = mdtraj.compute_angles(mdtraj.Trajectory(frames, topology), triples)
    expected = mdtraj.compute_angles(mdtraj.Trajectory(ala2.reference[None], topology), triples)
    assert np.abs(got - expected).max() < 1e-3
    volumes, reference = features.chirality(frames), features.chirality(ala2.reference[None])
    assert np.abs(volumes - reference).max() < 1e-10
    assert np.abs(frames - frames[:1]).max() > 0.1


def test_dihedrals_are_those_of_the_backbone(trp_cage: Case) -> None:
    tree = Features.internal(trp_cage.topology, "heavy").zmatrix
    torsions = zip(tree.quadruples, tree.kinds, strict=True)
    proper = {q for q, kind in torsions if kind == "dihedral"}
    known = backbone_torsions(trp_cage.topology)
    assert len(known) == 38
    # the ring of proline is entered from N, where CD has the same rotatable bond; phi is still the one that is kept
    assert [name for name, q in known.items() if q not in proper and q[::-1] not in proper] == []


def test_gradients_of_both_ways(ala2: Case) -> None:
    tree = Features.internal(ala2.topology, "heavy").zmatrix
    x = torch.tensor(ala2.frames[:2], requires_grad=True)
    values = tree.values(x)
    assert torch.autograd.gradcheck(lambda y: tree.values(y)[:, ::3], x, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradcheck(tree.positions, values.detach().requires_grad_(), eps=1e-7, atol=1e-6)
    # there and back moves the molecule as a whole only: distances follow the positions one by one
    chosen = list(Features.internal(ala2.topology, "heavy").atoms)
    there = torch.cdist(tree.positions(values), tree.positions(values)).square().sum()
    direct = torch.cdist(x[:, chosen], x[:, chosen]).square().sum()
    pulled, straight = (torch.autograd.grad(y, x)[0] for y in (there, direct))
    assert (pulled - straight).abs().max() < 1e-9 * straight.abs().max()


def random_molecule(random: np.random.Generator) -> tuple[Molecule, np.ndarray]:
    """A random connected graph of 3 to 14 atoms, rings included, at random places."""
    n = int(random.integers(3, 15))
    bonds = {(int(random.integers(0, i)), i) for i in range(1, n)}
    for _ in range(int(random.integers(0, 3))):
        i, j = sorted(random.choice(n, 2, replace=False).tolist())
        bonds.add((i, j))
    elements = tuple(random.choice(["C", "N", "S", "H"], n).tolist())
    names = tuple(random.choice(["C", "CA", "N", "X"], n).tolist())
    molecule = Molecule(elements, names, ("MOL",) * n, (1,) * n, tuple(sorted(bonds)))
    return molecule, random.normal(scale=0.2, size=(3, n, 3))


def test_any_graph_and_any_connected_part_of_it() -> None:
    random = np.random.default_rng(11)
    parts = 0
    for _ in range(150):
        molecule, frames = random_molecule(random)
        part = [int(random.integers(len(molecule)))]
        for _ in range(int(random.integers(2, len(molecule)))):
            border = sorted({i for atom in part for i in molecule.neighbours[atom]} - set(part))
            part.append(int(random.choice(border)))
        features = Features.internal(molecule, part)
        assert features.n_coordinates == 3 * len(part) - 6
        rebuilt = features.fit_template(frames[:1]).positions(features.coordinates(frames[:1]))[0]
        assert np.abs(fit(rebuilt, frames[0]) - frames[0]).max() < 1e-8
        back = features.zmatrix.positions(features.coordinates(frames))
        for got, frame in zip(back, frames[:, features.atoms], strict=True):
            assert np.abs(fit(got, frame) - frame).max() < 1e-8
        parts += len(part) < len(molecule)
    assert parts > 50


def test_disulfide_bridges_are_crossed_only_if_they_must_be() -> None:
    ring = Molecule(
        ("C",) * 6 + ("S", "S"),
        (*(f"C{i}" for i in range(6)), "SG", "SG"),
        ("CYX",) * 8,
        (1,) * 8,
        ((0, 1), (0, 6), (1, 2), (2, 3), (3, 4), (4, 5), (5, 7), (6, 7)),
    )
    bonds = {frozenset(q) for q in build(ring, range(8)).quadruples if len(q) == 2}
    assert bonds == {frozenset(bond) for bond in ring.bonds} - {frozenset((6, 7))}
    chains = dataclasses.replace(ring, bonds=(*ring.bonds[:3], *ring.bonds[4:]))
    bonds = {frozenset(q) for q in build(chains, range(8)).quadruples if len(q) == 2}
    assert bonds == {frozenset(bond) for bond in chains.bonds}


# ----------------------------------------------------------------------------------------- inputs and coordinates
def every_kind(case: Case) -> dict[str, Features]:
    return {
        "internal": Features.internal(case.topology, "heavy"),
        "distances": Features.distances(case.topology),
        "cartesian": Features.cartesian(case.topology, case.reference, "heavy"),
    }


@pytest.mark.parametrize("kind", ["internal", "distances", "cartesian"])
def test_inputs_do_not_see_where_a_molecule_lies(case: Case, kind: str) -> None:
    features = every_kind(case)[kind]
    inputs = features.inputs(case.frames)
    assert inputs.shape == (5, features.n_inputs)
    assert np.abs(features.inputs(turned(case.frames)) - inputs).max() < 1e-9
    assert np.abs(inputs[1:] - inputs[:-1]).max() > 1e-3
    # toluene is flat but for the noise: the volumes (nm^3) by which its distances see the mirror image are small
    assert np.abs(features.inputs(case.frames * np.array([-1.0, 1.0, 1.0])) - inputs).max() > 1e-4
    # decoded coordinates can be encoded again
    assert np.abs(features.inputs_of(features.coordinates(case.frames)) - inputs).max() < 1e-9
    tensor = torch.from_numpy(case.frames)
    assert np.abs(features.inputs(tensor).numpy() - inputs).max() < 1e-12


@pytest.mark.parametrize("kind", ["internal", "distances", "cartesian"])
def test_atoms_that_are_not_chosen_come_back(case: Case, kind: str) -> None:
    bare = every_kind(case)[kind]
    with pytest.raises(ValueError, match=r"template: .* have to be rebuilt"):
        bare.positions(bare.coordinates(case.frames))
    features = bare.fit_template(case.reference[None])
    # its own template: exact; other frames: hydrogens follow within the size of the distortion, heavy atoms exactly
    for frame, tolerance in ((case.reference, 1e-9), (case.frames[0], 0.04)):
        got = features.positions(features.coordinates(turned(frame[None])))[0]
        heavy = list(features.atoms)
        rotated = Rotation.align_vectors(frame[heavy] - frame[heavy].mean(0), got[heavy] - got[heavy].mean(0))[0]
        got = rotated.apply(got - got[heavy].mean(0)) + frame[heavy].mean(0)
        assert np.abs(got[heavy] - frame[heavy]).max() < 1e-9
        assert np.abs(got - frame).max() < tolerance
    tensor = features.positions(torch.from_numpy(features.coordinates(case.frames)))
    assert np.abs(tensor.numpy() - features.positions(features.coordinates(case.frames))).max() < 1e-12


def test_hydrogens_of_many_frames_from_one_template(trp_cage: Case) -> None:
    """Small vibrations: within 0.02 nm of where they were, on a template of the mean geometry."""
    features = Features.cartesian(trp_cage.topology, trp_cage.reference)
    random = np.random.default_rng(5)
    frames = trp_cage.reference + random.normal(scale=0.002, size=(40, *trp_cage.reference.shape))
    got = features.fit_template(frames).positions(features.coordinates(trp_cage.reference[None]))[0]
    assert np.abs(got - (trp_cage.reference - trp_cage.reference[list(features.atoms)].mean(0))).max() < 0.02


def test_the_template_takes_the_most_populated_rotamer(ala2: Case) -> None:
    features = Features.internal(ala2.topology, "all")
    column = features.names.index("dihedral ALA2-HB1 ALA2-CB ALA2-CA ALA2-N")
    values = np.repeat(features.coordinates(ala2.reference[None]), 100, axis=0)
    # most frames on either side of pi, where a plain mean would be zero
    values[:, column] = np.where(np.arange(100) < 60, np.pi + np.linspace(-0.2, 0.2, 100), 0.5)
    heavy = Features.internal(ala2.topology, "heavy")
    frames = features.positions(values)
    rebuilt = heavy.fit_template(frames).positions(heavy.coordinates(frames[:1]))
    expected = np.pi + np.linspace(-0.2, 0.2, 100)[:60].mean()
    assert abs(wrapped(features.coordinates(rebuilt)[0, column] - expected)) < 0.02


def test_distances_are_distances(trp_cage: Case) -> None:
    features = Features.distances(trp_cage.topology)
    alphas = [a.index for a in trp_cage.topology.atoms() if a.name == "CA"]
    assert list(features.pairs_of) == alphas
    i, j = np.triu_indices(20, 1)
    expected = mdtraj.compute_distances(trp_cage.trajectory, np.array(alphas)[np.stack([i, j], 1)], periodic=False)
    inputs = features.inputs(trp_cage.frames)
    assert np.abs(inputs[:, :190] - expected).max() < 1e-5
    # 20 centres, and 17 volumes of four CA in a row, which tell a left-handed helix from a right-handed one
    assert features.n_inputs == 190 + 20 + 17
    quartet = trp_cage.frames[:, alphas[3:7]]
    assert np.abs(inputs[:, 190 + 20 + 3] - np.linalg.det(quartet[:, 1:] - quartet[:, :1])).max() < 1e-12


def test_superposition_is_scipys_and_never_mirrors(ala2: Case) -> None:
    target = ala2.reference
    for frames in (turned(ala2.frames), turned(ala2.frames * np.array([1.0, -1.0, 1.0]))):
        got = superpose(frames, target)
        for one, frame in zip(got, frames, strict=True):
            assert np.abs(one - fit(frame, target)).max() < 1e-7
    mirrored = superpose(ala2.reference[None] * np.array([1.0, -1.0, 1.0]), target)[0]
    assert np.sqrt(((mirrored - target) ** 2).sum(1).mean()) > 0.02


def test_gradient_of_the_superposition(ala2: Case) -> None:
    x = torch.tensor(turned(ala2.frames[:1]), requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: superpose(y, ala2.reference)[:, ::4], x, eps=1e-6, atol=1e-6)
    # a regular tetrahedron, whose three singular values are equal
    corners = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    y = torch.tensor(turned(corners[None]), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: superpose(z, corners), y, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["internal", "distances", "cartesian"])
def test_gradients_of_the_features(ala2: Case, kind: str) -> None:
    features = every_kind(ala2)[kind].fit_template(ala2.frames)
    x = torch.tensor(turned(ala2.frames[:1]), requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: features.inputs(y)[:, ::5], x, eps=1e-7, atol=1e-5)
    c = features.coordinates(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: features.inputs_of(v)[:, ::5], c, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradcheck(lambda v: features.positions(v)[:, ::5], c, eps=1e-7, atol=1e-5)


def test_model_potentials_are_taken_as_they_are() -> None:
    features = Features.raw(2)
    x = np.random.default_rng(0).normal(size=(7, 1, 3))
    assert np.array_equal(features.coordinates(x), x[:, 0, :2])
    assert np.array_equal(features.inputs_of(features.inputs(x)), x[:, 0, :2])
    assert np.array_equal(features.positions(x[:, 0, :2]), x * np.array([1.0, 1.0, 0.0]))
    assert features.names == ["x", "y"] and not features.periodic.any() and features.n_inputs == 2
    both = Features.raw(4, n_particles=2)
    assert both.names == ["x0", "y0", "x1", "y1"]
    pair = np.random.default_rng(1).normal(size=(3, 2, 3))
    assert np.array_equal(both.positions(both.coordinates(pair)), pair * np.array([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="raw: expected at least 1 particle and 1 to 3 columns"):
        Features.raw(4)


# -------------------------------------------------------------------------------------------------- handedness
def test_centres_of_a_protein_have_one_hand(trp_cage: Case) -> None:
    features = Features.internal(trp_cage.topology)
    label = trp_cage.molecule.label
    found = [label(centre[0]) for centre in features.centres]
    branches = {"LEU2-CG", "ILE4-CB", "LEU7-CG"}
    glycines = {10, 11, 15}
    alphas = {label(i) for i in trp_cage.molecule.select("CA") if trp_cage.molecule.numbers[i] not in glycines}
    assert set(found) == alphas | branches and len(found) == 20
    volumes = features.chirality(trp_cage.frames)
    arms = [trp_cage.frames[:, atoms[1:]] - trp_cage.frames[:, atoms[:1]] for atoms in features.centres]
    assert np.abs(volumes - np.linalg.det(np.stack(arms, 1))).max() < 1e-15
    # seen against the hydrogen, N, C and CB of an L amino acid go round anticlockwise (the CORN rule)
    assert (volumes[:, [name in alphas for name in found]] > 0).all()


def test_inverted_centres_are_found(trp_cage: Case) -> None:
    features = Features.internal(trp_cage.topology)
    signs = np.sign(features.chirality(trp_cage.reference[None])[0])
    frames = np.concatenate([trp_cage.frames, trp_cage.frames])
    centre, a, b, c = features.centres[3]
    # the centre pushed through the plane of its neighbours
    plane = frames[5:, [a, b, c]].mean(1)
    frames[5:, centre] = 2 * plane - frames[5:, centre]
    assert features.inverted(frames, signs).tolist() == [False] * 5 + [True] * 5
    assert features.inverted(torch.from_numpy(frames), signs).tolist() == [False] * 5 + [True] * 5
    with pytest.raises(ValueError, match="reference_signs: expected"):
        features.inverted(frames, signs[:-1])


def test_centres_without_hydrogens_are_known_by_name(trp_cage: Case) -> None:
    modeller = app.Modeller(trp_cage.topology, trp_cage.reference * unit.nanometer)
    modeller.delete([a for a in modeller.topology.atoms() if a.element.symbol == "H"])
    bare = Molecule.of(modeller.topology)
    assert [bare.label(c[0]) for c in bare.centres] == [
        trp_cage.molecule.label(c[0]) for c in trp_cage.molecule.centres
    ]


# -------------------------------------------------------------------------------------------------- identity
@pytest.mark.parametrize("kind", ["internal", "distances", "cartesian"])
def test_features_survive_json(ala2: Case, kind: str) -> None:
    features = every_kind(ala2)[kind].fit_template(ala2.frames)
    read = Features.from_dict(json.loads(json.dumps(features.to_dict())))
    c = features.coordinates(ala2.frames)
    assert np.array_equal(read.inputs(ala2.frames), features.inputs(ala2.frames))
    assert np.array_equal(read.positions(c), features.positions(c))
    assert read.names == features.names and read.fingerprint() == features.fingerprint()
    raw = Features.from_dict(json.loads(json.dumps(Features.raw(2).to_dict())))
    assert (raw.kind, raw.n_atoms, raw.n_coordinates) == ("raw", 1, 2)


def test_damaged_records_are_refused(ala2: Case) -> None:
    record = Features.internal(ala2.topology).to_dict()
    with pytest.raises(ValueError, match="features: expected chosen in the record"):
        Features.from_dict({k: v for k, v in record.items() if k != "chosen"})
    tree = dict(record["tree"])
    tree["references"] = [tree["references"][0], *tree["references"][2:], tree["references"][1]]
    with pytest.raises(ValueError, match="references: expected"):
        Features.from_dict({**record, "tree": tree})
    with pytest.raises(ValueError, match="template: expected 36 values"):
        Features.from_dict({**record, "template": [0.0]})


def test_another_topology_is_refused_by_its_first_difference(ala2: Case, trp_cage: Case) -> None:
    features = Features.internal(ala2.topology)
    same = mdtraj.Topology.from_openmm(ala2.topology)
    features.check_topology(same)
    assert features.fingerprint() == features.fingerprint(same) == Molecule.of(same).fingerprint
    assert Features.internal(same).names == features.names
    with pytest.raises(ValueError, match="topology: expected 22 atoms, got 304"):
        features.check_topology(trp_cage.topology)
    same.atom(6).name = "NX"
    with pytest.raises(ValueError, match="topology: expected name 'N' of atom 6, got 'NX'"):
        features.check_topology(same)
    assert Molecule.of(same).fingerprint != features.fingerprint()
    fewer = mdtraj.Topology.from_openmm(ala2.topology)
    fewer._bonds = [bond for bond in fewer._bonds if {bond[0].index, bond[1].index} != {0, 1}]
    with pytest.raises(ValueError, match=r"topology: expected a bond ACE1-H1 - ACE1-CH3 \(atoms 0, 1\), got none"):
        features.check_topology(fewer)


# -------------------------------------------------------------------------------------------------- bad input
def test_bad_frames_are_refused(ala2: Case) -> None:
    features = Features.internal(ala2.topology).fit_template(ala2.frames)
    broken = ala2.frames.copy()
    broken[3, 7, 1] = np.nan
    for method in (features.inputs, features.coordinates, features.chirality, features.fit_template):
        with pytest.raises(ValueError, match="positions: expected finite numbers, got NaN or infinity in frame 3"):
            method(broken)
    with pytest.raises(ValueError, match="got NaN or infinity in frame 3"):
        features.inputs(torch.from_numpy(broken))
    with pytest.raises(ValueError, match=r"positions: expected shape \(n, 22, 3\), got \(5, 21, 3\)"):
        features.inputs(ala2.frames[:, :21])
    with pytest.raises(ValueError, match=r"coordinates: expected shape \(n, 24\), got \(2, 23\)"):
        features.positions(np.zeros((2, 23)))
    with pytest.raises(ValueError, match="positions: expected a numpy array or a torch tensor, got list"):
        features.inputs(ala2.frames.tolist())


def test_a_straight_line_is_refused(ala2: Case) -> None:
    tree = Features.internal(ala2.topology).zmatrix
    straight = ala2.frames.copy()
    # CA-C-N of alanine, on which the torsions of the second cap hang
    straight[2, 16] = 2 * straight[2, 14] - straight[2, 8]
    with pytest.raises(ValueError, match=r"expected atoms 16, 14, 8 to form an angle .* straight line in frame 2"):
        tree.values(straight)


def test_a_straight_line_can_be_decoded(ala2: Case) -> None:
    features = Features.cartesian(ala2.topology, ala2.reference, "heavy").fit_template(ala2.frames)
    coordinates = np.asarray(features.coordinates(ala2.frames[:3])).copy()
    atoms = coordinates.reshape(3, -1, 3)
    chosen = list(features.atoms)
    n, c, ca = (chosen.index(k) for k in (16, 14, 8))
    atoms[2, n] = 2 * atoms[2, c] - atoms[2, ca] + 1e-6
    found = features.positions(coordinates)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, chosen], atoms)
    # the hydrogen of the nitrogen is as far from it as in other frames
    apart = np.linalg.norm(found[:, 17] - found[:, 16], axis=-1)
    np.testing.assert_allclose(apart, apart[0], rtol=1e-6)


def test_what_cannot_be_a_tree_is_refused(ala2: Case, trp_cage: Case) -> None:
    with pytest.raises(ValueError, match="atoms: expected atoms joined by bonds, got 20 separate parts"):
        Features.internal(trp_cage.topology, "CA")
    with pytest.raises(ValueError, match="atoms: expected at least 3, got 2"):
        Features.internal(ala2.topology, [4, 5])
    with pytest.raises(ValueError, match="atoms: expected indices from 0 to 21"):
        Features.internal(ala2.topology, [4, 22])
    with pytest.raises(ValueError, match="atoms: expected every atom once"):
        Features.internal(ala2.topology, [4, 4, 5])
    with pytest.raises(ValueError, match="atoms: expected 'heavy'"):
        Features.internal(ala2.topology, "sidechain")
    with pytest.raises(ValueError, match="atoms: expected at least two of the atoms of the coordinates"):
        Features.distances(ala2.topology, "all")
    modeller = app.Modeller(ala2.topology, ala2.reference * unit.nanometer)
    modeller.add(ala2.topology, (ala2.reference + 3.0) * unit.nanometer)
    with pytest.raises(ValueError, match="topology: expected atoms joined by bonds, got 2 separate parts"):
        Features.internal(modeller.topology, range(22))
    empty = app.Topology()
    residue = empty.addResidue("X", empty.addChain())
    for name in "ABC":
        empty.addAtom(name, app.Element.getBySymbol("C"), residue)
    with pytest.raises(ValueError, match="topology: expected bonds between its 3 atoms, got none"):
        Features.internal(empty)
    empty.addAtom("M", None, residue)
    with pytest.raises(ValueError, match=r"topology: expected atoms only, got particle 3 \(M\)"):
        Features.internal(empty)
    with pytest.raises(ValueError, match="reference: expected atoms that are not on one line"):
        Features.cartesian(ala2.topology, np.outer(np.arange(22.0), np.ones(3)))
    with pytest.raises(ValueError, match="atoms: expected at least 3 different atoms"):
        ZMatrix((0, 1), ((-1, -1, -1), (0, -1, -1)))
