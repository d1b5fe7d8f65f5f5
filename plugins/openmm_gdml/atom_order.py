"""Clear errors for atoms in another order than the training data had them."""

from __future__ import annotations

import numpy as np

from openmm_mlff.data.structures import SYMBOLS, formula


def symbols(numbers: np.ndarray) -> str:
    """``C C O H ...``, at most twelve."""
    names = [SYMBOLS[z] for z in numbers[:12]]
    return " ".join(names) + (" ..." if len(numbers) > 12 else "")


def wrong_atoms(expected: np.ndarray, numbers: np.ndarray) -> str:
    """The message for atoms that are not those of the model, or not in their order."""
    if not np.array_equal(np.sort(expected), np.sort(numbers)):
        return (
            f"elements: this model describes {formula(expected)} only, in the order {symbols(expected)}, got "
            f"{formula(numbers)} ({len(numbers)} atoms)"
        )
    return (
        f"elements: expected the atoms in the order of the training data, {symbols(expected)}, got {symbols(numbers)}"
    )
