"""a recipe and data -> a folder with a trained model, for families that are fitted by solving equations.

The folder of a run::

    config.json           the recipe, the data's checksums and versions: what --resume goes on with
    fit.json              what the family's trainer reports (candidates, residuals, chosen settings)
    candidates/           what an interrupted run goes on with
    model.safetensors     the model with its card
    test_errors.json, test_parity.png, valid_*
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openmm_mlff.data.files import write_atomically
from openmm_mlff.potentials.family import Trainer, find_family, save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.evaluation import compare, write_report
from openmm_mlff.training.recipe import Recipe, options_from
from openmm_mlff.training.run import CONFIG, MODEL, prepare

FIT = "fit.json"
CANDIDATES = "candidates"


def train_directly(
    recipe: Recipe | None,
    data: Sequence[str | Path],
    output: str | Path,
    resume: bool = False,
    progress: bool = True,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fit a model of a family with a `Trainer`, and write the folder described above; returns what ``fit.json`` holds.

    Args: as in `training.run.train`; the recipe's ``[trainer]`` holds the options of the family's trainer.

    Raises `FileExistsError` if `output` holds a run and `resume` is not set, `ValueError` naming a wrong option or
    differing data, and what the trainer raises.
    """
    output = Path(output)
    resume = resume and (output / CONFIG).exists()
    if not resume and recipe is not None:
        trainer = trainer_of(recipe.family)
        # everything that decides the result goes into the configuration, defaults too, and mistakes are found first
        recipe = replace(recipe, trainer=_plain(options_from(trainer.options, recipe.trainer, "trainer")))
    recipe, config, loaded = prepare(recipe, data, output, resume, None, card)
    trainer = trainer_of(recipe.family)
    if resume and (output / FIT).exists():
        report: dict[str, Any] = json.loads((output / FIT).read_text(encoding="utf-8"))
        return report
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    (output / CANDIDATES).mkdir(parents=True, exist_ok=True)
    options: Any = options_from(trainer.options, recipe.trainer, "trainer")
    model, report = trainer.fit(
        options, loaded.splits["train"], loaded.splits["valid"], output / CANDIDATES, recipe.seed, progress
    )
    details = {"training_data": loaded.description, "training": config["recipe"], "fit": report["chosen"]}
    accuracy = _accuracy(model, loaded.splits, output, recipe.seed)
    save_potential(model, output / MODEL, **details, **config["card"], accuracy=accuracy)
    write_atomically(output / FIT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def trainer_of(family: str) -> Trainer:
    """The trainer of a family; `ValueError` if it has none."""
    found = find_family(family)
    if found.trainer is None:
        raise ValueError(f"family: {found.name} is trained by optimisation (`training.run.train`)")
    return found.trainer


def _plain(options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(vars(options)))


def _accuracy(model: Potential, splits: Mapping[str, Any], output: Path, seed: int) -> dict[str, Any]:
    accuracy: dict[str, Any] = {}
    for split in ("valid", "test"):
        if splits[split]:
            report = write_report(compare(model, splits[split]), output, split, f"{split} split", seed)
            accuracy[split] = {"units": report["units"], **report["tables"]["all"][0]}
    return accuracy
