"""The one factory that openmm-ml instantiates, for every potential of every plugin.

``import openmmml`` imports and instantiates all registered factories while it is itself half imported, without
catching errors. So this module imports the standard library only: a broken plugin cannot break openmm-ml, and torch is
loaded when a potential is made, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmm_mlff import _plugins

if TYPE_CHECKING:
    from openmm_mlff.forces.mlpotential import MLFFPotentialImpl


class Factory:
    """What the entry points of group ``openmmml.potentials`` name; the counterpart of `MLPotentialImplFactory`."""

    def createImpl(self, name: str, **args: Any) -> MLFFPotentialImpl:
        """Make the implementation behind ``MLPotential(name, **args)``.

        The family is found in the entry-point group ``openmm_mlff.potentials``. Raises `ValueError` for a name that
        no plugin registers (with the nearest ones) and `PluginError` if the plugin cannot be imported.
        """
        family = _plugins.load(_plugins.POTENTIALS, name)
        from openmm_mlff.forces.mlpotential import MLFFPotentialImpl

        return MLFFPotentialImpl(name, family, args)
