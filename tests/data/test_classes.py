"""The class of a frame follows from where its protons are."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_mlff.data.classes import Topology, check_class, class_of_frame, protonation
from openmm_mlff.data.parts import Part, make_part
from openmm_mlff.data.peptides import peptide_smiles

pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")


def moved_proton(part: Part, fraction: float) -> np.ndarray:
    """The ammonium hydrogen nearest to a carboxylate oxygen, moved so far of the way to a bond of 1 angstrom there."""
    x = part.conformers[0].copy()
    nitrogen = int(np.flatnonzero((part.numbers == 7) & (part.formal_charges == 1))[0])
    oxygen = int(np.flatnonzero((part.numbers == 8) & (part.formal_charges == -1))[0])
    bound = [j if i == nitrogen else i for i, j in part.bonds.tolist() if nitrogen in (i, j)]
    hydrogen = min((h for h in bound if part.numbers[h] == 1), key=lambda h: np.linalg.norm(x[h] - x[oxygen]))
    toward = x[nitrogen] - x[oxygen]
    goal = x[oxygen] + toward / np.linalg.norm(toward)
    x[hydrogen] += fraction * (goal - x[hydrogen])
    return x


@pytest.mark.parametrize("name", ["NH3-GLY-COO", "NH3-ALA-COO", "NH3-ASN-COO", "NH3-ALA-GLY-COO"])
def test_a_zwitterion_that_lost_its_charges_is_neutral(name: str) -> None:
    part = make_part(name, peptide_smiles(name), seed=4)
    topology = Topology.of([part])
    neutral = "neutral peptide" if name.count("-") == 3 else "neutral organic"
    assert class_of_frame("zwitterion", topology, part.conformers[0]) == ("zwitterion", "as built")
    assert class_of_frame("zwitterion", topology, moved_proton(part, 1.0)) == (neutral, "transferred")


def test_a_proton_half_way_is_shared() -> None:
    part = make_part("glycine", peptide_smiles("NH3-GLY-COO"), seed=4)
    states = {class_of_frame("zwitterion", Topology.of([part]), moved_proton(part, f)) for f in np.linspace(0, 1, 41)}
    assert ("proton transfer", "shared") in states and len(states) == 3


def test_an_ion_pair_after_the_transfer_is_hydrogen_bonded() -> None:
    ammonium, formate = make_part("ammonium", "[NH4+]"), make_part("formate", "C(=O)[O-:1]")
    topology = Topology.of([ammonium, formate])
    oxygen = formate.conformers[0][formate.marks[1]]
    nitrogen = ammonium.conformers[0][0]
    out = (ammonium.conformers[0][1] - nitrogen) / np.linalg.norm(ammonium.conformers[0][1] - nitrogen)
    # the formate's oxygen on the axis of the first N-H bond, 2.6 angstrom from the nitrogen, the rest behind it
    second = formate.conformers[0] - oxygen
    back = second.mean(axis=0) / np.linalg.norm(second.mean(axis=0))
    turn, _, vt = np.linalg.svd(np.outer(out, back))
    fixed = turn @ np.diag([1.0, 1.0, np.linalg.det(turn @ vt)]) @ vt
    second = second @ fixed.T + nitrogen + 2.6 * out
    near_n = np.concatenate([ammonium.conformers[0], second])
    near_o = near_n.copy()
    near_o[1] = nitrogen + 1.6 * out
    assert class_of_frame("ion pair", topology, near_n) == ("ion pair", "as built")
    assert class_of_frame("ion pair", topology, near_o) == ("hydrogen bonded", "transferred")
    assert class_of_frame("hydrogen bonded", topology, near_n) == ("hydrogen bonded", "as built")


@pytest.mark.parametrize("smiles", ["C[N+](=O)[O-]", "CC(=O)O", "c1c[nH]cn1", "NC(N)=N"])
def test_resonance_makes_no_zwitterion(smiles: str) -> None:
    part = make_part("x", smiles)
    found = protonation(Topology.of([part]), part.conformers[0])
    assert found.state == "as built" and not found.opposite and not found.formal_charges.any()


def test_formal_charges_of_ions_add_up_to_the_charge() -> None:
    for smiles, charge in (("NC(N)=[NH2+]", 1), ("[O-]C(=O)C(=O)[O-]", -2), ("OP(=O)([O-])[O-]", -2)):
        part = make_part("x", smiles)
        found = protonation(Topology.of([part]), part.conformers[0])
        assert found.formal_charges.sum() == charge


@pytest.mark.parametrize(
    ("smiles", "pairs"),
    [
        ("[NH3+]CC(=O)[O-]", 3 * 2),
        ("NC(=[NH2+])NCC(=O)[O-]", 5 * 2),
        ("[NH3+]CC(=O)O", 0),
        ("C[N+](=O)[O-]", 0),
        ("OCC(=O)[O-]", 0),
        ("[NH3+]CCO.[O-]C=O", 3 * 2),
    ],
)
def test_contacts_are_those_of_opposite_charges(smiles: str, pairs: int) -> None:
    parts = [make_part("x", s) for s in smiles.split(".")]
    # waters around have no say in it
    topology = Topology.of([*parts, make_part("water", "O")])
    contacts = topology.opposite_contacts()
    assert len(contacts) == pairs
    assert set(topology.numbers[contacts[:, 0]]) <= {1} and set(topology.numbers[contacts[:, 1]]) <= {8}


def test_the_singlet_of_a_triplet_has_a_class_of_its_own() -> None:
    part = make_part("oxygen", "[O][O]")
    states = [class_of_frame("triplet", Topology.of([part]), part.conformers[0], m)[0] for m in (1, 3)]
    assert states == ["singlet diradical", "triplet"]


def test_unknown_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'zwiterion'.*zwitterion"):
        check_class("zwiterion")
