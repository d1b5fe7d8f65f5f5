"""LED: learning the effective dynamics of molecules by an autoencoder and a recurrent mixture-density network.

Vlachas, Zavadlav, Praprotnik, Koumoutsakos, J. Chem. Theory Comput. 18, 538 (2022). An encoder finds a low-dimensional
latent state, a recurrent network with a mixture density propagates it, a mixture-density decoder samples positions that
belong to it. Units: nm, ps, radians.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_led.config import LEDConfig, LEDOptions
    from openmm_led.features import Features
    from openmm_led.model import LED
    from openmm_led.registration import family
    from openmm_led.training import LEDLearner
    from openmm_led.trajectories import Trajectories, read_trajectories

#: what this package exports, and where it is; imported when it is asked for, so that the command line's help is quick
_HOME = {
    "LED": "model",
    "Features": "features",
    "LEDConfig": "config",
    "LEDLearner": "training",
    "LEDOptions": "config",
    "Trajectories": "trajectories",
    "family": "registration",
    "read_trajectories": "trajectories",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


__all__ = [
    "LED",
    "Features",
    "LEDConfig",
    "LEDLearner",
    "LEDOptions",
    "Trajectories",
    "family",
    "read_trajectories",
]
