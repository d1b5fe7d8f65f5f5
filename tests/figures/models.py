"""What the JSON files say of the figures in models/README.md."""

from __future__ import annotations

from collections.abc import Iterator

from .common import NUMBERS, Read


def figures(read: Read) -> Iterator[str]:
    networks = read("resolv_networks")
    layers = NUMBERS[int(networks["network"].split("l")[1])]
    yield f"({layers} layers of SO3krates, {round(networks['parameters'], -3):,} numbers each)"
    members = read("spookynet_bio_release")["calibration"]["n_members"]
    yield f"`spookynet-gfn2-bio.safetensors`: the {NUMBERS[members]} SpookyNets"
