"""errors, spreads -> whether an ensemble knows how wrong it is, and the factor that makes it so.

If the spread s of an error with d components (1 of an energy, 3 of a force; s^2 is the sum of their variances) is
right, |error| sqrt(d) / s is distributed as chi with d degrees of freedom, and its cumulative probability u uniformly
between 0 and 1. What is measured:

* the calibration curve, the share of errors with u <= p against p, and the miscalibration area between it and the
  diagonal (Kuleshov, Fenner, Ermon, ICML 2018; Tran et al., Mach. Learn.: Sci. Technol. 1, 025006 (2020));
* the factor of all spreads that makes the sum of their squares that of the errors, found on validation data;
* errors against spreads in bins of equally many, which should agree (Levi et al., Sensors 22, 5540 (2022));
* whether order is kept: Spearman's rank correlation;
* whether bad frames are noticed: how many of the worst are flagged at a given share of false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def chi_probability(x: np.ndarray, dimensions: int) -> np.ndarray:
    """Cumulative probability of the chi distribution with 1 or 3 degrees of freedom (`ValueError` for others)."""
    half = torch.special.erf(torch.as_tensor(x, dtype=torch.float64) / math.sqrt(2.0)).numpy()
    if dimensions == 1:
        return np.asarray(half)
    if dimensions == 3:
        # infinitely many spreads away: the second term is zero
        far = np.where(np.isfinite(x), x, 0.0)
        return np.asarray(half - math.sqrt(2.0 / math.pi) * far * np.exp(-0.5 * far**2))
    raise ValueError(f"dimensions: expected 1 (energies) or 3 (forces), got {dimensions!r}")


def probabilities(errors: np.ndarray, spreads: np.ndarray, factor: float = 1.0, dimensions: int = 1) -> np.ndarray:
    """Cumulative probability u of each error given its spread times `factor`, ``(n,)``.

    Args:
        errors: magnitudes ``(n,)``. spreads: standard deviations ``(n,)``, in the unit of the errors.
    """
    errors, spreads = _checked(errors, spreads)
    tiny = np.finfo(np.float64).tiny
    with np.errstate(over="ignore"):
        x = errors * math.sqrt(dimensions) / np.maximum(factor * spreads, tiny)
    return chi_probability(x, dimensions)


def calibration_curve(
    errors: np.ndarray, spreads: np.ndarray, factor: float = 1.0, dimensions: int = 1, points: int = 99
) -> tuple[np.ndarray, np.ndarray]:
    """Expected shares p, evenly spaced inside (0, 1), and the shares of errors that are within them; ``(points,)``."""
    u = np.sort(probabilities(errors, spreads, factor, dimensions))
    expected = np.arange(1, points + 1) / (points + 1)
    return expected, np.searchsorted(u, expected, side="right") / len(u)


def miscalibration_area(
    errors: np.ndarray, spreads: np.ndarray, factor: float = 1.0, dimensions: int = 1, points: int = 99
) -> float:
    """Area between the calibration curve and the diagonal: 0 if calibrated, 1/2 if every error is beyond or within."""
    expected, observed = calibration_curve(errors, spreads, factor, dimensions, points)
    # both ends of the curve are on the diagonal
    gap = np.abs(np.concatenate([[0.0], observed - expected, [0.0]]))
    width = np.diff(np.concatenate([[0.0], expected, [1.0]]))
    return float((0.5 * (gap[1:] + gap[:-1]) * width).sum())


def fit_factor(errors: np.ndarray, spreads: np.ndarray) -> float:
    """sqrt(sum error^2 / sum spread^2): with it, spreads have the mean square of the errors.

    It weights what is uncertain, unlike the mean of (error / spread)^2, which a few accidentally small spreads of two
    or three members dominate. Raises `ValueError` if all spreads or all errors are zero.
    """
    errors, spreads = _checked(errors, spreads)
    numerator, denominator = float(np.square(errors).sum()), float(np.square(spreads).sum())
    if numerator == 0 or denominator == 0:
        raise ValueError("spreads: expected errors and spreads above zero, got only zeros")
    return math.sqrt(numerator / denominator)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, equal values with their mean rank; NaN if there are fewer than 3 or all of one are equal."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) != len(y):
        raise ValueError(f"y: expected {len(x)} values, got {len(y)}")
    if len(x) < 3:
        return float("nan")
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - 0.5 * (counts - 1.0))[index]


def binned(errors: np.ndarray, spreads: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """Root mean squares of ``spread`` and ``error`` and the number ``n`` in bins of about equally many, by spread."""
    errors, spreads = _checked(errors, spreads)
    parts = [p for p in np.array_split(np.argsort(spreads, kind="stable"), bins) if len(p)]
    return {
        "spread": np.array([math.sqrt(np.square(spreads[p]).mean()) for p in parts]),
        "error": np.array([math.sqrt(np.square(errors[p]).mean()) for p in parts]),
        "n": np.array([len(p) for p in parts]),
    }


def roc(errors: np.ndarray, spreads: np.ndarray, worst: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Share of false alarms and share of the worst that is flagged, as the limit of the spread comes down.

    Args:
        worst: share of the entries that count as bad, those with the largest errors (at least one).

    Raises `ValueError` unless there are bad and other entries.
    """
    errors, spreads = _checked(errors, spreads)
    n = len(errors)
    n_bad = max(1, round(worst * n))
    if not 0 < n_bad < n:
        raise ValueError(f"worst: expected a share that leaves bad and other entries among {n}, got {worst!r}")
    bad = np.zeros(n, dtype=bool)
    bad[np.argsort(-errors, kind="stable")[:n_bad]] = True
    order = np.argsort(-spreads, kind="stable")
    # entries of one spread are flagged together
    ends = np.flatnonzero(np.append(np.diff(spreads[order]) != 0, True))
    hits, alarms = np.cumsum(bad[order])[ends], np.cumsum(~bad[order])[ends]
    return np.append(0.0, alarms / (n - n_bad)), np.append(0.0, hits / n_bad)


def flagged(errors: np.ndarray, spreads: np.ndarray, worst: float = 0.05, false_alarms: float = 0.2) -> float:
    """Share of the worst entries that is flagged by a limit on the spread with this share of false alarms."""
    alarms, hits = roc(errors, spreads, worst)
    return float(np.interp(false_alarms, alarms, hits))


def largest_by_structure(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Largest of the values of each structure's atoms: ``(n_atoms,)``, ``(n,)`` atom counts -> ``(n,)``."""
    starts = np.cumsum(counts) - counts
    return np.asarray(np.maximum.reduceat(np.asarray(values, dtype=np.float64), starts))


def report(
    errors: np.ndarray,
    spreads: np.ndarray,
    classes: Sequence[str],
    factor: float = 1.0,
    dimensions: int = 1,
) -> dict[str, Any]:
    """All of the above as plain numbers, for all entries and for each class (in alphabetical order).

    Args:
        classes: of each entry, ``(n,)``.
        factor: of the spreads, found on other data; ``area`` is the miscalibration area without it, ``area_rescaled``
            with it.

    Returns ``factor``, ``curve``, ``curve_rescaled`` (each [expected, observed]), ``bins`` (with the factor), and
    ``rows``: ``name``, ``n``, ``rmse``, ``rms_spread``, ``spearman``, ``area``, ``area_rescaled``, and ``best_factor``
    (that of this class alone; None if it has no errors or no spreads).
    """
    errors, spreads = _checked(errors, spreads)
    labels = np.asarray(classes)
    if len(labels) != len(errors):
        raise ValueError(f"classes: expected {len(errors)} values, got {len(labels)}")
    chosen = [("all", np.ones(len(errors), dtype=bool))]
    chosen += [(str(name), labels == name) for name in np.unique(labels)]
    curves = [calibration_curve(errors, spreads, f, dimensions) for f in (1.0, factor)]
    return {
        "factor": factor,
        "dimensions": dimensions,
        "curve": [x.tolist() for x in curves[0]],
        "curve_rescaled": [x.tolist() for x in curves[1]],
        "bins": {name: values.tolist() for name, values in binned(errors, factor * spreads).items()},
        "rows": [_row(name, errors[m], spreads[m], factor, dimensions) for name, m in chosen],
    }


def _row(name: str, errors: np.ndarray, spreads: np.ndarray, factor: float, dimensions: int) -> dict[str, Any]:
    correlation = spearman(errors, spreads)
    return {
        "name": name,
        "n": len(errors),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "rms_spread": float(np.sqrt(np.square(spreads).mean())),
        "spearman": None if math.isnan(correlation) else correlation,
        "area": miscalibration_area(errors, spreads, 1.0, dimensions),
        "area_rescaled": miscalibration_area(errors, spreads, factor, dimensions),
        "best_factor": fit_factor(errors, spreads) if errors.any() and spreads.any() else None,
    }


def _checked(errors: np.ndarray, spreads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes and spreads as float64; `ValueError` naming the argument."""
    e, s = np.abs(np.asarray(errors, dtype=np.float64)), np.asarray(spreads, dtype=np.float64)
    if e.ndim != 1 or len(e) == 0:
        raise ValueError(f"errors: expected shape (n,) with at least one, got {e.shape}")
    if s.shape != e.shape:
        raise ValueError(f"spreads: expected shape {e.shape}, got {s.shape}")
    if not np.isfinite(e).all():
        raise ValueError("errors: expected finite numbers, got NaN or infinity")
    if not (np.isfinite(s).all() and (s >= 0).all()):
        raise ValueError("spreads: expected finite numbers >= 0, got NaN, infinity or negative ones")
    return e, s


def summary(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The overall rows of several reports by name, for a model card."""
    return {name: dict(content["rows"][0]) for name, content in reports.items()}
