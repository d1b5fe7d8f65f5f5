"""The one factory that openmm-ml instantiates, for every potential of every plugin.

``import openmmml`` imports and instantiates all registered factories while it is itself half imported, without
catching errors. So this module imports the standard library only: a broken plugin cannot break openmm-ml, and torch is
loaded when a potential is made, not before.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

from openmm_mlff import _plugins

if TYPE_CHECKING:
    from openmm_mlff.forces.mlpotential import MLFFPotentialImpl


class Factory:
    """What the entry points of group ``openmmml.potentials`` name; the counterpart of `MLPotentialImplFactory`."""

    def __init__(self) -> None:
        _explain_unknown_names()

    def createImpl(self, name: str, **args: Any) -> MLFFPotentialImpl:
        """Make the implementation behind ``MLPotential(name, **args)``.

        The family is found in the entry-point group ``openmm_mlff.potentials``. Raises `ValueError` for a name that
        no plugin registers (with the nearest ones) and `ImportError` if the plugin cannot be imported.
        """
        from openmm_mlff.forces.mlpotential import MLFFPotentialImpl
        from openmm_mlff.potentials.family import find_family

        return MLFFPotentialImpl(name, find_family(name), args)


class UnknownPotential(KeyError, ValueError):
    """``MLPotential(name)`` with a name that nobody registered; a `KeyError`, as openmm-ml raises by itself."""

    def __str__(self) -> str:
        return str(self.args[0])


class _Registry(dict[str, Any]):
    """openmm-ml's table of factories, whose missing names are explained."""

    def __missing__(self, name: str) -> NoReturn:
        raise UnknownPotential(f"name: no potential is called {name!r}; {_plugins.near(str(name), self)}")


class UnknownEmbedding(KeyError, ValueError):
    """``createMixedSystem(embedding=name)`` with a name that neither the potential nor anybody else offers."""

    def __str__(self) -> str:
        return str(self.args[0])


class _Embeddings(dict[str, Any]):
    """openmm-ml's table of embeddings, which it asks for those that the potential itself does not offer."""

    def __missing__(self, name: str) -> NoReturn:
        if name == "electrostatic":
            why = "needs a potential that predicts charges, and this one does not"
        else:
            why = "is not known"
        offered = ", ".join(repr(known) for known in sorted(self))
        more = "" if name == "electrostatic" else ", and those that predict charges 'electrostatic'"
        raise UnknownEmbedding(f"embedding: {name!r} {why}; every potential offers {offered}{more}")


def _explain_unknown_names() -> None:
    # MLPotential('spokynet') ends in openmm-ml's plain dict with a bare KeyError before any factory is asked, so the
    # table itself has to know the near names; what it holds and how it is filled stays as it is
    potential = getattr(sys.modules.get("openmmml.mlpotential"), "MLPotential", None)
    for table, explaining in (("_implFactories", _Registry), ("_embeddingFactories", _Embeddings)):
        if type(getattr(potential, table, None)) is dict:
            setattr(potential, table, explaining(getattr(potential, table)))
