"""Puts the trained ensemble spookynet-gfn2-bio where users find it: one member in the wheel, all of them in models/.

    python benchmarks/spookynet_bio_release.py --members MEMBER-0 MEMBER-1 --ensemble CALIBRATED --data FOLDER

MEMBER-k is a training folder or its model.safetensors, CALIBRATED the file that `openmm-mlff calibrate --save` wrote,
FOLDER the dataset (one for each source that the members were trained on). The member with the smallest force MAE on the
validation molecules goes into the wheel. Weights are copied as they are; the cards say what they were taught, by which
teacher, and where they end. Refused are an ensemble that is not calibrated or not made of these members, members that
were trained on other data, weights that are not float32, and a file for the wheel of more than 8 MB.

Sizes and checksums go into spookynet_bio_release.json. Run once more, it writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import HERE

from openmm_mlff.data import model_file
from openmm_mlff.data.collection_card import figures, shards_sha256
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.files import sha256_of, write_atomically
from openmm_mlff.potentials.family import find_family, from_card, make_card
from openmm_mlff.training.run import MODEL

NAME = "spookynet-gfn2-bio"
#: bytes
LARGEST = 8_000_000
Tensors = dict[str, torch.Tensor]

CITATION = (
    "Unke et al., Nat. Commun. 12, 7273 (2021), doi:10.1038/s41467-021-27504-0 (architecture); Bannwarth, Ehlert, "
    "Grimme, J. Chem. Theory Comput. 15, 1652 (2019), doi:10.1021/acs.jctc.8b01176 (GFN2-xTB)"
)
LIMITS = (
    "No better than its teacher: in vacuum GFN2-xTB itself moves the proton of a glycine zwitterion and of acetate "
    "beside ammonium or guanidinium. No periodic crystals, no metals but Li Na Mg K Ca, no excited states but the "
    "lowest triplet; bonds were pulled apart in a few small molecules only. Elements, charges and multiplicities that "
    "were not in the data are refused; for other doubts there is the ensemble, whose members then disagree."
)


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Card and tensors of a model file, or of the one in a training folder; refuses what is not float32."""
    file = path / MODEL if path.is_dir() else path
    card, tensors = model_file.load(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise SystemExit(f"{file}: expected weights in float32, got {tensor.dtype} in {name}")
    from_card(card, tensors)
    return card, tensors


def check_members(ensemble: tuple[dict[str, Any], Tensors], members: Sequence[Tensors]) -> None:
    """Ends the script unless the ensemble is calibrated and made of these members, bit by bit."""
    card, tensors = ensemble
    if card["family"] != "ensemble" or card["config"]["n_members"] != len(members):
        raise SystemExit(f"--ensemble: expected an ensemble of the {len(members)} members, got {card['family']!r}")
    if card["config"]["force_limit"] is None:
        raise SystemExit("--ensemble: it is not calibrated; run openmm-mlff calibrate --save")
    for k, member in enumerate(members):
        for name, value in member.items():
            if not torch.equal(tensors[f"member{k}.{name}"], value):
                raise SystemExit(f"--ensemble: its member {k} differs from --members in {name}")


def summary(card: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a model was trained on, without lists of groups and shards.

    Args:
        card: of the model. data: cards of the datasets, by the checksum of their shards.
    """
    described = card["training_data"]
    sources: dict[str, dict[str, Any]] = {}
    again = 0
    for source in described["sources"]:
        digest = shards_sha256({"shards": {name: {"sha256": sha} for name, sha in source.get("shards", {}).items()}})
        if digest not in data:
            raise SystemExit(f"--data: the model was trained on {source['name']!r} with other shards than are given")
        found = data[digest]
        if digest in sources:
            # labels of active learning, several times in an epoch; all of them train
            sources[digest]["times_in_an_epoch"] = sources[digest].get("times_in_an_epoch", 1) + 1
            again += found["n_structures"]
            continue
        kept = {"name": source["name"], "structures": found["n_structures"], "sha256_of_shards": digest}
        if "collection" in found:
            said = figures(found)
            names = ("charges", "multiplicities", "elements", "sizes", "held_out_by_recipe", "versions")
            classes = {name: row["all"] for name, row in said["classes"].items()}
            kept |= {"classes": classes} | {name: said[name] for name in names}
        sources[digest] = kept
    count = described["structures"]
    return {
        "sources": list(sources.values()),
        "structures": count | {"train": count["train"] - again},
        "groups": {split: len(names) for split, names in described["groups"].items()},
        "split": described["split"],
        **({"joined": described["joined"]} if "joined" in described else {}),
    }


def teacher(method: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in method["settings"].items() if name != "method")
    return (
        f"{method['method']} by {method['program']} ({settings}); open shells: {method['open_shells']}; energies "
        f"relative to {method['energy_reference']}"
    )


def fields(data: Sequence[Mapping[str, Any]], domain: str, description: str) -> dict[str, Any]:
    """What both cards say."""
    return {
        "name": NAME,
        "description": description,
        "domain": domain,
        "limits": LIMITS,
        "teacher": teacher(data[0]["method"]),
        "licence": "MIT",
        "citation": CITATION,
        "source": "examples/recipes/spookynet-gfn2-bio.yaml (data), examples/recipes/spookynet_bio.toml and "
        "spookynet_bio_finetune.toml (training)",
    }


def member_card(card: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A member's own card with the lists taken out of it."""
    kept = {name: value for name, value in card.items() if name != "format_version"}
    return kept | {"training_data": summary(card, data)}


def released(paths: Sequence[Path], ensemble: Path, datasets: Sequence[Path]) -> tuple[bytes, bytes, dict[str, Any]]:
    """The bytes of the wheel's file and of the ensemble's, and what is reported of them."""
    cards = [Dataset(path).card for path in datasets]
    data = {shards_sha256(card): card for card in cards}
    members = [read(path) for path in paths]
    joined = read(ensemble)
    check_members(joined, [tensors for _, tensors in members])
    for path, (card, _) in zip(paths, members, strict=True):
        if "accuracy" not in card:
            raise SystemExit(f"{path}: its training is not complete (the card has no accuracy)")
    errors = [float(card["accuracy"]["valid"]["forces_mae"]) for card, _ in members]
    best = errors.index(min(errors))
    domain = next(m.domain for m in find_family("spookynet").bundled if m.name == NAME)
    own = [member_card(card, data) for card, _ in members]
    trained_on = own[best]["training_data"]
    made_of = f"{trained_on['structures']['train'] - trained_on.get('joined', 0)} structures labelled by GFN2-xTB"
    single = own[best] | fields(cards, domain, f"SpookyNet trained on {made_of}: member {best} of {len(members)}")
    whole = make_card(from_card(*joined)) | fields(
        cards, domain, f"{len(members)} SpookyNets trained on {made_of}, which disagree where they do not know"
    )
    names = list(whole["members"])
    whole["members"] = dict(zip(names, own, strict=True))
    whole["training_data"] = own[best]["training_data"]
    kept = ("calibration", "accuracy", "training")
    whole |= {name: joined[0][name] for name in kept if name in joined[0]}
    report = {"member": best, "valid_forces_mae_meV_A": errors, "calibration": joined[0]["config"]}
    return model_file.encode(single, members[best][1]), model_file.encode(whole, joined[1]), report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--ensemble", type=Path, required=True, metavar="FILE")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="of the repository (default: this one)")
    args = parser.parse_args()
    weights = next(m.path for m in find_family("spookynet").bundled if m.name == NAME)
    wheel = args.root / "plugins" / "openmm_spookynet" / "weights" / weights.name
    whole = args.root / "models" / f"{NAME}.safetensors"
    single, ensemble, report = released(args.members, args.ensemble, args.data)
    if len(single) > LARGEST:
        raise SystemExit(f"the file for the wheel would have {len(single)} bytes, expected at most {LARGEST}")
    for path, content in ((wheel, single), (whole, ensemble)):
        write_atomically(path, content)
        if sha256_of(path) != hashlib.sha256(content).hexdigest():
            raise SystemExit(f"{path} was not written as it should be")
        name = path.relative_to(args.root).as_posix()
        report[name] = {"bytes": len(content), "sha256": sha256_of(path)}
        print(f"{name}: {len(content) / 1e6:.2f} MB, sha256 {report[name]['sha256']}")
    path = args.root / "benchmarks" / "spookynet_bio_release.json"
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    errors = ", ".join(f"{x:.1f}" for x in report["valid_forces_mae_meV_A"])
    print(f"in the wheel: member {report['member']}; validation force MAE of the members {errors} meV/angstrom")


if __name__ == "__main__":
    main()
