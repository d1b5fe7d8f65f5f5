"""What a plugin registers, and the one place that finds plugins, models and their files.

A plugin's entry point in the group ``openmm_mlff.potentials`` names a `Family`. Several names may lead to one family:
the family's own name (takes ``modelPath``), aliases, and the names of the models it ships or knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmm_mlff import _plugins
from openmm_mlff.data import model_file
from openmm_mlff.potentials.composition import Composite
from openmm_mlff.potentials.potential import Potential


@dataclass(frozen=True)
class PublishedModel:
    """A model that its authors publish and this package can fetch and read, but does not carry.

    Attributes:
        url, sha256: of the file that is fetched.
        find: where else on this machine the model is (in another package, say), or None.
        is_it: whether a potential that was read from some file is this model. With it the model may come from files
            other than the one that is fetched: from `find`, or from one that the user names.
        extra: the extra of this package that installs what `find` looks for.
    """

    name: str
    family: str
    url: str
    sha256: str
    licence: str
    citation: str
    domain: str
    find: Callable[[], Path | None] = lambda: None
    is_it: Callable[[Potential], bool] | None = None
    extra: str | None = None


@dataclass(frozen=True)
class BundledModel:
    """A model file inside the plugin's own package."""

    name: str
    family: str
    path: Path
    domain: str


@dataclass(frozen=True)
class Trainer:
    """How a family is trained whose models come from solving equations, not from steps of an optimiser.

    Attributes:
        options: frozen dataclass of plain settings, with defaults.
        fit: ``fit(options, train, valid, folder, seed, progress) -> (model, report)`` from lists of `Structure`; keeps
            in `folder` what a second call goes on with. ``report["chosen"]`` (numbers by name) goes into the model's
            card, ``report["notes"]`` are lines for the user.
    """

    options: type
    fit: Callable[..., tuple[Potential, dict[str, Any]]]


@dataclass(frozen=True)
class Family:
    """One model family, as its plugin registers it.

    Attributes:
        name: what users type with ``modelPath``. aliases: other names for the same.
        model: the `Potential` class, built as ``model(config)``. config: its frozen dataclass.
        recognises, read: whether a file can be one published by others, and its reader (file -> model).
        stands_alone: whether such a file can be read without others beside it; the cache keeps one that cannot as a
            model file.
        trainer: how models are fitted; None trains by force matching with an optimiser.
        bundled, published: the models that the plugin carries, and those it knows where to fetch.
    """

    name: str
    model: type[Potential]
    config: type
    aliases: tuple[str, ...] = ()
    recognises: Callable[[Path], bool] = lambda path: False
    read: Callable[[Path], Potential] | None = None
    stands_alone: Callable[[Path], bool] = lambda path: True
    trainer: Trainer | None = None
    bundled: tuple[BundledModel, ...] = ()
    published: tuple[PublishedModel, ...] = ()


def find_family(name: str) -> Family:
    """The family of a name; raises `ValueError` with near names, and `ImportError` if its plugin is broken."""
    family = _plugins.load(_plugins.POTENTIALS, name)
    if not isinstance(family, Family):
        raise ImportError(f"name: the plugin of {name!r} registers a {type(family).__name__}, expected a Family")
    return family


def families() -> list[Family]:
    """Every family once; plugins that cannot be imported are left out (`find_family` says why)."""
    found: dict[str, Family] = {}
    for name in _plugins.registered(_plugins.POTENTIALS):
        try:
            family = find_family(name)
        except ImportError:
            continue
        found.setdefault(family.name, family)
    return list(found.values())


def load_potential(path: str | Path, family: str | None = None, sha256: str | None = None) -> Potential:
    """Read a model file, ours or a published one, in float32 or the file's precision, ready for evaluation.

    Args:
        path: our ``.safetensors`` model file, or a file that the family can read.
        family: which family should read a file that is not ours; without it every family is asked.
        sha256: refuse the file if its checksum differs.

    Raises `FileNotFoundError`, or `ValueError` for a damaged, foreign or wrong file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"modelPath: no file at {path}")
    if sha256 is not None:
        model_file.verify(path, sha256)
    if model_file.is_model_file(path):
        card, tensors = model_file.load(path)
        if family is not None and card["family"] != find_family(family).name:
            raise ValueError(
                f"modelPath: {path.name} is a {card['family']!r} model, expected {find_family(family).name!r}"
            )
        return from_card(card, tensors)
    candidates = [find_family(family)] if family is not None else families()
    for candidate in candidates:
        if candidate.read is not None and candidate.recognises(path):
            return candidate.read(path)
    raise ValueError(
        f"modelPath: {path.name} is neither an openmm-mlff model file nor a file that a known family reads"
    )


def from_card(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Potential:
    """The potential that a card and its tensors describe; raises `ValueError` if they do not fit each other."""
    kind = card.get("kind", "potential")
    if kind not in ("potential", "composite"):
        raise ValueError(f"modelPath: expected a model of kind 'potential' or 'composite', got {kind!r}")
    family = find_family(card["family"])
    if (kind == "composite") != issubclass(family.model, Composite):
        raise ValueError(f"modelPath: the card says that a {family.name} model is of kind {kind!r}, which it is not")
    known = {f.name for f in dataclasses.fields(family.config)}
    unknown = sorted(set(card["config"]) - known)
    if unknown:
        raise ValueError(
            f"modelPath: the card's config has {unknown[0]!r}, which this version of {family.name} does not know"
        )
    members = _members(card, tensors) if kind == "composite" else {}
    try:
        config = family.config(**card["config"])
        model = family.model.compose(config, members) if issubclass(family.model, Composite) else family.model(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"modelPath: the card's config does not describe a {family.name} model ({error})") from error
    if not members:
        fill(model, tensors, "the tensors do not fit the card")
    return model.eval().requires_grad_(False)


def _members(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Potential]:
    """The members of a composite, from their cards and the tensors with their names as prefixes."""
    cards = card.get("members")
    if not isinstance(cards, dict) or not all(isinstance(c, dict) and "family" in c for c in cards.values()):
        raise ValueError("modelPath: the card of a composite is incomplete (the cards of its members are needed)")
    strange = next((name for name in tensors if name.partition(".")[0] not in cards), None)
    if strange is not None:
        raise ValueError(f"modelPath: the tensors do not fit the card ({strange!r} belongs to no member)")
    found = {}
    for name, own in cards.items():
        if not isinstance(own.get("config"), dict) or own.get("kind") != "potential":
            raise ValueError(f"modelPath: the card of the member {name!r} is incomplete, or it is no potential")
        mine = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == name}
        found[name] = from_card(own, mine)
    return found


def fill(model: Potential, tensors: dict[str, torch.Tensor], misfit: str) -> None:
    """Put tensors into a model, in their precision; raises `ValueError` with `misfit` if names or shapes differ."""
    floating = [t.dtype for t in tensors.values() if t.is_floating_point()]
    if floating:
        model.to(torch.float64 if all(d == torch.float64 for d in floating) else torch.float32)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"modelPath: {misfit} ({' '.join(str(error).split())[:500]})") from error


def make_card(model: Potential, **details: Any) -> dict[str, Any]:
    """The card of a model: what it is and can do, and what `details` add (training data, licence, accuracy, ...).

    A composite's card holds those of its members, under ``members``; `details` may bring them with more in them.
    """
    composite = isinstance(model, Composite)
    if composite and not dataclasses.is_dataclass(getattr(model, "config", None)):
        raise TypeError(f"model: {model.family} potentials live in memory only and have no model file")
    card = {
        "kind": "composite" if composite else "potential",
        "family": model.family,
        "config": dataclasses.asdict(model.config),
        "elements": list(model.elements),
        "units": {"length": "angstrom", "energy": "eV", "charge": "e"},
        "supports": {
            "charge": model.supports_charge,
            "multiplicity": model.supports_multiplicity,
            "periodic": model.supports_periodic,
            "charges": model.predicts_charges,
        },
        "cutoff": model.cutoff,
        "long_range_cutoff": model.long_range_cutoff,
    }
    if isinstance(model, Composite):
        card["members"] = {name: make_card(member) for name, member in model.members.items()}
    return {**card, **details}


def save_potential(model: Potential, path: str | Path, **details: Any) -> Path:
    """Write a potential as a model file; `details` go into its card (see `model_file.CARD_FIELDS`)."""
    tensors = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    return model_file.save(path, make_card(model, **details), tensors)


def remember_potential(path: Path, family: Family, model: Potential) -> str:
    """Put the file that `model` was read from, or its numbers, into the content-addressed cache; returns the sha256."""
    if model_file.is_model_file(path) or family.stands_alone(path):
        return model_file.remember(path)
    return store_potential(model)


def find_published(model: PublishedModel) -> Path | None:
    """The file of a published model on this machine: in the cache, or where `PublishedModel.find` knows; or None."""
    return model_file.cached(model.sha256) or model.find()


def store_potential(model: Potential) -> str:
    """Put an in-memory model into the content-addressed cache; returns its sha256."""
    tensors = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    return model_file.store(make_card(model), tensors)
