"""SpookyNets that no published file has, against a second implementation; damaged files."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_spookynet import SpookyNet, SpookyNetConfig, pretrained

POSITIONS = np.array(
    [[0, 0, 0.0], [0.9, 0.1, 0], [-0.8, 1.0, 0.3], [-1.5, 0.2, 0.9], [0.3, -1.2, 0.8], [3.3, 1.9, 0.4]]
)
NUMBERS = np.array([8, 1, 6, 1, 7, 17])
NARROW = np.array([[5.0, 0, 0], [1.0, 4.5, 0], [-0.5, 0.7, 5.2]])
UNEQUAL = {
    "num_residual_electron": 0,
    "num_residual_pre": 1,
    "num_residual_local_x": 2,
    "num_residual_local_s": 0,
    "num_residual_local_p": 1,
    "num_residual_local_d": 2,
    "num_residual_local": 0,
    "num_residual_nonlocal_q": 1,
    "num_residual_nonlocal_k": 2,
    "num_residual_nonlocal_v": 0,
    "num_residual_post": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {"use_d4_dispersion": True},
    "long-range cutoff": {"use_d4_dispersion": True, "lr_cutoff": 3.5},
    "nonlinear embedding": {"use_nonlinear_embedding": True},
    "Cartesian d functions": {"use_irreps": False},
    "shifted softplus": {"activation": "ssp"},
    "no exponential weighting": {"exp_weighting": False},
    "unequal depths": UNEQUAL | {"num_residual_output": 3},
    "no residual blocks": {name: 0 for name in (*UNEQUAL, "num_residual_output")},
    "other widths": {"num_features": 7, "num_basis_functions": 3, "num_modules": 3, "num_random_features": 12},
    "one module": {"num_modules": 1},
    "network alone": {"use_zbl_repulsion": False, "use_electrostatics": False},
    "oldest form": {"use_irreps": False, "use_nonlinear_embedding": True, "activation": "ssp"},
}


@pytest.mark.parametrize("cell", [None, NARROW], ids=["open", "periodic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_against_the_second_implementation(variant: str, cell: np.ndarray | None, plain: ModuleType) -> None:
    options = dict(VARIANTS[variant])
    if cell is not None:
        options.setdefault("lr_cutoff", 5.0)
    saved = plain.random_checkpoint(3, **options)
    model = pretrained.build(saved)
    for charge, multiplicity in ((0, 1), (-2, 4)):
        structure = Structure(NUMBERS, POSITIONS, charge, multiplicity, cell)
        expected = plain.PlainSpookyNet(saved).evaluate(NUMBERS, POSITIONS, charge, multiplicity - 1, cell)
        result = model.evaluate(model.batch(structure))
        assert float(result.energy) == pytest.approx(expected["energy"], abs=1e-10)
        np.testing.assert_allclose(result.charges, expected["charges"], rtol=0, atol=1e-12)
        for name, value in result.terms.items():
            assert float(value) == pytest.approx(expected[name], abs=1e-10), name
            assert abs(expected[name]) > 1e-3, f"{name}: too small to be compared"
        moved = model.evaluator(structure)(POSITIONS, cell)
        assert float(moved.energy) == pytest.approx(expected["energy"], abs=1e-10)


@pytest.mark.parametrize("variant", ["as published", "oldest form", "unequal depths"])
def test_forces_of_variants(variant: str, plain: ModuleType) -> None:
    saved = plain.random_checkpoint(4, **VARIANTS[variant])
    _, forces = pretrained.build(saved).energy_and_forces(Structure(NUMBERS, POSITIONS, 1, 2))
    expected = plain.PlainSpookyNet(saved).forces(NUMBERS, POSITIONS, 1.0, 1.0)
    np.testing.assert_allclose(forces, expected, rtol=0, atol=2e-6)


def test_files_without_the_two_newest_options_mean_the_older_form(plain: ModuleType) -> None:
    saved = plain.random_checkpoint(5, use_irreps=False, use_nonlinear_embedding=True)
    del saved["use_irreps"], saved["use_nonlinear_embedding"]
    config = pretrained.build(saved).config
    assert config.use_nonlinear_embedding and not config.use_irreps


# -- damaged checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_file_is_read_in_its_own_precision(tmp_path: Path, plain: ModuleType) -> None:
    saved = plain.random_checkpoint(6)
    torch.save(saved, tmp_path / "double.pth")
    assert load_potential(tmp_path / "double.pth").dtype == torch.float64
    saved["state_dict"] = {k: t.float() if t.is_floating_point() else t for k, t in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "single.pth")
    model = load_potential(tmp_path / "single.pth", family="spookynet")
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())


def damage(saved: dict[str, Any], how: str) -> None:
    state = saved["state_dict"]
    name = "module.1.local_interaction.resblock_p.linear.weight"
    if how == "lacks a tensor":
        del state[name]
    elif how == "wrong shape":
        state[name] = state[name][:2]
    elif how == "not a tensor":
        state[name] = [1.0, 2.0]
    elif how == "no state":
        del saved["state_dict"]
    elif how == "fewer modules than stored":
        saved["num_modules"] = 1
    elif how == "more modules than stored":
        saved["num_modules"] = 3
    elif how == "other width":
        saved["num_features"] = 5
    elif how == "another basis":
        saved["basis_functions"] = "gaussian"
    elif how == "unknown activation":
        saved["activation"] = "relu"
    elif how == "text for a number":
        saved["num_features"] = "many"
    elif how == "negative cutoff":
        saved["cutoff"] = -1.0
    elif how == "not numbers":
        state[name][0, 0] = math.nan


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lacks a tensor", r"lacks the tensor 'module.1.local_interaction.resblock_p.linear.weight'"),
        ("wrong shape", "modelPath: the checkpoint"),
        ("not a tensor", r"expected tensors .* 'module.1.local_interaction.resblock_p.linear.weight'"),
        ("no state", "expected a dictionary with 'state_dict'"),
        ("fewer modules than stored", r"leave \d+ tensors unused"),
        ("more modules than stored", r"lacks the tensor 'module.2"),
        ("other width", "modelPath: the checkpoint does not fit"),
        ("another basis", "basis_functions: expected 'exp-bernstein', got 'gaussian'"),
        ("unknown activation", "activation: expected 'swish' or 'ssp', got 'relu'"),
        ("text for a number", "modelPath: the checkpoint's options"),
        ("negative cutoff", "cutoff: expected a positive number, got -1.0"),
        ("not numbers", r"'module.1.local_interaction.resblock_p.linear.weight' holds NaN or infinity"),
    ],
)
def test_damaged_checkpoints(how: str, message: str, tmp_path: Path, plain: ModuleType) -> None:
    saved = plain.random_checkpoint(7)
    damage(saved, how)
    torch.save(saved, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=message):
        load_potential(tmp_path / "damaged.pth")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_truncated_checkpoints(fraction: float, tmp_path: Path, plain: ModuleType) -> None:
    torch.save(plain.random_checkpoint(8), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ValueError, match=r"modelPath: cut.pth is not a readable SpookyNet checkpoint"):
        load_potential(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": 0}, "num_features: expected a positive number, got 0"),
        ({"cutoff": -1.0}, "cutoff: expected a positive number, got -1.0"),
        ({"activation": "relu"}, "activation: expected 'swish' or 'ssp', got 'relu'"),
        ({"elements": ()}, "elements: expected atomic numbers 1 to 86"),
        ({"elements": (1, 87)}, "elements: expected atomic numbers 1 to 86"),
        ({"module_keep_prob": 0.0}, "module_keep_prob: expected a probability"),
        ({"long_range_cutoff": 0.0}, "long_range_cutoff: expected a positive length"),
    ],
    ids=str,
)
def test_impossible_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpookyNetConfig(**change)


# -- training mode ---------------------------------------------------------------------------------------------------


def test_modules_are_dropped_in_training_only(plain: ModuleType) -> None:
    saved = plain.random_checkpoint(9, num_modules=3, module_keep_prob=0.25)
    model = pretrained.build(saved)
    batch = model.batch([Structure(NUMBERS, POSITIONS)] * 40)
    evaluated = model(batch).energy
    assert float(evaluated.std()) < 1e-10
    torch.manual_seed(0)
    dropped = model.train()(batch).energy
    values = {round(float(e), 8) for e in dropped}
    # 1, 2 or 3 modules count: kept with probability 1/2 each, one after the other
    assert len(values) == 3 and round(float(evaluated[0]), 8) in values
    kept = (dropped - evaluated[0]).abs() < 1e-8
    assert 1 <= int(kept.sum()) <= 25
    assert float(model.eval()(batch).energy.std()) < 1e-10


def test_our_models_need_no_dispersion_tables() -> None:
    assert "dispersion" not in {name.partition(".")[0] for name in SpookyNet().state_dict()}
