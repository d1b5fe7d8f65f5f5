"""Where SO3LR's weights are found, how their files are read, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openmm_mlff.cli import main
from openmm_mlff.cli.models import _place
from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.mlpotential import MLFFPotentialImpl
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_so3krates import SO3krates, SO3kratesConfig, family, pretrained
from openmm_so3krates.module_pickle import read_module

SMALL = {"num_features": 8, "num_layers": 2, "num_heads": 2, "num_basis_functions": 6, "degrees": (1, 2)}
MOLECULE = Structure(
    np.array([8, 6, 1, 1, 7, 17]),
    np.array([[0, 0, 0.0], [1.2, 0.1, 0], [-0.8, 0.5, 0.3], [1.5, 1.1, 0.2], [1.8, -1.2, 0.4], [3.9, 1.0, -0.4]]),
    charge=-1,
)
ELEMENTS = list(SO3kratesConfig().elements)


def random_model(seed: int = 0, **options: Any) -> SO3krates:
    """As the readers make it: tables are zero for other elements."""
    torch.manual_seed(seed)
    model = SO3krates(SO3kratesConfig(**{**SMALL, "multiplicities": (1,), **options})).eval().requires_grad_(False)
    others = [z for z in range(119) if z not in ELEMENTS]
    for name, parameter in model.named_parameters():
        if "raw" not in name:
            parameter += 0.2 * torch.randn_like(parameter)
        if parameter.dim() and len(parameter) == 119:
            parameter[others] = 0.0
    return model


def options_of(model: SO3krates) -> dict[str, Any]:
    """The published program's names for the hyperparameters."""
    c = model.config
    about = {
        "num_features": c.num_features,
        "num_layers": c.num_layers,
        "num_heads": c.num_heads,
        "degrees": list(c.degrees),
        "cutoff": c.cutoff,
        "num_radial_basis_fn": c.num_basis_functions,
        "radial_basis_fn": "bernstein",
        "cutoff_fn": "phys",
        "message_normalization": "avg_num_neighbors",
        "layer_normalization_1": c.layer_normalization_1,
        "layer_normalization_2": c.layer_normalization_2,
        "residual_mlp_1": c.residual_mlp_1,
        "residual_mlp_2": c.residual_mlp_2,
        "use_charge_embed": c.use_charge_embed,
        "use_spin_embed": c.use_spin_embed,
        "zbl_repulsion_bool": c.use_zbl_repulsion,
        "electrostatic_energy_bool": c.use_electrostatics,
        "dispersion_energy_bool": c.use_dispersion,
        "electrostatic_energy_scale": c.electrostatic_sigma,
        "dispersion_energy_scale": c.dispersion_scale,
        "activation_fn": "silu",
        "energy_activation_fn": "silu",
        "qk_non_linearity": "identity",
        "input_convention": "positions",
    }
    return {"model": about, "data": {"avg_num_neighbors": c.avg_num_neighbors}}


# -- files of the JAX program ------------------------------------------------------------------------------------


def jax_arrays(model: SO3krates) -> dict[str, np.ndarray]:
    """Tensors by the names of the JAX program: kernels (in, out), tables of 119 or 100 elements."""
    w = {k: v.numpy() for k, v in model.state_dict().items()}
    out: dict[str, np.ndarray] = {"feature_embeddings_0/Embed_0/embedding": w["element_embedding"]}

    def dense(theirs: str, ours: str) -> None:
        out[f"{theirs}/kernel"] = w[f"{ours}.weight"].T
        if f"{ours}.bias" in w:
            out[f"{theirs}/bias"] = w[f"{ours}.bias"]

    for k, name in ((1, "charge_embedding"), (2, "spin_embedding")):
        module = f"feature_embeddings_{k}/ChargeSpinEmbedSparse_0"
        for i, part in enumerate(("queries", "keys", "values")):
            out[f"{module}/Embed_{i}/embedding"] = w[f"{name}.{part}"]
        dense(f"{module}/Residual_0/layers_0", f"{name}.residual.first")
        dense(f"{module}/Residual_0/layers_1", f"{name}.residual.second")
    for t in range(model.config.num_layers):
        block = f"layers_{t}/attention_block"
        for f, kind in ((1, "features"), (2, "euclidean")):
            for net in ("radial", "spherical"):
                dense(f"{block}/{net}_filter{f}_layer_1", f"layers.{t}.attention.filter_{kind}.{net}.first")
                dense(f"{block}/{net}_filter{f}_layer_2", f"layers.{t}.attention.filter_{kind}.{net}.second")
            out[f"{block}/Wq{f}"] = w[f"layers.{t}.attention.attention_{kind}.query"]
            out[f"{block}/Wk{f}"] = w[f"layers.{t}.attention.attention_{kind}.key"]
        out[f"{block}/Wv1"] = w[f"layers.{t}.attention.value"]
        dense(f"layers_{t}/exchange_block/mlp_layer_2", f"layers.{t}.exchange.linear")
        dense(f"layers_{t}/res_mlp_1_layer_1", f"layers.{t}.mlp_1.first")
        dense(f"layers_{t}/res_mlp_1_layer_2", f"layers.{t}.mlp_1.second")
        for k in (1, 2):
            for name in ("scale", "bias"):
                out[f"layers_{t}/layer_normalization_{k}/{name}"] = w[f"layers.{t}.norm_{k}.{name}"]
    charges = "observables_0/electrostatic_energy/partial_charges"
    for theirs, ours in (
        ("observables_0/energy_dense_regression", "energy_hidden"),
        ("observables_0/energy_dense_final", "energy_out"),
        (f"{charges}/charge_dense_regression_vec", "charge_head.first"),
        (f"{charges}/charge_dense_final_vec", "charge_head.second"),
        ("observables_2/hirshfeld_ratios_dense_regression", "hirshfeld_head.first"),
        ("observables_2/hirshfeld_ratios_dense_final", "hirshfeld_head.second"),
    ):
        dense(theirs, ours)
    out["observables_0/atomic_scales"], out["observables_0/energy_offset"] = w["energy_scale"], w["energy_offset"]
    out[f"{charges}/Embed_0/embedding"] = w["charge_bias"][:100, None]
    out["observables_2/Embed_0/embedding"] = w["hirshfeld_shift"][:100, None]
    out["observables_2/Embed_1/embedding"] = w["hirshfeld_query"][:100]
    for k in range(4):
        out[f"observables_0/zbl_repulsion/a{k + 1}"] = w["repulsion.exponents_raw"][k : k + 1]
        out[f"observables_0/zbl_repulsion/c{k + 1}"] = w["repulsion.weights_raw"][k : k + 1]
    out["observables_0/zbl_repulsion/p"] = w["repulsion.power_raw"].reshape(1)
    out["observables_0/zbl_repulsion/d"] = w["repulsion.scale_raw"].reshape(1)
    return out


def write_jax(model: SO3krates, folder: Path, options: dict[str, Any] | None = None, **arrays: Any) -> Path:
    path = folder / "small_params.npz"
    np.savez(path, **{**jax_arrays(model), **arrays})
    (folder / "small_hyperparameters.json").write_text(json.dumps(options or options_of(model)), encoding="utf-8")
    return path


# -- files of so3krates-torch --------------------------------------------------------------------------------------


def write_port(model: SO3krates, path: Path, shift: float = -163.6, **attributes: Any) -> Path:
    """A pickled module with that program's class names, parameter names and settings, by `torch.save`."""
    names = ("so3krates_torch", "so3krates_torch.modules", "so3krates_torch.modules.models", "so3krates_torch.blocks")
    modules = {name: ModuleType(name) for name in names}
    kinds: dict[str, type[nn.Module]] = {}
    for kind, where in (("SO3LR", names[2]), ("Block", names[3])):
        kinds[kind] = type(kind, (nn.Module,), {"__module__": where, "__qualname__": kind})
        setattr(modules[where], kind, kinds[kind])
    root = kinds["SO3LR"]()
    for name, tensor in port_tensors(model, shift).items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, kinds["Block"]())
            node = node._modules[parent]
        node.register_parameter(leaf, nn.Parameter(tensor.clone()))
    root.register_buffer("order", torch.arange(4))
    about = options_of(model)
    settings = about["model"] | about["data"] | {"initialize_ev_to_zeros": True, "dtype": torch.float32}
    for ours, theirs in (("cutoff", "r_max"), ("cutoff_fn", "cutoff_fn_name")):
        settings[theirs] = settings.pop(ours)
    for name in ("activation_fn", "energy_activation_fn"):
        settings[f"{name}_name"] = settings.pop(name)
    for name, value in {**settings, **attributes}.items():
        setattr(root, name, value)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        torch.save(root, path)
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return path


def port_tensors(model: SO3krates, shift: float) -> dict[str, torch.Tensor]:
    """Weights (out, in), attention matrices (head, in, out), tables from hydrogen on, one column per element."""
    w = model.state_dict()
    out = {"inv_feature_embedding.embedding.weight": w["element_embedding"][1:].T}

    def dense(theirs: str, ours: str) -> None:
        out.update({f"{theirs}.{p}": w[f"{ours}.{p}"] for p in ("weight", "bias") if f"{ours}.{p}" in w})

    for name in ("charge_embedding", "spin_embedding"):
        out[f"{name}.Wq.weight"] = w[f"{name}.queries"][1:].T
        out[f"{name}.Wk"], out[f"{name}.Wv"] = w[f"{name}.keys"], w[f"{name}.values"]
        dense(f"{name}.mlp.1", f"{name}.residual.first")
        dense(f"{name}.mlp.3", f"{name}.residual.second")
    for t in range(model.config.num_layers):
        theirs, ours = f"euclidean_transformers.{t}", f"layers.{t}"
        for kind, our_kind in (("inv", "features"), ("ev", "euclidean")):
            for net, our_net in (("rbf", "radial"), ("ev", "spherical")):
                there, here = f"{theirs}.filter_net_{kind}.mlp_{net}", f"{ours}.attention.filter_{our_kind}.{our_net}"
                dense(f"{there}.0", f"{here}.first")
                dense(f"{there}.mlp_{net}_layer_1.0", f"{here}.second")
            for letter, part in (("q", "query"), ("k", "key")):
                weight = w[f"{ours}.attention.attention_{our_kind}.{part}"]
                out[f"{theirs}.euclidean_attention_block.W_{letter}_{kind}"] = weight.transpose(1, 2)
        out[f"{theirs}.euclidean_attention_block.W_v_inv"] = w[f"{ours}.attention.value"].transpose(1, 2)
        dense(f"{theirs}.interaction_block.linear_layer", f"{ours}.exchange.linear")
        dense(f"{theirs}.mlp_1.1", f"{ours}.mlp_1.first")
        dense(f"{theirs}.mlp_1.3", f"{ours}.mlp_1.second")
        for k in (1, 2):
            out[f"{theirs}.layer_norm_inv_{k}.weight"] = w[f"{ours}.norm_{k}.scale"]
            out[f"{theirs}.layer_norm_inv_{k}.bias"] = w[f"{ours}.norm_{k}.bias"]
    for there, here in (
        ("atomic_energy_output_block.layers.0", "energy_hidden"),
        ("atomic_energy_output_block.final_layer", "energy_out"),
        ("partial_charges_output_block.transform_inv_features.0", "charge_head.first"),
        ("partial_charges_output_block.transform_inv_features.2", "charge_head.second"),
        ("hirshfeld_output_block.transform_features.0", "hirshfeld_head.first"),
        ("hirshfeld_output_block.transform_features.2", "hirshfeld_head.second"),
    ):
        dense(there, here)
    out["atomic_energy_output_block.energy_scales.weight"] = w["energy_scale"][None, 1:]
    out["atomic_energy_output_block.energy_shifts"] = torch.full((118,), shift)
    out["partial_charges_output_block.atomic_embedding.weight"] = w["charge_bias"][:100, None]
    out["hirshfeld_output_block.v_shift_embedding.weight"] = w["hirshfeld_shift"][:100, None]
    out["hirshfeld_output_block.q_embedding.weight"] = w["hirshfeld_query"][:100]
    for k in range(4):
        out[f"zbl_repulsion.a{k + 1}_raw"] = w["repulsion.exponents_raw"][k : k + 1]
        out[f"zbl_repulsion.c{k + 1}_raw"] = w["repulsion.weights_raw"][k : k + 1]
    out["zbl_repulsion.p_raw"], out["zbl_repulsion.d_raw"] = (w[f"repulsion.{n}_raw"][None] for n in ("power", "scale"))
    return out


# -- both are read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_jax, write_port], ids=["arrays", "pickled module"])
def test_both_kinds_of_file_give_the_model_that_was_written(write: Callable[..., Path], tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.energy_offset.zero_()  # the port adds the same constant to every atom instead
    path = write(model, tmp_path if write is write_jax else tmp_path / "small.model")
    read = load_potential(path)
    assert isinstance(read, SO3krates) and read.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    expected, actual = (m.double().energy_and_forces(MOLECULE) for m in (model, read))
    assert actual[0] == expected[0] and abs(expected[0]) > 1.0


def test_the_file_in_the_package_is_the_published_model(so3lr_parameters: Path) -> None:
    path = pretrained.in_package()
    if path is None:
        pytest.skip("so3krates-torch is not installed (pip install 'openmm-mlff[so3lr]')")
    assert model_file.sha256_of(path) == pretrained.SO3LR.sha256
    model, other = pretrained.read(path), pretrained.read(so3lr_parameters)
    assert pretrained.is_so3lr(model)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_published_parameters_are_recognised_whatever_the_file(so3lr_parameters: Path, tmp_path: Path) -> None:
    model = pretrained.read(so3lr_parameters)
    ours = save_potential(model, tmp_path / "so3lr.safetensors")
    port = write_port(model, tmp_path / "so3lr.model")
    for path in (ours, port):
        assert pretrained.is_so3lr(load_potential(path))
    assert pretrained.is_so3lr(model.double())
    with torch.no_grad():
        model.energy_scale[6] *= 1.0 + 1e-6
    assert not pretrained.is_so3lr(model)
    assert not pretrained.is_so3lr(random_model())


# -- MLPotential('so3lr') and where it looks --------------------------------------------------------------------------


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    return model_file.cache_dir()


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, model: SO3krates) -> Path:
    """A package so3krates_torch that must not be imported, with weights inside."""
    monkeypatch.undo()
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(folder / "cache"))
    package = folder / "site" / "so3krates_torch"
    (package / "pretrained" / "so3lr").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    return write_port(model, package / "pretrained" / "so3lr" / "so3lr.model")


def test_nothing_found_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        MLFFPotentialImpl("so3lr", family, {})
    for word in ("pip install 'openmm-mlff[so3lr]'", "openmm-mlff models fetch so3lr", pretrained.SO3LR.url):
        assert word in str(caught.value)


def test_weights_of_the_installed_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, so3lr_parameters: Path
) -> None:
    path = installed(tmp_path, monkeypatch, pretrained.read(so3lr_parameters))
    assert MLFFPotentialImpl("so3lr", family, {})._path == str(path)
    assert "so3krates_torch" not in sys.modules


def test_another_model_in_the_installed_package_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, random_model())
    with pytest.raises(ValueError, match=r"so3lr.model holds another model than 'so3lr'"):
        MLFFPotentialImpl("so3lr", family, {})


def test_the_cache_comes_before_the_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, so3lr_parameters: Path
) -> None:
    path = installed(tmp_path, monkeypatch, pretrained.read(so3lr_parameters))
    published = dataclasses.replace(pretrained.SO3LR, sha256=model_file.remember(path))
    impl = MLFFPotentialImpl("so3lr", dataclasses.replace(family, published=(published,)), {})
    assert Path(impl._path or "").parent == cache


def test_a_named_file_comes_first(cache: Path, so3lr_parameters: Path, tmp_path: Path) -> None:
    impl = MLFFPotentialImpl("so3lr", family, {"modelPath": so3lr_parameters})
    # two files became one, so that a System XML finds the model by one checksum
    assert model_file.find(impl._sha256).suffix == ".safetensors"
    assert pretrained.is_so3lr(load_potential(model_file.find(impl._sha256)))
    other = write_jax(random_model(), tmp_path)
    with pytest.raises(
        ValueError, match=r"small_params.npz holds another model than 'so3lr'.*MLPotential\('so3krates'"
    ):
        MLFFPotentialImpl("so3lr", family, {"modelPath": other})
    assert MLFFPotentialImpl("so3krates", family, {"modelPath": other})._sha256
    with pytest.raises(ValueError, match="'so3krates' needs a model file, got None; ready-made models: 'so3lr'"):
        MLFFPotentialImpl("so3krates", family, {})


def test_the_command_says_where_it_is(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    so3lr_parameters: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["models"]) == 0
    assert "so3lr" in capsys.readouterr().out
    assert _place(pretrained.SO3LR) == "pip install 'openmm-mlff[so3lr]', or openmm-mlff models fetch so3lr"
    assert main(["models", "verify", "so3lr"]) == 1
    assert "so3lr: not here" in capsys.readouterr().out
    path = installed(tmp_path, monkeypatch, pretrained.read(so3lr_parameters))
    assert _place(pretrained.SO3LR) == str(path)
    assert main(["models", "verify", "so3lr"]) == 0
    assert "so3lr: sound, so3krates, 8 elements" in capsys.readouterr().out


def test_another_model_is_not_sound(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, monkeypatch, random_model())
    assert main(["models", "verify", "so3lr"]) == 1
    assert "so3lr: NOT SOUND" in capsys.readouterr().out


# -- what is refused ------------------------------------------------------------------------------------------------


def test_parameters_without_hyperparameters(tmp_path: Path) -> None:
    path = write_jax(random_model(), tmp_path)
    (tmp_path / "small_hyperparameters.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected NAME_params.npz with NAME_hyperparameters.json beside it"):
        load_potential(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radial_basis_fn": "gaussian"}, "radial_basis_fn: expected one of bernstein, got 'gaussian'"),
        ({"activation_fn": "relu"}, "activation_fn: expected 'silu', got 'relu'"),
        ({"num_heads": 3}, "num_heads: expected 3 to divide num_features"),
        ({"num_layers": 1}, "the hyperparameters leave .* tensors unused, among them 'layers_1/"),
        ({"num_layers": 3}, "the file lacks the tensor 'layers_2/"),
        ({"num_radial_basis_fn": 9}, "the parameters do not fit the hyperparameters"),
        ({"degrees": [1, 2, 3, 4]}, "the parameters do not fit the hyperparameters"),
        ({"residual_mlp_2": True}, "the file lacks the tensor 'layers_0/res_mlp_2"),
        ({"zbl_repulsion_bool": False}, "the hyperparameters leave 10 tensors unused"),
    ],
)
def test_hyperparameters_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = random_model()
    options = options_of(model)
    options["model"] |= change
    with pytest.raises(ValueError, match=message):
        load_potential(write_jax(model, tmp_path, options))


@pytest.mark.parametrize("options", [{"model": {}}, {"model": [], "data": {}}, [], {"data": {}}])
def test_hyperparameters_of_something_else(options: Any, tmp_path: Path) -> None:
    path = write_jax(random_model(), tmp_path)
    (tmp_path / "small_hyperparameters.json").write_text(json.dumps(options), encoding="utf-8")
    with pytest.raises(ValueError, match="the hyperparameters are not those of a SO3krates model"):
        load_potential(path)


def test_damaged_arrays(tmp_path: Path) -> None:
    model = random_model()
    path = write_jax(model, tmp_path, **{"observables_0/energy_offset": np.full(119, np.nan, dtype=np.float32)})
    with pytest.raises(ValueError, match="'observables_0/energy_offset' holds NaN"):
        load_potential(path)
    path = write_jax(model, tmp_path, **{"observables_0/energy_offset": np.zeros(12, dtype=np.float32)})
    with pytest.raises(ValueError, match="'observables_0/energy_offset' ends before element 17"):
        load_potential(path)
    path = write_jax(model, tmp_path, **{"observables_0/energy_offset": np.array(["text"] * 119)})
    with pytest.raises(ValueError, match=r"small_params.npz"):
        load_potential(path)
    whole = write_jax(model, tmp_path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"small_params\.npz"):
        load_potential(path, "so3krates")


class Calls:
    """What a hostile file would do."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(path: Path, content: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        for name, data in records.items():
            archive.writestr(f"x/data/{name}", data)
    return path


@pytest.mark.parametrize(
    "function", [(eval, "1/0"), (exec, "raise SystemError"), (print, "hello"), (torch.load, "x"), (getattr, 1, "real")]
)
def test_nothing_in_a_pickled_module_is_called(
    function: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hostile(tmp_path / "x.model", pickle.dumps(Calls(*function), protocol=2))
    with pytest.raises(ValueError, match="which is not on the list of what may be read"):
        load_potential(path)
    assert capsys.readouterr().out == ""


def test_classes_in_a_pickled_module_stay_shells(tmp_path: Path) -> None:
    """Even the real ones of torch: no constructor runs."""
    path = hostile(tmp_path / "x.model", b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.")
    shell = read_module(path)
    assert shell.kind == "Linear" and not isinstance(shell, nn.Module)
    with pytest.raises(ValueError, match="expected a pickled SO3LR module, got one called 'Linear'"):
        load_potential(path)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    ("size", "data"),
    [(b"K\x09\x85", bytes(16)), (b"K\x04\x85", bytes(12))],
    ids=["beyond the storage", "short storage"],
)
def test_tensors_stay_within_their_storage(size: bytes, data: bytes, tmp_path: Path) -> None:
    content = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + size + b"K\x01\x85\x89NtR."
    path = hostile(tmp_path / "x.model", content, **{"0": data})
    with pytest.raises(ValueError, match=r"x\.model is damaged or not a pickled PyTorch module"):
        load_potential(path)


def test_other_things_are_not_pickled_modules(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    torch.save(random_model().state_dict(), path)
    with pytest.raises(ValueError, match=r"x\.model holds a OrderedDict, expected a PyTorch module"):
        load_potential(path)
    for content in (b"", b"no zip", pickle.dumps([1, 2])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.model is damaged or not a pickled PyTorch module"):
            load_potential(path)


def test_damaged_pickled_modules_are_refused_or_the_same(tmp_path: Path) -> None:
    """Bytes changed at random: an error that says so, or a model whose numbers differ; never anything else."""
    path = write_port(random_model(), tmp_path / "small.model")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        content = bytearray(records[name])
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for record, data in records.items():
                archive.writestr(record, bytes(content) if record == name else data)
        path.write_bytes(buffer.getvalue())
        try:
            assert isinstance(load_potential(path), SO3krates)
        except ValueError as error:
            refused += 1
            assert "modelPath" in str(error) or "expected" in str(error)
    assert refused > 30


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"initialize_ev_to_zeros": False}, "whose Euclidean variables start at zero"),
        ({"num_layers": 5}, "the pickled module lacks 'euclidean_transformers.2"),
        ({"qk_non_linearity": "silu"}, "qk_non_linearity: expected 'identity', got 'silu'"),
        ({"avg_num_neighbors": "many"}, "the hyperparameters are not those of a SO3krates model"),
    ],
)
def test_pickled_modules_of_other_kinds(attributes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_port(random_model(), tmp_path / "small.model", **attributes)
    with pytest.raises(ValueError, match=message):
        load_potential(path)


def test_a_converted_file_keeps_its_numbers(so3lr_parameters: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    copy.mkdir()
    for name in ("so3lr_params.npz", "so3lr_hyperparameters.json"):
        shutil.copy(so3lr_parameters.with_name(name), copy / name)
    target = tmp_path / "so3lr.safetensors"
    assert main(["convert", str(copy / "so3lr_params.npz"), str(target)]) == 0
    assert pretrained.is_so3lr(load_potential(target))
    card = model_file.load_card(target)
    assert card["name"] == "so3lr" and card["licence"] == "MIT" and "same composition" in card["domain"]
