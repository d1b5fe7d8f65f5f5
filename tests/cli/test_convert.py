"""``openmm-mlff convert``: the published checkpoint as a model file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_mlff import cli
from openmm_mlff.cli import convert
from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import family as families
from openmm_mlff.potentials.family import load_potential


def test_the_published_checkpoint(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = shared / "models" / "spookynet_parameters.pth", tmp_path / "published.safetensors"
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert "86 elements" in capsys.readouterr().out
    card = model_file.load_card(target)
    assert card["licence"] == "MIT" and "s41467-021-27504-0" in card["citation"]
    assert card["source"]["sha256"] == model_file.sha256_of(source)
    # machine paths stay out of the card
    assert str(shared) not in json.dumps(card)
    water = Structure([8, 1, 1], np.array([[0, 0, 0.1], [0, 0.76, -0.48], [0, -0.76, -0.48]]), charge=1, multiplicity=2)
    energies = []
    for path in (source, target):
        model = load_potential(path)
        energies.append(float(model.evaluate(model.batch(water), forces=False).energy))
    assert energies[0] == energies[1]
    assert cli.main(["convert", str(source), str(target)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_copy_that_differs_is_not_kept(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = families.save_potential

    def damaged(model: torch.nn.Module, path: Path, **details: object) -> Path:
        with torch.no_grad():
            next(p for p in model.parameters() if p.dim() == 2)[8] += 1e-3
        return save(model, path, **details)  # type: ignore[arg-type]

    model = load_potential(shared / "models" / "spookynet_parameters.pth")
    reference = load_potential(shared / "models" / "spookynet_parameters.pth")
    assert convert.largest_difference(model, reference) == 0.0
    damaged(model, tmp_path / "damaged.safetensors")
    assert convert.largest_difference(model, reference) > convert.TOLERANCE

    def load(path: Path, family: str | None = None) -> torch.nn.Module:
        return model if "unverified" in str(path) else reference

    monkeypatch.setattr(families, "load_potential", load)
    target = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(shared / "models" / "spookynet_parameters.pth"), str(target)]) == 1
    assert "differs from the source by" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.safetensors"]


def test_probes_cover_every_element(shared: Path) -> None:
    model = load_potential(shared / "models" / "spookynet_parameters.pth")
    found = convert.probes(model)
    assert {int(z) for s in found for z in s.numbers} == set(model.elements)
    assert {s.multiplicity for s in found} == {1, 3} and {s.charge for s in found} >= {0, -2}


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "nothing.pth", str(tmp_path / "x.safetensors")]) == 1
    assert "source: no file at nothing.pth" in capsys.readouterr().err
    assert cli.main(["convert", "nothing.pth", str(tmp_path / "x.pth")]) == 1
    assert "target: expected a name that ends in .safetensors" in capsys.readouterr().err
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    assert cli.main(["convert", str(tmp_path / "bad.pth"), str(tmp_path / "x.safetensors")]) == 1
    assert "bad.pth" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth"]
