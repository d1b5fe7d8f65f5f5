"""LED: learning the effective dynamics of molecules by an autoencoder and a recurrent mixture-density network.

Vlachas, Zavadlav, Praprotnik, Koumoutsakos, J. Chem. Theory Comput. 18, 538 (2022). An encoder finds a low-dimensional
latent state, a recurrent network with a mixture density propagates it, a mixture-density decoder samples positions that
belong to it. Units: nm, ps, radians.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmm_led.config import LEDConfig, LEDOptions
from openmm_led.features import Features
from openmm_led.model import LED
from openmm_led.training import LEDLearner
from openmm_led.trajectories import Trajectories, read_trajectories
from openmm_mlff.sampling.propagators import Propagator, PropagatorFamily

if TYPE_CHECKING:
    import torch


def read(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Propagator:
    """The propagator of a model file: LED itself, or one of the baselines beside it."""
    form = card["config"].get("form")
    if form == "led":
        return LED.from_card(card, tensors)
    from openmm_led import baselines

    forms = {"msm": baselines.MSMPropagator, "linear_gaussian": baselines.LinearGaussian}
    if form not in forms:
        raise ValueError(f"model: expected the form led, {', '.join(forms)} in the card's config, got {form!r}")
    return forms[form].from_card(card, tensors)


family = PropagatorFamily("led", read)

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
