"""a recipe and data -> a folder with a trained model, its tables and its pictures.

The folder of a run::

    config.json           the recipe, the data's checksums and versions: what --resume goes on with
    checkpoint.pt         the whole state (see training.loop)
    history.csv, .json    one row per validation; loss.png draws it
    model.safetensors     the averaged parameters of the best validation so far, with the model card
    test_errors.json, test_parity.png   (valid_* if there is no test split)
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_mlff import __version__
from openmm_mlff._plugins import near
from openmm_mlff.analysis.plots import plot_history
from openmm_mlff.data import model_file
from openmm_mlff.data.files import sha256_of, write_atomically
from openmm_mlff.potentials.composition import Composite
from openmm_mlff.potentials.family import find_family, load_potential, save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training import loop
from openmm_mlff.training.distributed import Team
from openmm_mlff.training.evaluation import compare, write_report
from openmm_mlff.training.force_matching import ForceMatching
from openmm_mlff.training.recipe import Recipe, TrainingData, load_data

MODEL = "model.safetensors"
CONFIG = "config.json"


def train(
    recipe: Recipe | None,
    data: Sequence[str | Path],
    output: str | Path,
    resume: bool = False,
    start: str | Path | None = None,
    device: str = "cpu",
    progress: bool = True,
    card: Mapping[str, Any] | None = None,
    devices: int = 1,
    time_limit: float | None = None,
) -> loop.TrainingState:
    """Train a model of a family, or train one further, and write the folder described above.

    Args:
        recipe: None takes the recipe of the run to be resumed.
        data: datasets (folders) and structure files.
        resume: go on with the run in `output`, if there is one, which must have the same recipe and data.
        start: model file to start from instead of new parameters; its config replaces the recipe's ``[model]``.
        card: further fields of the model card (name, description, domain, licence, citation).
        devices: processes with a device (or CPU) each that share every batch; this program is started once for each.
        time_limit: seconds after which the run stops with a checkpoint, to be resumed.

    Raises `FileExistsError` if `output` holds a run and `resume` is not set, `ValueError` if recipe or data differ
    from those of the run to be resumed, and what `load_data`, `ForceMatching` and `loop.fit` raise.
    """
    output = Path(output)
    resume = resume and (output / CONFIG).exists()
    team = Team.of(choose_device(device).type, devices)
    with team.first():
        # the others find the folder that the first one has begun
        late = team.rank > 0
        recipe, config, loaded = prepare(
            None if late else recipe, data, output, resume or late, None if late else start, card
        )
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if resume and config["init"] is not None and not (output / loop.CHECKPOINT).exists():
        # killed before there was a state to go on with
        start = model_file.find(config["init"]["sha256"])
    model = _new_model(recipe, loaded) if start is None else _started_model(recipe, start)
    # batches are made where the model is
    model.to(team.device)
    method = _method(recipe, model, loaded, start is None if recipe.fit_energies is None else recipe.fit_energies)
    details = {"training_data": loaded.description, "training": config["recipe"], "init": config["init"]}
    details |= config["card"]

    def on_validation(state: loop.TrainingState, better: bool) -> None:
        if len(state.history) > 1:
            plot_history(state.history, output / "loss.png")
        if better:
            _save(state, output, details)

    try:
        state = loop.fit(
            model,
            method,
            recipe.loop,
            output,
            resume,
            team,
            progress,
            on_validation=on_validation,
            time_limit=time_limit,
        )
    finally:
        method.close()
    if state.history and team.rank == 0:
        plot_history(state.history, output / "loss.png")
    if state.best and team.rank == 0:
        _finish(state, loaded, output, details, recipe.seed)
    return state


def prepare(
    recipe: Recipe | None,
    data: Sequence[str | Path],
    output: Path,
    resume: bool,
    start: str | Path | None,
    card: Mapping[str, Any] | None,
) -> tuple[Recipe, dict[str, Any], TrainingData]:
    """The recipe, configuration and data of a run: those of the run to be resumed, or new ones, which are written."""
    if resume:
        recipe, config = _resumed(recipe, output, start)
        loaded = load_data(data, recipe.data, recipe.seed)
        _check_same(config["data"], loaded.description, "data")
        return recipe, config, loaded
    if (output / CONFIG).exists():
        raise FileExistsError(f"output: {output} holds a run already; resume it, or choose another folder")
    if recipe is None:
        raise ValueError(f"recipe: expected one, because {output} holds no run to be resumed, got None")
    if start is not None:
        recipe = dataclasses.replace(recipe, model=model_file.load_card(start)["config"])
        model_file.remember(start)
    loaded = load_data(data, recipe.data, recipe.seed)
    config = _configuration(recipe, loaded, start, card)
    write_atomically(output / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    return recipe, config, loaded


def _method(recipe: Recipe, model: Potential, data: TrainingData, fit_energies: bool) -> ForceMatching:
    return ForceMatching(
        model,
        data.splits["train"],
        data.splits["valid"],
        recipe.loss,
        recipe.final_loss,
        recipe.batch_size,
        recipe.seed,
        recipe.compile,
        fit_energies,
        recipe.processes,
        recipe.batch_atoms,
        recipe.native,
    )


def choose_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "auto" (CUDA where there is one). Raises `ValueError` if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, found none; use cpu")
    return torch.device(name)


def _resumed(recipe: Recipe | None, output: Path, start: str | Path | None) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the whole configuration of the run in a folder; `ValueError` if another recipe is asked for."""
    if start is not None:
        raise ValueError("init: a run that is resumed has its parameters already; leave it out")
    config = json.loads((output / CONFIG).read_text(encoding="utf-8"))
    if recipe is not None:
        # options that a run from before they existed did not name have their defaults
        before = _plain(Recipe.from_dict(config["recipe"]).to_dict())
        # a run from a model has that model's config instead of the recipe's
        kept = {} if config["init"] is None else {"model": before["model"]}
        _check_same(before, recipe.to_dict() | kept, "recipe")
    return Recipe.from_dict(config["recipe"]), config


def _new_model(recipe: Recipe, data: TrainingData) -> Potential:
    family = find_family(recipe.family)
    if issubclass(family.model, Composite):
        raise ValueError(f"family: {family.name} models are made of others; expected the family of one of these")
    known = {f.name for f in dataclasses.fields(family.config)}
    for key in recipe.model:
        if key not in known:
            raise ValueError(f"model: {family.name} has no option {key!r}; {near(key, known)}")
    config = dict(recipe.model)
    if "elements" in known and "elements" not in config:
        # a model refuses elements that it has not seen
        config["elements"] = tuple(sorted({int(z) for s in data.splits["train"] for z in s.numbers}))
    torch.manual_seed(recipe.seed)
    model: Potential = family.model(family.config(**config))
    return model.train()


def _started_model(recipe: Recipe, start: str | Path) -> Potential:
    model = load_potential(start)
    if model.family != find_family(recipe.family).name:
        raise ValueError(f"init: expected a {recipe.family} model, got a {model.family} model in {start}")
    return model.requires_grad_(True).train()


def _configuration(
    recipe: Recipe, data: TrainingData, start: str | Path | None, card: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "recipe": recipe.to_dict(),
        "data": data.description,
        "init": None if start is None else {"file": Path(start).name, "sha256": sha256_of(start)},
        "card": dict(card or {}),
        "versions": {"openmm-mlff": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(values)))


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with other data or another recipe (`ValueError` naming what differs)."""
    plain = _plain(now)
    differing = [key for key in plain if before.get(key) != plain[key]]
    if differing:
        raise ValueError(f"resume: the {what} differ from those of the run ({', '.join(differing)})")


def _save(state: loop.TrainingState, output: Path, details: Mapping[str, Any], **more: Any) -> None:
    best = {"step": state.best["step"], "validation_loss": state.best["loss"]}
    with loop.averaged(state) as model:
        save_potential(model, output / MODEL, **details, **more, best=best)  # type: ignore[arg-type]


def _finish(state: loop.TrainingState, data: TrainingData, output: Path, details: Mapping[str, Any], seed: int) -> None:
    """Tables and pictures of the validation and test splits, and the model file with the accuracy in its card."""
    accuracy: dict[str, Any] = {}
    with loop.averaged(state) as model:
        for split in ("valid", "test"):
            if data.splits[split]:
                comparison = compare(model, data.splits[split])  # type: ignore[arg-type]
                report = write_report(comparison, output, split, f"{split} split", seed)
                accuracy[split] = {"units": report["units"], **report["tables"]["all"][0]}
    _save(state, output, details, accuracy=accuracy)
