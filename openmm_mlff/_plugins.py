"""Looking up plugins by entry point; the standard library only, so that any layer and any import order can use it.

Groups: ``openmm_mlff.potentials`` (name of a potential -> its `Family`), ``openmm_mlff.commands`` (name of a command ->
a function that adds its parser to the command line), ``openmmml.potentials`` (what openmm-ml reads).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

POTENTIALS = "openmm_mlff.potentials"
COMMANDS = "openmm_mlff.commands"


class PluginError(ImportError):
    """A plugin is installed and registered, but its code could not be imported."""


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """The end of an error message about an unknown `name`: the nearest known names, or all of them.

    Returns e.g. ``"did you mean 'spookynet'?"`` or ``"known: a, b, c"`` or ``"none is installed"``.
    """
    by_lower = {k.lower(): k for k in sorted(known)}
    if not by_lower:
        return "none is installed"
    matches = [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.5)]
    matches += [k for low, k in by_lower.items() if name and k not in matches and low.startswith(name.lower())][:n]
    if matches:
        return f"did you mean {' or '.join(repr(m) for m in matches)}?"
    return f"known: {', '.join(by_lower.values())}"


def registered(group: str) -> dict[str, EntryPoint]:
    """All entry points of a group by name, without importing any of them.

    Raises `PluginError` if two distributions claim one name for different objects, since the winner would be
    a matter of chance.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            raise PluginError(
                f"entry point {point.name!r} of group {group!r} is claimed twice: by {_origin(other)} and by "
                f"{_origin(point)}; uninstall one of them"
            )
        found.setdefault(point.name, point)
    return found


def load(group: str, name: str) -> Any:
    """The object that the entry point `name` of `group` stands for.

    Raises `ValueError` with the nearest names if there is no such entry point, and `PluginError` naming the plugin
    and the cause if its import fails; other plugins are not touched.
    """
    points = registered(group)
    if name not in points:
        kind = group.rpartition(".")[2].removesuffix("s")
        raise ValueError(f"name: no {kind} is called {name!r}; {near(name, points)}")
    point = points[name]
    try:
        return point.load()
    except Exception as error:
        raise PluginError(
            f"the plugin behind {name!r} ({_origin(point)}) could not be imported: {type(error).__name__}: {error}"
        ) from error


def _origin(point: EntryPoint) -> str:
    return f"{point.value!r} of {point.dist.name} {point.dist.version}" if point.dist else repr(point.value)
