"""What LED registers with the core: how a propagator is made from a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmm_mlff.sampling.propagators import Propagator, PropagatorFamily

if TYPE_CHECKING:
    import torch


def read(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Propagator:
    """The propagator of a model file: LED itself, or one of the baselines beside it."""
    form = card["config"].get("form")
    if form == "led":
        from openmm_led.model import LED

        return LED.from_card(card, tensors)
    from openmm_led import baselines

    forms: dict[str, Any] = {"msm": baselines.MSMPropagator, "linear_gaussian": baselines.LinearGaussian}
    if form not in forms:
        raise ValueError(f"model: expected the form led, {', '.join(forms)} in the card's config, got {form!r}")
    found: Propagator = forms[form].from_card(card, tensors)
    return found


family = PropagatorFamily("led", read)
