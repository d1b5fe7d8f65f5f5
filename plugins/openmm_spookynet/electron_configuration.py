"""Ground-state electron configurations of the elements as the input of SpookyNet's nuclear embedding.

Twenty numbers per element, each divided by its largest value over Z = 1..86: Z, the occupation of the subshells in the
order below, and the valence s, p, d, f electrons, counted outside the preceding noble-gas core.
"""

from __future__ import annotations

import torch
from torch import Tensor

Z_MAX = 86
SUBSHELLS = ("1s", "2s", "2p", "3s", "3p", "4s", "3d", "4p", "5s", "4d", "5p", "6s", "4f", "5d", "6p")
CAPACITY = {"s": 2, "p": 6, "d": 10, "f": 14}
NOBLE_GASES = (2, 10, 18, 36, 54, 86)
# elements that do not follow the Madelung order: what they really hold (NIST Atomic Spectra Database)
EXCEPTIONS: dict[int, dict[str, int]] = {
    24: {"4s": 1, "3d": 5},
    29: {"4s": 1, "3d": 10},
    41: {"5s": 1, "4d": 4},
    42: {"5s": 1, "4d": 5},
    44: {"5s": 1, "4d": 7},
    45: {"5s": 1, "4d": 8},
    46: {"5s": 0, "4d": 10},
    47: {"5s": 1, "4d": 10},
    57: {"4f": 0, "5d": 1},
    58: {"4f": 1, "5d": 1},
    64: {"4f": 7, "5d": 1},
    78: {"6s": 1, "5d": 9},
    79: {"6s": 1, "5d": 10},
}


def occupation(z: int) -> dict[str, int]:
    """Electrons in each subshell of the neutral ground-state atom."""
    left, filled = z, {}
    for shell in SUBSHELLS:
        filled[shell] = min(left, CAPACITY[shell[1]])
        left -= filled[shell]
    return filled | EXCEPTIONS.get(z, {})


def electron_configuration_table() -> Tensor:
    """``(87, 20)`` float64; row 0 is zero."""
    table = torch.zeros(Z_MAX + 1, 20, dtype=torch.float64)
    for z in range(1, Z_MAX + 1):
        filled = occupation(z)
        core = occupation(max((n for n in NOBLE_GASES if n < z), default=0))
        valence = {kind: sum(filled[s] - core[s] for s in SUBSHELLS if s[1] == kind) for kind in "spdf"}
        table[z] = torch.tensor([z, *(filled[s] for s in SUBSHELLS), *valence.values()])
    return table / table.amax(0)
