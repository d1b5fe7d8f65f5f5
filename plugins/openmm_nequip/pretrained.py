"""ReSolv's published networks: where they are, whose they are, and how their files are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.potentials.family import PublishedModel
from openmm_mlff.units import EV_PER_KCAL_PER_MOL
from openmm_nequip.angular import allowed_paths, degree_of, plans
from openmm_nequip.array_pickle import read_arrays
from openmm_nequip.config import NequIPConfig
from openmm_nequip.model import NequIP

CITATION = "Roecken, Burnet, Zavadlav, J. Chem. Phys. 161, 234101 (2024), doi:10.1063/5.0235189"
#: eV, eV, kJ/mol per eV, kcal per kJ: the published program computes (E * SCALE + MEAN) * TO_KJ * TO_KCAL with these
SCALE, MEAN, TO_KJ, TO_KCAL = np.array(
    [1.3413871350479776, -8705.874526590613, 96.4869, 0.239001], dtype=np.float32
).tolist()
#: bytes at the start of a file in which the first names must be
_HEAD = 1 << 20
_LABEL = re.compile(r"(?P<group>.+)/w\[(?P<numbers>[\d,]+)\] (?P<irreps>[\dxoe,]+)")
_FOLDER = "https://media.githubusercontent.com/media/tummfm/ReSolv/1d85bcc065003e083d2e95ab7091cb1762eeb1bf/"
_DOMAIN = "small neutral molecules of C H N O S Cl; only differences of energies at the same composition mean anything"

PUBLISHED = (
    PublishedModel(
        name="resolv-vacuum-published",
        family="nequip-jaxmd",
        url=_FOLDER
        + "examples/FreeEnergyScripts/savedTrainers/261023_QM7x_Nequip_Nequip_QM7x_All_8epochs_iL5emin3_lrdecay1emin3_"
        "scaledTargets_LargeTrainingSet_Cutoff4A_mlp4_ShiftFalse_ScaleFalse_EnergiesAndForces.pkl",
        sha256="83618b7b4f6680e80936f68e5e2d02f9c6ff1c62750333ca28fc5733286347c4",
        licence="Apache-2.0",
        citation=CITATION,
        domain=f"in vacuum, like PBE0+MBD (QM7-X): {_DOMAIN}",
    ),
    PublishedModel(
        name="resolv-water-published",
        family="nequip-jaxmd",
        url=_FOLDER
        + quote("examples/FreeEnergyScripts/QM7x Scripts/TrainFreeEnergy/checkpoints/")
        + "080524_t_prod_250ps_t_equil_50ps_iL1e-06_lrd0.1_epochs500_seed7_train_389mem_0.97_epoch499.pkl",
        sha256="56a72b33e7aa3b26e06f7792924f2630a62f1d0a776f2843f5871195e88e3e13",
        licence="Apache-2.0",
        citation=CITATION,
        domain=f"in implicit water at 298.15 K: {_DOMAIN}",
    ),
)


def recognises(path: Path) -> bool:
    """Whether a file can hold parameters of the published program (by its ending and the names in its beginning)."""
    if path.suffix != ".pkl":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return b"BesselEmbedding_0" in head or b"NequIPConvolution_0" in head


def read(path: Path) -> NequIP:
    """Read parameters of a ReSolv network, for the six elements of its training, in the precision of the file.

    Args:
        path: pickle of the flax dictionary ``{"params": ...}`` of jax arrays; read through an allow-list.

    Raises `ValueError` if the file is damaged or is something else.
    """
    arrays = {name.removeprefix("params/"): x for name, x in read_arrays(path).items()}
    kcal = TO_KJ * TO_KCAL * EV_PER_KCAL_PER_MOL
    try:
        config = config_of(arrays, energy_scale=SCALE * kcal, energy_shift=MEAN * kcal)
        length = config.one_hot_length
        rows = [z for z in config.elements if z < length]
        if len(rows) < len(config.elements):
            raise ValueError(f"one-hot vectors of length {length} have no place for the elements {config.elements}")
        return build(config, translate(arrays, config, rows))
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"modelPath: {path.name} does not hold a network of ReSolv ({reason})") from error


def build(config: NequIPConfig, tensors: Mapping[str, Tensor]) -> NequIP:
    """The model with these tensors, in their precision; raises `RuntimeError` if they do not fit."""
    model = NequIP(config).to(tensors["element_embedding"].dtype)
    model.load_state_dict(dict(tensors), strict=True)
    return model.eval().requires_grad_(False)


def config_of(arrays: Mapping[str, np.ndarray], **settings: Any) -> NequIPConfig:
    """Hyperparameters that the arrays of the published program (names with '/') show; `settings` go beside them.

    Raises `KeyError` for a missing array, and `ValueError` if the arrays are not those of a NequIP network.
    """
    layers = {int(m[1]) for name in arrays if (m := re.match(r"NequIPConvolution_(\d+)/", name))}
    dense = [name for name in arrays if name.startswith("NequIPConvolution_0/MLP_0/Dense_")]
    embeddings = [name for name in arrays if name.startswith("Linear_0/")]
    if not layers or not dense or len(embeddings) != 1:
        raise ValueError("expected one embedding Linear_0 and arrays of NequIPConvolution_0/MLP_0")
    length = re.search(r"(\d+)x0e,", embeddings[0])
    first = arrays["NequIPConvolution_0/MLP_0/Dense_0/kernel"]
    values: dict[str, Any] = {
        "num_features": arrays[embeddings[0]].shape[1],
        "num_layers": len(layers),
        "num_basis_functions": len(arrays["BesselEmbedding_0/frequencies"]),
        "radial_layers": len(dense) - 1,
        "radial_features": first.shape[1] if len(dense) > 1 else NequIPConfig.radial_features,
        "one_hot_length": int(length[1]) if length else 0,
    }
    return NequIPConfig(**values | settings)


def translate(arrays: Mapping[str, np.ndarray], config: NequIPConfig, rows: list[int]) -> dict[str, Tensor]:
    """Arrays of the published program -> tensors of `NequIP`.

    What the energy does not depend on (see `angular.plans`) is left out. In the files the scalars of a convolution and
    those of the gates are one after the other, the gates in the order of `config.irreps`.

    Args:
        arrays: by their names in the file, joined with '/'.
        rows: which rows of the element axes belong to `config.elements`.

    Raises `KeyError` for a missing array, and `ValueError` for one of another kind or shape, or with NaN in it.
    """
    source = _Source(arrays)
    features, everything = config.num_features, len(allowed_paths(config))
    out = {
        "element_embedding": source.linear("Linear_0")["0e"][0][rows],
        "radial_basis.frequencies": source.take("BesselEmbedding_0/frequencies"),
        "energy_hidden": source.linear("Linear_1")["0e"][0],
        "energy_out": source.linear("Linear_2")["0e"][0],
        "atomic_shift": np.zeros(len(rows)),
    }
    # of the scalars' columns: the scalars themselves, and the gate of every other irrep
    columns = {x: k for k, x in enumerate(["0e", *(x for x in config.irreps if degree_of(x) > 0)])}
    for t, plan in enumerate(plans(config)):
        ours, theirs = f"layers.{t}", f"NequIPConvolution_{t}"
        blocks = [columns[x] for x in ("0e", *plan.gated)]
        for x, (weight,) in source.linear(f"{theirs}/FullyConnectedTensorProductE3nn_0").items():
            if x in plan.outputs:
                if x == "0e":
                    weight = np.concatenate([weight[..., k * features : (k + 1) * features] for k in blocks], -1)
                out[f"{ours}.self_connection.{x}"] = weight[:, rows].transpose(1, 0, 2)
        for x, (weight,) in source.linear(f"{theirs}/Linear_0").items():
            if x in plan.sources:
                out[f"{ours}.linear_in.{x}"] = weight
        for x, parts in source.linear(f"{theirs}/Linear_1").items():
            if x in plan.outputs:
                kept = [parts[k] for k in blocks] if x == "0e" else parts
                out[f"{ours}.linear_out.{x}"] = np.concatenate(kept, -1)
        for k in range(config.radial_layers + 1):
            weight = source.take(f"{theirs}/MLP_0/Dense_{k}/kernel")
            if k == config.radial_layers:
                weight = weight.reshape(len(weight), everything, features)[:, [p.slot for p in plan.paths]]
                weight = weight.reshape(len(weight), -1)
            out[f"{ours}.radial.weights.{k}"] = weight
    source.finish()
    dtype = np.result_type(*out.values())
    return {name: torch.from_numpy(np.array(x, dtype=dtype, order="C")) for name, x in out.items()}


class _Source:
    """The arrays of a file, with errors that name what is missing or unused."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.taken: set[str] = set()

    def take(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise KeyError(f"it lacks the array {name!r}")
        self.taken.add(name)
        if not np.isfinite(self.arrays[name]).all():
            raise ValueError(f"its array {name!r} holds NaN or infinity")
        return self.arrays[name]

    def linear(self, group: str) -> dict[str, list[np.ndarray]]:
        """Weights of one linear map by irrep, several to the same irrep in the order of their outputs.

        Their names are ``group/w[in,(one-hot,)out] 64x1o,(100x0e,)64x1o``.
        """
        found: dict[str, list[tuple[int, np.ndarray]]] = {}
        for name in self.arrays:
            label = _LABEL.fullmatch(name)
            if label is None or label["group"] != group:
                continue
            sides = label["irreps"].split(",")
            if tuple(int(side.split("x")[0]) for side in sides)[-1] != self.arrays[name].shape[-1]:
                raise ValueError(f"its array {name!r} has the shape {self.arrays[name].shape}")
            irrep, output = sides[0].split("x")[1], int(label["numbers"].split(",")[-1])
            found.setdefault("0e" if group in ("Linear_0", "Linear_1", "Linear_2") else irrep, []).append(
                (output, self.take(name))
            )
        if not found:
            raise KeyError(f"it lacks the arrays of {group!r}")
        return {x: [weight for _, weight in sorted(parts, key=lambda part: part[0])] for x, parts in found.items()}

    def finish(self) -> None:
        """Refuse arrays that nothing looked at: the file holds another kind of network."""
        left = sorted(set(self.arrays) - self.taken)
        if left:
            raise ValueError(f"{len(left)} of its arrays belong to no part of the network, among them {left[0]!r}")
