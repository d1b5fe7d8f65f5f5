"""The module that so3krates-torch pickles -> options and tensors by the names of the JAX program it was ported from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from openmm_so3krates.module_pickle import Shell

_OPTIONS = (
    "num_features num_layers num_heads degrees num_radial_basis_fn layer_normalization_1 layer_normalization_2 "
    "residual_mlp_1 residual_mlp_2 use_charge_embed use_spin_embed zbl_repulsion_bool electrostatic_energy_bool "
    "dispersion_energy_bool electrostatic_energy_scale dispersion_energy_scale radial_basis_fn message_normalization "
    "qk_non_linearity input_convention"
)
_RENAMED = {
    "cutoff": "r_max",
    "cutoff_fn": "cutoff_fn_name",
    "activation_fn": "activation_fn_name",
    "energy_activation_fn": "energy_activation_fn_name",
}
_HEADS = {
    "observables_0/energy_dense_regression": "atomic_energy_output_block.layers.0",
    "observables_0/energy_dense_final": "atomic_energy_output_block.final_layer",
    "observables_0/electrostatic_energy/partial_charges/charge_dense_regression_vec": (
        "partial_charges_output_block.transform_inv_features.0"
    ),
    "observables_0/electrostatic_energy/partial_charges/charge_dense_final_vec": (
        "partial_charges_output_block.transform_inv_features.2"
    ),
    "observables_2/hirshfeld_ratios_dense_regression": "hirshfeld_output_block.transform_features.0",
    "observables_2/hirshfeld_ratios_dense_final": "hirshfeld_output_block.transform_features.2",
}
_TABLES = {
    "observables_0/electrostatic_energy/partial_charges/Embed_0/embedding": (
        "partial_charges_output_block.atomic_embedding.weight"
    ),
    "observables_2/Embed_0/embedding": "hirshfeld_output_block.v_shift_embedding.weight",
    "observables_2/Embed_1/embedding": "hirshfeld_output_block.q_embedding.weight",
}


def from_port(module: Shell) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and tensors of a module; raises `ValueError` if it is not a SO3LR model or lacks something."""
    if module.kind != "SO3LR":
        raise ValueError(f"modelPath: expected a pickled SO3LR module, got one called {module.kind!r}")
    about = vars(module)
    try:
        options = {name: about[name] for name in _OPTIONS.split()}
        options |= {name: about[theirs] for name, theirs in _RENAMED.items()}
        data = {"avg_num_neighbors": about["avg_num_neighbors"]}
        if about["initialize_ev_to_zeros"] is not True:
            raise ValueError("modelPath: expected a module whose Euclidean variables start at zero")
        tensors = dict(_tensors(module.tensors(), options))
    except KeyError as error:
        raise ValueError(f"modelPath: the pickled module lacks {error.args[0]!r}") from error
    return {"model": options, "data": data}, tensors


def _tensors(source: dict[str, Tensor], options: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield "feature_embeddings_0/Embed_0/embedding", _by_element(source["inv_feature_embedding.embedding.weight"].T)
    used = [name for name in ("charge", "spin") if options[f"use_{name}_embed"]]
    for k, name in enumerate(used, 1):
        theirs, ours = f"{name}_embedding", f"feature_embeddings_{k}/ChargeSpinEmbedSparse_0"
        yield f"{ours}/Embed_0/embedding", _by_element(source[f"{theirs}.Wq.weight"].T)
        yield f"{ours}/Embed_1/embedding", source[f"{theirs}.Wk"]
        yield f"{ours}/Embed_2/embedding", source[f"{theirs}.Wv"]
        for layer, place in ((0, 1), (1, 3)):
            yield f"{ours}/Residual_0/layers_{layer}/kernel", source[f"{theirs}.mlp.{place}.weight"].T
    for t in range(options["num_layers"]):
        yield from _layer(source, f"layers_{t}", f"euclidean_transformers.{t}", options)
    for ours, theirs in _HEADS.items():
        yield from _dense(source, ours, theirs)
    for ours, theirs in _TABLES.items():
        yield ours, source[theirs]
    energy = "atomic_energy_output_block"
    yield "observables_0/atomic_scales", _by_element(source[f"{energy}.energy_scales.weight"][0])
    shifts = source[f"{energy}.energy_shifts"]
    # the same number for every element is an origin of energies, which the JAX program does not add
    yield (
        "observables_0/energy_offset",
        _by_element(shifts - shifts[0] if bool((shifts == shifts[0]).all()) else shifts),
    )
    if options["zbl_repulsion_bool"]:
        for name in ("a1", "a2", "a3", "a4", "c1", "c2", "c3", "c4", "p", "d"):
            yield f"observables_0/zbl_repulsion/{name}", source[f"zbl_repulsion.{name}_raw"]


def _layer(source: dict[str, Tensor], ours: str, theirs: str, options: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    block = f"{ours}/attention_block"
    for f, kind in ((1, "inv"), (2, "ev")):
        for name, net in (("radial", "rbf"), ("spherical", "ev")):
            parts = f"{theirs}.filter_net_{kind}.mlp_{net}"
            yield from _dense(source, f"{block}/{name}_filter{f}_layer_1", f"{parts}.0")
            yield from _dense(source, f"{block}/{name}_filter{f}_layer_2", f"{parts}.mlp_{net}_layer_1.0")
        for letter in ("q", "k", "v") if f == 1 else ("q", "k"):
            # (head, in, out) there
            weight = source[f"{theirs}.euclidean_attention_block.W_{letter}_{kind}"]
            yield f"{block}/W{letter}{f}", weight.transpose(-1, -2)
    yield from _dense(source, f"{ours}/exchange_block/mlp_layer_2", f"{theirs}.interaction_block.linear_layer")
    for k in (1, 2):
        if options[f"layer_normalization_{k}"]:
            for name, their_name in (("scale", "weight"), ("bias", "bias")):
                yield f"{ours}/layer_normalization_{k}/{name}", source[f"{theirs}.layer_norm_inv_{k}.{their_name}"]
        if options[f"residual_mlp_{k}"]:
            for layer, place in ((1, 1), (2, 3)):
                yield from _dense(source, f"{ours}/res_mlp_{k}_layer_{layer}", f"{theirs}.mlp_{k}.{place}")


def _dense(source: dict[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}/kernel", source[f"{theirs}.weight"].T
    yield f"{ours}/bias", source[f"{theirs}.bias"]


def _by_element(rows: Tensor) -> Tensor:
    """Their tables start at hydrogen, those of the JAX program at atomic number 0."""
    return torch.cat([rows.new_zeros(1, *rows.shape[1:]), rows])
