"""How figures are written on the pages."""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from math import ceil, floor, log10
from typing import Any

#: the contents of ``benchmarks/<name>.json``
Read = Callable[[str], dict[str, Any]]

NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def signed(x: float, digits: int = 0) -> str:
    """With a minus sign as it is printed, and thousands apart."""
    return f"{x:,.{digits}f}".replace("-", "−")


def rounded(x: float, digits: int = 0) -> str:
    """Halves go up, as a reader of a JSON file that holds few digits rounds; thousands apart."""
    return f"{Decimal(str(x)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,f}"


def significant(x: float, digits: int = 3) -> str:
    """Thousands apart; without decimals where the number is shorter than `digits`."""
    return f"{float(f'{x:.{digits}g}'):,.0f}" if x >= 10**digits else f"{x:.0f}"


def within(x: float) -> str:
    """One digit and a power of ten that `x` does not exceed, or by no more than 5 %."""
    exponent = floor(log10(x))
    digit = ceil(x / 1.05 / 10**exponent)
    return power(digit * 10.0**exponent)


def floored(x: float) -> str:
    """The first digit alone, for "at least"."""
    scale = 10 ** floor(log10(x))
    return f"{floor(x / scale) * scale:,}"


def power(x: float) -> str:
    """One digit and a power of ten: 6e-9."""
    return f"{x:.0e}".replace("e-0", "e-")


def value(found: dict[str, float], digits: int) -> str:
    """A value with its error."""
    return f"{rounded(found['value'], digits)} ± {rounded(found['error'], digits)}"
