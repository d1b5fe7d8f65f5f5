"""Copy what the tests need from the published program's stored results into ``spookynet.npz`` (see README.md here).

Run as ``python reduce_spookynet.py <folder with visible.npz, elements_visible.npz, lrcutoff_visible.npz and .json>``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

KEPT = ("numbers", "positions", "charge", "magmom", "cell", "energy", "forces", "charges", "dipole",
        "energy_f32", "forces_f32", "charges_f32")  # fmt: skip
SUMS = ("E_nn", "E_rep", "E_ele", "E_vdw")


def reduce(folder: Path) -> dict[str, np.ndarray]:
    """``set/name/quantity`` -> array; forces and charges of the single-precision runs stay float32."""
    out: dict[str, np.ndarray] = {}
    for source in ("visible", "elements_visible", "lrcutoff_visible"):
        arrays = np.load(folder / f"{source}.npz", allow_pickle=False)
        for structure in json.loads((folder / f"{source}.json").read_text(encoding="utf-8"))["structures"]:
            prefix = f"{source.removesuffix('_visible')}/{structure['name']}"
            for name in KEPT:
                key = structure["key"] + name
                if key in arrays and not (name == "cell" and not structure.get("pbc")):
                    out[f"{prefix}/{name}"] = arrays[key]
            if all(s in structure for s in SUMS):
                out[f"{prefix}/terms"] = np.array([structure[s] for s in SUMS])
            if structure.get("lr_cutoff") is not None:
                out[f"{prefix}/lr_cutoff"] = np.array(structure["lr_cutoff"])
    return out


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("spookynet.npz"), **reduce(Path(sys.argv[1])))
