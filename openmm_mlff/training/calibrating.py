"""an ensemble, labelled structures -> factors of its spreads, a limit for simulations, and how far to trust them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis import calibration
from openmm_mlff.analysis.calibration_plots import plot_calibration
from openmm_mlff.analysis.errors import Comparison
from openmm_mlff.data.model_file import CARD_FIELDS, load_card
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.evaluation import compare

#: share of the frames that count as bad, and the share of false alarms at which they have to be noticed
WORST, FALSE_ALARMS = 0.05, 0.2


@dataclass(frozen=True)
class Uncertainties:
    """Errors and spreads of one set of structures.

    Attributes:
        counts: atoms per structure ``(n,)``; structures of one atom, which feel no force, are left out of all others.
        energy_errors, energy_spreads: ``(n,)`` eV.
        force_errors, force_spreads: of each atom's force, ``(N,)`` eV/angstrom.
        classes: of each structure, ``(n,)``.
    """

    counts: np.ndarray
    energy_errors: np.ndarray
    energy_spreads: np.ndarray
    force_errors: np.ndarray
    force_spreads: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, comparison: Comparison, by: str) -> Uncertainties:
        """Of a comparison of a model with spreads. Raises `ValueError` if it or its labels lack energies or forces."""
        for name in ("energy", "forces"):
            if name not in comparison.spread:
                raise ValueError(f"model: expected one with spreads of {name} (an ensemble), got one without")
            if name not in comparison.reference:
                raise ValueError(f"structures: expected labels of {name}, found none")
        energy = np.abs(comparison.predicted["energy"] - comparison.reference["energy"])
        force = np.linalg.norm(comparison.predicted["forces"] - comparison.reference["forces"], axis=1)
        starts = np.cumsum(comparison.counts) - comparison.counts
        known = ~np.isnan(energy) & ~np.isnan(np.add.reduceat(force, starts)) & (comparison.counts > 1)
        if not known.any():
            raise ValueError("structures: expected some with labels of energy and forces, found none")
        atoms = np.repeat(known, comparison.counts)
        labels = comparison.labels(by)
        return cls(
            comparison.counts[known],
            energy[known],
            comparison.spread["energy"][known],
            force[atoms],
            comparison.spread["forces"][atoms],
            [label for label, k in zip(labels, known, strict=True) if k],
        )

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Largest force error and largest force spread of each structure, ``(n,)`` eV/angstrom."""
        force_errors, force_spreads = (
            calibration.largest_by_structure(x, self.counts) for x in (self.force_errors, self.force_spreads)
        )
        return force_errors, force_spreads

    def classes_of_atoms(self) -> list[str]:
        """The structure's class for each atom."""
        return [str(name) for name in np.repeat(np.asarray(self.classes), self.counts)]


def fit(valid: Uncertainties, margin: float) -> dict[str, float]:
    """``energy_factor``, ``force_factor`` and ``force_limit`` (see `EnsembleConfig`) from validation data.

    Args:
        margin: the limit is this times the largest uncertainty of a force in the validation data, which is all in the
            domain; a long simulation meets rarer frames than a validation set holds.
    """
    force_factor = calibration.fit_factor(valid.force_errors, valid.force_spreads)
    return {
        "energy_factor": calibration.fit_factor(valid.energy_errors, valid.energy_spreads),
        "force_factor": force_factor,
        "force_limit": margin * force_factor * float(valid.force_spreads.max()),
    }


def calibrate(
    model: Potential,
    valid: Sequence[Structure],
    test: Sequence[Structure],
    folder: str | Path,
    name: str = "calibration",
    by: str = "all",
    margin: float = 2.0,
) -> dict[str, Any]:
    """Find the factors on `valid`, judge them on `test`, and write ``<name>_forces.png`` and ``<name>_energy.png``.

    Returns ``factors`` (see `fit`), ``forces`` and ``energy`` (see `calibration.report`), and ``frames``: what is
    noticed of the frames with the largest force errors, all and by class (``flagged``, ``spearman``, ``n``).

    Raises `ValueError` for a model without spreads or structures without labels.
    """
    seen = Uncertainties.of(compare(model, valid), "all")
    unseen = Uncertainties.of(compare(model, test), by)
    factors = fit(seen, margin)
    forces = calibration.report(
        unseen.force_errors, unseen.force_spreads, unseen.classes_of_atoms(), factors["force_factor"], 3
    )
    energy = calibration.report(
        unseen.energy_errors, unseen.energy_spreads, unseen.classes, factors["energy_factor"], 1
    )
    frames = unseen.frames()
    rescaled = (frames[0], factors["force_factor"] * frames[1])
    folder = Path(folder)
    many = rescaled if len(frames[0]) >= 20 else None
    plot_calibration(forces, folder / f"{name}_forces.png", "eV/Å", many, "forces on atoms", WORST)
    plot_calibration(energy, folder / f"{name}_energy.png", "eV", None, "energies")
    return {
        "factors": factors,
        "margin": margin,
        "structures": {"valid": len(seen.counts), "test": len(unseen.counts)},
        "forces": forces,
        "energy": energy,
        "frames": {"worst": WORST, "false_alarms": FALSE_ALARMS, "rows": _frame_rows(*frames, unseen.classes)},
    }


def _frame_rows(errors: np.ndarray, spreads: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    labels = np.asarray(classes)
    rows = []
    for name in ("all", *np.unique(labels).tolist()):
        m = np.ones(len(errors), dtype=bool) if name == "all" else labels == name
        found = calibration.spearman(errors[m], spreads[m])
        rows.append(
            {
                "name": str(name),
                "n": int(m.sum()),
                "spearman": None if np.isnan(found) else found,
                # fewer than 20 frames have no worst 5 %
                "flagged": calibration.flagged(errors[m], spreads[m], WORST, FALSE_ALARMS) if m.sum() >= 20 else None,
            }
        )
    return rows


def save_calibrated(model: Ensemble, source: str | Path, path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write the ensemble of the file `source` again, with the factors and a summary of the calibration in its card."""
    card = load_card(source)
    kept = {name: card[name] for name in (*CARD_FIELDS, "members") if name in card}
    details = calibration.summary({name: result[name] for name in ("forces", "energy")})
    frames = dict(result["frames"]["rows"][0])
    calibrated = Ensemble(list(model.members.values()), **result["factors"])
    return save_potential(calibrated, path, **kept, calibration={**details, "frames": frames, **result["factors"]})
