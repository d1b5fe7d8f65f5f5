"""names of residues and ends -> SMILES of a peptide in a stated protonation state.

``ACE-HIP-NME`` is capped protonated histidine, ``NH3-GLY-COO`` the glycine zwitterion, ``NH2-ALA-SER-COOH`` a neutral
dipeptide. Residues have the names of the Amber force fields, which tell protonation states apart (ASP and GLU are
anions, ASH and GLH neutral, LYS and ARG cations, LYN and ARN neutral, HID and HIE neutral, HIP a cation, CYM and TYM
anions); all are L.
"""

from __future__ import annotations

from openmm_mlff._plugins import near

#: side chains as SMILES, from the alpha carbon on; GLY and PRO are written out in `peptide_smiles`.
SIDE_CHAINS = {
    "ALA": "C",
    "ARG": "CCCNC(N)=[NH2+]",
    "ARN": "CCCNC(N)=N",
    "ASH": "CC(O)=O",
    "ASN": "CC(N)=O",
    "ASP": "CC([O-])=O",
    "CYM": "C[S-]",
    "CYS": "CS",
    "GLH": "CCC(O)=O",
    "GLN": "CCC(N)=O",
    "GLU": "CCC([O-])=O",
    "GLY": "",
    "HID": "Cc1cnc[nH]1",
    "HIE": "Cc1c[nH]cn1",
    "HIP": "Cc1c[nH]c[nH+]1",
    "ILE": "[C@@H](C)CC",
    "LEU": "CC(C)C",
    "LYN": "CCCCN",
    "LYS": "CCCC[NH3+]",
    "MET": "CCSC",
    "PHE": "Cc1ccccc1",
    "PRO": "",
    "SER": "CO",
    "THR": "[C@@H](C)O",
    "TRP": "Cc1c[nH]c2ccccc12",
    "TYM": "Cc1ccc([O-])cc1",
    "TYR": "Cc1ccc(O)cc1",
    "VAL": "C(C)C",
}
#: the amino acid of residues that are protonation states of one.
AMINO_ACID = {name: name for name in SIDE_CHAINS} | {
    "ARN": "ARG",
    "ASH": "ASP",
    "CYM": "CYS",
    "GLH": "GLU",
    "HID": "HIS",
    "HIE": "HIS",
    "HIP": "HIS",
    "LYN": "LYS",
    "TYM": "TYR",
}
#: ends as SMILES; the first residue's nitrogen belongs to the residue, or to the end if it is charged.
N_ENDS = {"ACE": "CC(=O)", "NH2": "", "NH3": "+"}
C_ENDS = {"NME": "NC", "COO": "[O-]", "COOH": "O"}


def split_name(name: str) -> tuple[str, tuple[str, ...], str]:
    """N end, residues and C end of a name like ``ACE-ALA-NME``. Raises `ValueError` naming the part that is unknown."""
    words = name.split("-")
    if len(words) < 3:
        raise ValueError(f"peptide: expected END-RESIDUE-...-END like ACE-ALA-NME, got {name!r}")
    for word, known in ((words[0], N_ENDS), (words[-1], C_ENDS), *((w, SIDE_CHAINS) for w in words[1:-1])):
        if word not in known:
            raise ValueError(f"peptide: {name!r} has the unknown part {word!r}; {near(word, list(known))}")
    return words[0], tuple(words[1:-1]), words[-1]


def amino_acids(name: str) -> tuple[str, ...]:
    """The amino acids of a peptide, whatever their protonation; raises what `split_name` raises."""
    return tuple(AMINO_ACID[residue] for residue in split_name(name)[1])


def peptide_smiles(name: str) -> str:
    """SMILES of a peptide; raises what `split_name` raises."""
    first, residues, last = split_name(name)
    text = ""
    for k, residue in enumerate(residues):
        charged = k == 0 and first == "NH3"
        if residue == "PRO":
            text += f"{'[NH2+]' if charged else 'N'}1CCC[C@H]1C(=O)"
            continue
        nitrogen = "[NH3+]" if charged else "N"
        side = SIDE_CHAINS[residue]
        text += f"{nitrogen}[C@@H]({side})C(=O)" if side else f"{nitrogen}CC(=O)"
    return (N_ENDS[first] if first == "ACE" else "") + text + C_ENDS[last]
