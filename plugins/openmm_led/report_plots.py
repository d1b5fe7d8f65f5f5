"""a comparison -> pictures."""

from __future__ import annotations

from pathlib import Path

from openmm_led.comparison import Comparison


def plot_all(comparison: Comparison, folder: Path) -> list[Path]:
    return []
