"""Two potentials -> one model file that ``MLPotential('resolv', modelPath=...)`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmm_mlff.data import model_file
from openmm_mlff.potentials.family import load_potential, make_card, save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_resolv.model import ResolvPotential


def _of(member: str, error: Exception) -> str:
    return f"{member}: {str(error).removeprefix('modelPath: ')}"


def save_pair(water: Potential | str | Path, vacuum: Potential | str | Path, path: str | Path, **card: Any) -> Path:
    """Write a pair as one model file.

    Args:
        water, vacuum: potentials, or model files, whose own cards (training data, licence, ...) are then kept.
        card: fields of the pair's card (see `model_file.CARD_FIELDS`).

    Returns the path; raises `ValueError` for another field, what `load_potential` raises for a file, naming the member,
    and what `ResolvPotential` raises.
    """
    model_file.check_card_fields(card)
    members: dict[str, Potential] = {}
    cards: dict[str, Any] = {}
    for name, given in (("vacuum", vacuum), ("water", water)):
        if isinstance(given, (str, Path)):
            try:
                members[name] = load_potential(given)
            except FileNotFoundError as error:
                raise FileNotFoundError(_of(name, error)) from error
            except ValueError as error:
                raise ValueError(_of(name, error)) from error
            own = model_file.load_card(given) if model_file.is_model_file(given) else {}
            cards[name] = {**make_card(members[name]), **{k: v for k, v in own.items() if k != "format_version"}}
        else:
            members[name] = given
    pair = ResolvPotential(water=members["water"], vacuum=members["vacuum"])
    described = {name: cards.get(name) or make_card(member) for name, member in pair.members.items()}
    return save_potential(pair, path, members=described, **card)
