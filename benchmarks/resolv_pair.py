"""The trained pair as one model file with its card: what `models/resolv-freesolv.safetensors` is.

    python benchmarks/resolv_pair.py [--water .work/resolv/water_fused2]

Figures come from the JSON files of `resolv_labels.py`, `resolv_networks.py`, `resolv_water.py` and
`resolv_hydration.py`, which have to be there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _common import HERE
from _resolv import FOLDER, molecules
from resolv_water import vacuum_folder

from openmm_mlff.training.run import MODEL
from openmm_mlff.training.solvation import BEST
from openmm_mlff.training.solvation_folder import HISTORY
from openmm_resolv import save_pair

PAIR = HERE.parent / "models" / "resolv-freesolv.safetensors"


def card(water: Path) -> dict[str, Any]:
    """What is said of the pair."""
    networks, labels, hydration, trained = (
        json.loads((HERE / f"resolv_{name}.json").read_text(encoding="utf-8"))
        for name in ("networks", "labels", "hydration", "water")
    )
    history = json.loads((water / HISTORY).read_text(encoding="utf-8"))
    if trained["trainings"][-1]["rounds"] != history:
        raise SystemExit(f"resolv_water.json is of another training than {water}; run resolv_water.py --report")
    best = min(history, key=lambda row: row["valid_mae_kt"])
    used = trained["molecules"]
    return {
        "name": "resolv-freesolv",
        "description": "A pair in vacuum and in implicit water at 298.15 K, by the method of ReSolv",
        "domain": "small neutral closed-shell molecules of H, C, N, O, S and Cl, one at a time, near 298 K",
        "citation": "Roecken, Burnet, Zavadlav, J. Chem. Phys. 161, 234101 (2024), doi:10.1063/5.0235189 (method); "
        "Mobley, Guthrie, J. Comput. Aided Mol. Des. 28, 711 (2014) (FreeSolv)",
        "licence": "not settled: FreeSolv 0.52, whose measured values the water potential was trained on, names none",
        "training_data": {
            "vacuum": f"GFN2-xTB, {sum(r['labelled'] for r in labels['rounds'].values())} structures of "
            f"{sum(labels['molecules'].values())} molecules, none of them of the test set",
            "water_start": "the same with ALPB(water)",
            "water": f"free energies of FreeSolv 0.52: {used['train']} molecules to train, {used['valid']} to validate",
            "not_used": f"the {sum(m.split == 'test' for m in molecules())} test molecules of ReSolv's split",
        },
        "training": [{k: v for k, v in t.items() if k != "rounds"} for t in trained["trainings"]],
        "accuracy": {
            "against_labels": {split: networks[split] for split in ("valid", "test")},
            "hydration_kcal_mol": hydration["table"],
            "validation_mae_kt": round(best["valid_mae_kt"], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--water", type=Path, default=FOLDER / "water_fused2", help="folder of the training in water")
    args = parser.parse_args()
    PAIR.parent.mkdir(exist_ok=True)
    print(save_pair(args.water / BEST, vacuum_folder() / MODEL, PAIR, **card(args.water)))


if __name__ == "__main__":
    main()
