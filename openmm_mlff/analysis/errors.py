"""predictions, references -> tables of errors, with error bars that respect trajectories.

Frames of one trajectory are correlated, so the uncertainty of an error comes from resampling whole groups (bootstrap;
Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 8), not single frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: what is compared, the unit of its errors, and whether it has a row per structure or per atom
QUANTITIES = {
    "energy": ("meV/atom", "structure"),
    "forces": ("meV/Å", "atom"),
    "dipole": ("me·Å", "structure"),
    "charges": ("me", "atom"),
}
#: ways to take structures together in a table
KEYS = ("all", "formula", "charge", "multiplicity", "group")


@dataclass(frozen=True)
class Comparison:
    """Predicted and reference values of ``n`` structures with ``N`` atoms in all, laid end to end.

    Attributes:
        counts: atoms per structure, ``(n,)``.
        groups: trajectory or molecule of each structure; unnamed ones ("") count as groups of their own.
        formulas, charges, multiplicities: of each structure.
        reference, predicted: by quantity, in eV, angstrom and e: energy ``(n,)``, forces ``(N, 3)``, dipole ``(n, 3)``,
            charges ``(N,)``. NaN in a reference is a missing label.
        infos: what else is known of each structure (`Structure.info`), empty if nothing; a key of it can stand for one
            of `KEYS`.
        spread: uncertainties of models that have them: energy ``(n,)`` eV, forces ``(N,)`` eV/angstrom.

    Raises `ValueError` naming the argument if lengths do not fit or a prediction is not finite.
    """

    counts: np.ndarray
    groups: Sequence[str]
    formulas: Sequence[str]
    charges: Sequence[int]
    multiplicities: Sequence[int]
    reference: Mapping[str, np.ndarray]
    predicted: Mapping[str, np.ndarray]
    infos: Sequence[Mapping[str, Any]] = ()
    spread: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, atoms = len(self.counts), int(np.sum(self.counts))
        if n == 0:
            raise ValueError("counts: expected at least one structure, got none")
        for name in ("groups", "formulas", "charges", "multiplicities"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name}: expected {n} values, one per structure, got {len(getattr(self, name))}")
        if len(self.infos) not in (0, n):
            raise ValueError(f"infos: expected {n} values, one per structure, or none, got {len(self.infos)}")
        for source in ("reference", "predicted", "spread"):
            for name, values in getattr(self, source).items():
                if name not in QUANTITIES:
                    raise ValueError(f"{source}: expected quantities among {', '.join(QUANTITIES)}, got {name!r}")
                rows = n if QUANTITIES[name][1] == "structure" else atoms
                if len(values) != rows:
                    raise ValueError(f"{source}: expected {rows} rows of {name}, got {len(values)}")
        for name, values in self.predicted.items():
            if not np.isfinite(values).all():
                raise ValueError(f"predicted: expected finite {name}, got NaN or infinity")

    @property
    def quantities(self) -> list[str]:
        """Quantities that have both predictions and references."""
        return [q for q in QUANTITIES if q in self.predicted and q in self.reference]

    def errors(self, quantity: str) -> np.ndarray:
        """Prediction minus reference in thousandths (meV, me); energies per atom; NaN where there is no label."""
        difference = 1e3 * (np.asarray(self.predicted[quantity]) - np.asarray(self.reference[quantity]))
        return difference / self.counts if quantity == "energy" else difference

    def labels(self, key: str) -> list[str]:
        """What each structure is called under one of `KEYS` or a key of its info ("-" if it has none of that name)."""
        if key == "all":
            return ["all"] * len(self.counts)
        if key not in KEYS:
            if not any(key in info for info in self.infos):
                known = sorted({name for info in self.infos for name in info})
                raise ValueError(f"key: expected one of {', '.join([*KEYS, *known])}, got {key!r}")
            return [str(info.get(key, "-")) for info in self.infos]
        values: dict[str, Sequence[Any]] = {
            "formula": self.formulas,
            "charge": [f"{int(c):+d}" if c else "0" for c in self.charges],
            "multiplicity": self.multiplicities,
            "group": [g or f"structure {i}" for i, g in enumerate(self.groups)],
        }
        return [str(v) for v in values[key]]


@dataclass(frozen=True)
class Sums:
    """Per structure: sum of |error|, sum of squares and number of known components, ``(n,)`` each."""

    absolute: np.ndarray
    square: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, comparison: Comparison, quantity: str) -> Sums:
        error = comparison.errors(quantity).reshape(len(comparison.predicted[quantity]), -1)
        known = ~np.isnan(error)
        error = np.where(known, error, 0.0)
        parts = [np.abs(error).sum(1), np.square(error).sum(1), known.sum(1).astype(np.float64)]
        if QUANTITIES[quantity][1] == "atom":
            start = np.cumsum(comparison.counts) - comparison.counts
            parts = [np.add.reduceat(p, start) for p in parts]
        return cls(*parts)

    def by(self, index: np.ndarray, n: int) -> Sums:
        """Sums over the structures with the same index."""
        return Sums(*(np.bincount(index, weights=v, minlength=n) for v in (self.absolute, self.square, self.number)))


def bootstrap(sums: Sums, groups: Sequence[str], samples: int, seed: int) -> tuple[float, float]:
    """Standard errors of MAE and RMSE from resampling whole groups with replacement; NaN for fewer than two groups."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    total = sums.by(index, len(names))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=samples)  # (samples, n_groups)
    number = weights @ total.number
    known = number > 0
    mae = (weights @ total.absolute)[known] / number[known]
    rmse = np.sqrt((weights @ total.square)[known] / number[known])
    return float(mae.std(ddof=1)), float(rmse.std(ddof=1))


def error_table(comparison: Comparison, by: str = "all", samples: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each value of `by` (one of `KEYS`), in alphabetical order.

    Each row has ``name``, ``structures``, ``groups``, and for each quantity ``<quantity>_mae``, ``_rmse``,
    ``_mae_error`` and ``_rmse_error`` (bootstrap over groups; None for a single group) and ``_max``
    (largest |error|), in the units of `QUANTITIES`. Quantities without any label in a row are left out of it.
    """
    labels = np.asarray(comparison.labels(by))
    groups = np.asarray(comparison.labels("group"))
    structure_of_atom = np.repeat(np.arange(len(comparison.counts)), comparison.counts)
    sums = {q: Sums.of(comparison, q) for q in comparison.quantities}
    rows = []
    for name in np.unique(labels):
        picked = np.flatnonzero(labels == name)
        row: dict[str, Any] = {"name": str(name), "structures": len(picked), "groups": len(np.unique(groups[picked]))}
        for quantity, all_sums in sums.items():
            part = Sums(all_sums.absolute[picked], all_sums.square[picked], all_sums.number[picked])
            n = part.number.sum()
            if n == 0:
                continue
            error = np.abs(comparison.errors(quantity))
            chosen = picked if QUANTITIES[quantity][1] == "structure" else np.isin(structure_of_atom, picked)
            mae_error, rmse_error = bootstrap(part, groups[picked].tolist(), samples, seed)
            row |= {
                f"{quantity}_mae": float(part.absolute.sum() / n),
                f"{quantity}_rmse": float(np.sqrt(part.square.sum() / n)),
                f"{quantity}_mae_error": None if np.isnan(mae_error) else mae_error,
                f"{quantity}_rmse_error": None if np.isnan(rmse_error) else rmse_error,
                f"{quantity}_max": float(np.nanmax(error[chosen])),
            }
        rows.append(row)
    return rows


def side_by_side(
    comparisons: Mapping[str, Comparison], by: str = "all", samples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of `error_table` for several models on the same structures, in alphabetical order of `by`.

    Each row has ``name``, ``structures``, ``groups`` and, by the model's name, the errors. Raises `ValueError` if the
    models were compared on different structures.
    """
    tables = {name: error_table(comparison, by, samples, seed) for name, comparison in comparisons.items()}
    first, *others = comparisons.values()
    for other in others:
        if not np.array_equal(first.counts, other.counts) or list(first.formulas) != list(other.formulas):
            raise ValueError("comparisons: expected the same structures in the same order for every model")
    shared = ("name", "structures", "groups")
    return [
        {key: rows[0][key] for key in shared}
        | {
            model: {key: value for key, value in row.items() if key not in shared}
            for model, row in zip(tables, rows, strict=True)
        }
        for rows in zip(*tables.values(), strict=True)
    ]


def error_tables(
    comparison: Comparison, samples: int = 1000, seed: int = 0, more: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """`error_table` for all, for every key that tells at least two kinds of structures apart, and for `more` keys."""
    tables = {"all": error_table(comparison, "all", samples, seed)}
    for key in KEYS[1:]:
        if len(set(comparison.labels(key))) > 1 and not (key == "group" and not any(comparison.groups)):
            tables[key] = error_table(comparison, key, samples, seed)
    for key in more:
        tables.setdefault(key, error_table(comparison, key, samples, seed))
    return tables
