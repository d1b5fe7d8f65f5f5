"""Model files of every released format load and give the energies that they gave on the day they were made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import families, load_potential

FILES = sorted(Path(__file__).parent.glob("*.safetensors"))


def test_every_family_and_format_has_a_file() -> None:
    released = {
        f"{family.name}-v{version}" for family in families() for version in range(1, model_file.FORMAT_VERSION + 1)
    }
    assert released <= {path.stem for path in FILES}, "make the missing file with make.py, before the release"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_same_energy_for_ever(path: Path) -> None:
    stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    model_file.verify(path, stored["sha256"])
    model = load_potential(path)
    assert model.dtype == torch.float64
    for s in stored["structures"]:
        structure = Structure(s["numbers"], s["positions"], s["charge"], s["multiplicity"])
        energy, forces = model.energy_and_forces(structure)
        assert energy == pytest.approx(s["energy"], abs=1e-10)
        np.testing.assert_allclose(forces, s["forces"], rtol=0, atol=1e-9)
