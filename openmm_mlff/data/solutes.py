"""SMILES, files with a molecule, tables of molecules -> solutes: named start structures, or why there are none."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from openmm_mlff.data.formats import read_pdb
from openmm_mlff.data.molecules import embed_smiles, read_sdf, require_rdkit
from openmm_mlff.data.structures import Structure

#: endings of files; any other text is a SMILES.
TABLES, MOLECULE_FILES, PDB_FILES = (".csv",), (".sdf", ".mol"), (".pdb", ".cif")


@dataclass(frozen=True)
class Solute:
    """A molecule to put into water.

    Attributes:
        name: a file name. label: what it is called in tables. structures: its start structures (conformers).
        smiles: where known. experiment: measured hydration free energy, kcal/mol, or None.
        problem: why there is nothing to simulate, or empty.
    """

    name: str
    structures: tuple[Structure, ...] = ()
    smiles: str = ""
    experiment: float | None = None
    problem: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)


def file_name(text: str) -> str:
    """Letters, digits and ``_.+-`` of a name; raises `ValueError` if none is left."""
    name = re.sub(r"[^\w.+-]+", "_", text).strip("._")
    if not name:
        raise ValueError(f"name: expected letters or digits, got {text!r}")
    return name


def solute_from_smiles(
    smiles: str, name: str | None = None, conformers: int = 1, seed: int = 1, experiment: float | None = None
) -> Solute:
    """Embedded by rdkit (see `embed_smiles`); what is wrong with the SMILES becomes the solute's `problem`.

    Args:
        name: by default the SMILES itself. conformers: start structures. seed: of the embedding.
    """
    chosen = file_name(smiles if name is None else name)
    molecule = require_rdkit().MolFromSmiles(smiles)
    problem = ""
    structures: tuple[Structure, ...] = ()
    if molecule is not None and "." in smiles:
        parts = require_rdkit().MolToSmiles(molecule).split(".")
        problem = f"molecule: expected one molecule, got {len(parts)} fragments ({', '.join(parts)})"
    else:
        try:
            structures = tuple(embed_smiles(smiles, conformers, seed))
        except ValueError as error:
            problem = str(error)
    return Solute(chosen, structures, smiles, experiment, problem, smiles if name is None else name)


def read_solutes(source: str, conformers: int = 1, seed: int = 1, name: str | None = None) -> list[Solute]:
    """The molecules of a SMILES, of an SDF, MOL, PDB or mmCIF file (with all hydrogens), or of a CSV table.

    Args:
        source: a SMILES or a path. A table has the columns ``name`` and ``smiles``, and may have ``experiment``
            (kcal/mol); others are ignored.
        conformers, seed: of molecules that are embedded; files with coordinates give one start structure each.
        name: of a single molecule.

    Raises `ValueError` for a file or a table that cannot be read, a table without these columns, conformers of a file
    with coordinates, or a name for several molecules; and `FileNotFoundError`.
    """
    path = Path(source)
    ending = path.suffix.lower()
    known = ending in (*TABLES, *MOLECULE_FILES, *PDB_FILES)
    if known and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not known:
        return [solute_from_smiles(source, name, conformers, seed)]
    if ending in TABLES:
        solutes = _read_table(path, conformers, seed)
    else:
        if conformers != 1:
            raise ValueError(f"conformers: expected 1 for {path.name}, which has coordinates, got {conformers}")
        structures = read_sdf(path) if ending in MOLECULE_FILES else read_pdb(path)[:1]
        several = len(structures) > 1
        solutes = [
            Solute(
                file_name(f"{path.stem}-{k + 1}" if several else path.stem),
                (structure,),
                structure.group if ending in MOLECULE_FILES else "",
            )
            for k, structure in enumerate(structures)
        ]
    if name is not None:
        if len(solutes) != 1:
            raise ValueError(f"name: expected none for {len(solutes)} molecules, got {name!r}")
        solutes = [dataclasses.replace(solutes[0], name=file_name(name), label=name)]
    return solutes


def _read_table(path: Path, conformers: int, seed: int) -> list[Solute]:
    solutes = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = [column for column in ("name", "smiles") if column not in (rows.fieldnames or ())]
        if missing:
            found = ", ".join(rows.fieldnames or ()) or "none"
            raise ValueError(f"{path}: expected the columns name and smiles, got {found}")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not (row["name"] or "").strip() or not (row["smiles"] or "").strip():
                raise ValueError(f"{where}: expected a name and a SMILES, got {row['name']!r} and {row['smiles']!r}")
            experiment = _number(row.get("experiment"), where)
            solutes.append(solute_from_smiles(row["smiles"].strip(), row["name"].strip(), conformers, seed, experiment))
    if not solutes:
        raise ValueError(f"{path}: expected at least one molecule, found none")
    return solutes


def _number(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: expected a number (kcal/mol) as experiment, got {text!r}")
    return value
