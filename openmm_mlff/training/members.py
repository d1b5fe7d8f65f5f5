"""a recipe and data -> several models from different seeds -> an ensemble that knows where it is unsure.

The folder of such a run::

    members.json          the recipe they share, and how many there are: what --resume goes on with
    member-0, member-1... the runs of the members (see `training.run`); member k has the recipe's seeds + k
    init-0.safetensors... the members of the ensemble that the run started from, if it did
    model.safetensors     the ensemble, when all of them are trained
    test_errors.json, test_parity.png   of the ensemble (valid_* if there is no test split)
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openmm_mlff.data import model_file
from openmm_mlff.data.files import write_atomically
from openmm_mlff.potentials.ensemble import Ensemble, member_name, save_ensemble
from openmm_mlff.potentials.family import find_family, load_potential
from openmm_mlff.training import loop
from openmm_mlff.training.evaluation import compare, write_report
from openmm_mlff.training.recipe import Recipe, load_data
from openmm_mlff.training.run import CONFIG, MODEL, train

PLAN = "members.json"


def member_recipe(recipe: Recipe, k: int) -> Recipe:
    """The recipe of member `k`: other initial parameters and another order of the data, the same split."""
    split_seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    return dataclasses.replace(
        recipe,
        seed=recipe.seed + k,
        loop=dataclasses.replace(recipe.loop, seed=recipe.loop.seed + k),
        data=dataclasses.replace(recipe.data, seed=split_seed),
    )


def member_folder(output: str | Path, k: int) -> Path:
    """Where member `k` is trained."""
    return Path(output) / f"member-{k}"


def train_members(
    recipe: Recipe | None,
    data: Sequence[str | Path],
    output: str | Path,
    n: int | None = None,
    resume: bool = False,
    start: str | Path | None = None,
    device: str = "cpu",
    progress: bool = True,
    card: Mapping[str, Any] | None = None,
    time_limit: float | None = None,
) -> list[loop.TrainingState]:
    """Train members one after the other, and join them when all of them are complete.

    Args:
        recipe, n: what they share, and how many; None takes those of the run to be resumed.
        start: model file to start from; each member starts from its own one if it is an ensemble.
        time_limit: seconds for all members that are trained in this call.
        data, resume, device, progress, card: as for `training.run.train`.

    Returns the states of the members that were trained in this call or before it; the last one may be incomplete.

    Raises `FileExistsError` if `output` holds a run and `resume` is not set, `ValueError` for fewer than two members, a
    family that is not trained by an optimiser, an ensemble of another number to start from, or another recipe or number
    than the run to be resumed has, and what `train` raises.
    """
    output = Path(output)
    plan = _plan(recipe, n, output, resume, card, start)
    recipe, n, card, start = Recipe.from_dict(plan["recipe"]), plan["members"], plan["card"], plan["init"]
    begin = time.monotonic()
    states = []
    for k in range(n):
        folder = member_folder(output, k)
        begun = (folder / CONFIG).exists()
        left = None if time_limit is None else time_limit - (time.monotonic() - begin)
        if left is not None and left <= 0:
            break
        begin_from = None if begun or start is None else _start_of(start, n, k, output)
        state = train(member_recipe(recipe, k), data, folder, True, begin_from, device, progress, card, time_limit=left)
        states.append(state)
        if not complete(state, recipe):
            break
    if len(states) == n and complete(states[-1], recipe):
        _join(recipe, data, output, n, card)
    return states


def _start_of(start: str | Path, n: int, k: int, output: Path) -> Path:
    """What member `k` of `n` starts from: `start`, or its own member of an ensemble, as a file by itself."""
    start = Path(start)
    if not model_file.is_model_file(start):
        return start
    card, tensors = model_file.load(start)
    if card["family"] != Ensemble.family:
        return start
    if card["config"]["n_members"] != n:
        raise ValueError(f"init: expected an ensemble of {n} members, got one of {card['config']['n_members']}")
    prefix = f"{member_name(k)}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return model_file.save(output / f"init-{k}.safetensors", card["members"][member_name(k)], own)


def complete(state: loop.TrainingState, recipe: Recipe) -> bool:
    """Whether a training has made all its steps, or has stopped because it no longer got better."""
    patience = recipe.loop.patience
    return state.step >= recipe.loop.steps or (patience is not None and state.since_best > patience)


def _plan(
    recipe: Recipe | None,
    n: int | None,
    output: Path,
    resume: bool,
    card: Mapping[str, Any] | None,
    start: str | Path | None,
) -> dict[str, Any]:
    """What is trained: what the folder says of the run to be resumed, or what is asked for, which is written."""
    path = output / PLAN
    # a plan of which no member was begun, because its data was refused for example, may be replaced
    begun = any(output.glob(f"member-*/{CONFIG}"))
    if path.exists() and (resume or begun):
        if not resume:
            raise FileExistsError(
                f"output: {output} holds a run of members already; resume it, or choose another folder"
            )
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"members": n, "recipe": None if recipe is None else json.loads(json.dumps(recipe.to_dict()))}
        for name, value in wanted.items():
            if value is not None and value != stored[name]:
                raise ValueError(f"{name}: expected that of the run to be resumed, got another")
        return stored
    if recipe is None or n is None:
        raise ValueError(f"recipe, members: expected both, because {output} holds no run of members to be resumed")
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"members: expected a whole number >= 2, got {n!r}")
    if find_family(recipe.family).trainer is not None:
        raise ValueError(
            f"members: {recipe.family} models are fitted by solving equations, which has one solution; fit them to "
            "different data and join them by `openmm-mlff models ensemble`"
        )
    if (output / CONFIG).exists():
        raise FileExistsError(f"output: {output} holds the run of a single model; choose another folder")
    plan = {"members": n, "recipe": recipe.to_dict(), "card": dict(card or {}), "init": start and str(start)}
    write_atomically(path, (json.dumps(plan, indent=1) + "\n").encode())
    return json.loads(json.dumps(plan))


def _join(recipe: Recipe, data: Sequence[str | Path], output: Path, n: int, card: Mapping[str, Any]) -> None:
    """The model file of all members, with the errors of their mean."""
    files = [member_folder(output, k) / MODEL for k in range(n)]
    save_ensemble(files, output / MODEL, **card)
    first = member_recipe(recipe, 0)
    loaded = load_data(data, first.data, first.seed)
    ensemble = load_potential(output / MODEL)
    accuracy: dict[str, Any] = {}
    for split in ("valid", "test"):
        if loaded.splits[split]:
            report = write_report(compare(ensemble, loaded.splits[split]), output, split, f"{split} split", recipe.seed)
            accuracy[split] = {"units": report["units"], **report["tables"]["all"][0]}
    save_ensemble(files, output / MODEL, **{**card, "training_data": loaded.description, "accuracy": accuracy})
