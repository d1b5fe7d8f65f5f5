"""Structures of one molecule as arrays, checked for what a kernel model cannot be trained on; stratified choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_gdml.descriptors import inverse_distances
from openmm_gdml.model import GDMLPotential
from openmm_gdml.products import ProductLabels
from openmm_mlff.data.structures import Structure, formula

#: two geometries whose inverse distances (1/angstrom) differ by less are the same.
SAME = 1e-6
#: energies and the forces' own energies have to agree in scale within this factor, where they are related at all; units
#: that are mixed up differ by 1.89 (bohr, angstrom) or more, and a poor choice of sigma and lambda by 1.3.
SLOPE = 1.5
#: below this number of geometries the integrated forces are too uncertain for that, and the factor is this one.
FEW, SLOPE_OF_FEW = 50, 3.0
#: and below so many geometries nothing can be said.
FEWEST = 5


@dataclass(frozen=True)
class TrainingSet:
    """Labelled geometries of one composition.

    Attributes:
        numbers: ``(N,)``. positions: ``(M, N, 3)`` angstrom. forces: ``(M, N, 3)`` eV/angstrom.
        energies: ``(M,)`` eV, or None if a structure has none.
        lattice: box vectors as rows, ``(3, 3)`` angstrom, or None. charge, multiplicity: of all.
        products: Hessian-vector products of some geometries, or None.
    """

    numbers: np.ndarray
    positions: Tensor
    forces: Tensor
    energies: Tensor | None
    lattice: np.ndarray | None
    charge: int
    multiplicity: int
    products: ProductLabels | None = None

    @classmethod
    def of(
        cls,
        structures: Sequence[Structure],
        lattice: np.ndarray | None = None,
        like: TrainingSet | None = None,
        least: int = 2,
    ) -> TrainingSet:
        """Check and stack structures.

        Args:
            lattice: instead of the structures' cell, which must then be the same or none.
            like: the training data that these are to validate; they must have the same atoms.
            least: how many structures there must be; from two on, none may occur twice.

        Raises `ValueError` naming the structure and what is wrong with it.
        """
        if len(structures) < least:
            raise ValueError(f"structures: expected at least {least} geometries, got {len(structures)}")
        first = structures[0]
        numbers = first.numbers if like is None else like.numbers
        if len(numbers) < 2:
            raise ValueError("structures: expected molecules of at least two atoms, got a single atom")
        for k, s in enumerate(structures):
            if not np.array_equal(s.numbers, numbers):
                raise ValueError(
                    f"structures: expected {formula(numbers)} with its atoms in one order, got another molecule or "
                    f"order ({s.formula}) as structure {k}"
                )
            if s.forces is None:
                raise ValueError(f"structures: expected forces for every geometry, structure {k} has none")
            if (s.charge, s.multiplicity) != (first.charge, first.multiplicity):
                raise ValueError(f"structures: expected one charge and multiplicity, structure {k} has another")
        energies = [s.energy for s in structures]
        result = cls(
            numbers,
            torch.from_numpy(np.stack([s.positions for s in structures])),
            torch.from_numpy(np.stack([s.forces for s in structures if s.forces is not None])),
            None if None in energies else torch.tensor(energies, dtype=torch.float64),
            _common_lattice(structures, lattice, like),
            first.charge,
            first.multiplicity,
            ProductLabels.of(structures),
        )
        if least > 1:
            result.refuse_duplicates()
        return result

    def __len__(self) -> int:
        return len(self.positions)

    def predict(self, model: GDMLPotential) -> tuple[Tensor, Tensor]:
        """Energies ``(M,)`` eV and forces ``(M, N, 3)`` eV/angstrom of a model for these geometries."""
        lattice = None if self.lattice is None else torch.from_numpy(self.lattice)
        return model.energies_and_forces(self.positions, lattice)

    def errors(self, model: GDMLPotential) -> dict[str, float]:
        """Errors of a model: forces_mae, forces_rmse (eV/angstrom), energy_mae, energy_rmse (eV)."""
        energy, forces = self.predict(model)
        difference = forces - self.forces
        result = {"forces_mae": float(difference.abs().mean()), "forces_rmse": float(difference.square().mean().sqrt())}
        if self.energies is not None:
            difference = energy - self.energies
            result |= {
                "energy_mae": float(difference.abs().mean()),
                "energy_rmse": float(difference.square().mean().sqrt()),
            }
        return result

    def refuse_duplicates(self) -> None:
        """Raise `ValueError` naming geometries that occur twice, or as mirror images, which distances cannot tell."""
        lattice = None if self.lattice is None else torch.from_numpy(self.lattice)
        x = inverse_distances(self.positions, lattice)
        close = []
        for i in range(0, len(x), 256):
            distance = torch.cdist(x[i : i + 256], x, compute_mode="donot_use_mm_for_euclid_dist")
            rows, columns = torch.nonzero(distance < SAME, as_tuple=True)
            close += [(int(a) + i, int(b)) for a, b in zip(rows, columns, strict=True) if int(a) + i < int(b)]
        if close:
            named = ", ".join(f"{a} and {b}" for a, b in close[:5]) + (" ..." if len(close) > 5 else "")
            raise ValueError(
                f"structures: expected different geometries, got {len(close)} pairs of equal ones ({named})"
            )


def _common_lattice(
    structures: Sequence[Structure], lattice: np.ndarray | None, like: TrainingSet | None
) -> np.ndarray | None:
    cells = [s.cell for s in structures]
    if lattice is not None:
        rows = np.asarray(lattice, dtype=np.float64)
        if rows.shape != (3, 3) or abs(np.linalg.det(rows)) < 1e-6:
            raise ValueError(f"lattice: expected three independent box vectors, shape (3, 3), got {rows.tolist()}")
        if all(cell is None for cell in cells):
            raise ValueError("lattice: expected None for open molecules (structures without a cell), got box vectors")
    else:
        first = cells[0] if like is None else like.lattice
        if first is None:
            if any(cell is not None for cell in cells):
                raise ValueError("structures: expected all open or all periodic, got a mixture")
            return None
        rows = first
    for k, cell in enumerate(cells):
        if cell is None or not np.allclose(cell, rows, rtol=0, atol=1e-6):
            raise ValueError(
                f"lattice: expected the same box vectors for all structures, structure {k} has "
                f"{'none' if cell is None else cell.tolist()}"
            )
    return rows


def energies_fit(reference: Tensor, predicted: Tensor) -> None:
    """Refuse energies that are not the integral of the forces, ``(M,)`` eV each.

    The energy that follows from the forces must rise with the given one, and by as much: a slope far from one means
    that energies and forces are in different units, a negative one that gradients were given as forces.

    Raises `ValueError` saying which.
    """
    a, b = predicted - predicted.mean(), reference - reference.mean()
    # any two energies lie on a line, so that a few say nothing
    if len(reference) < FEWEST or float(a.norm()) == 0.0 or float(b.norm()) == 0.0:
        return
    correlation = float(a @ b / (a.norm() * b.norm()))
    slope = float(a @ b / (a @ a))
    if correlation < -0.9:
        raise ValueError(
            "forces: expected forces, but the energies fall where the integrated forces rise; these look like gradients"
        )
    # a model of a few geometries integrates badly between them
    least, most = (0.9, SLOPE) if len(reference) >= FEW else (0.99, SLOPE_OF_FEW)
    if correlation > least and not 1 / most < slope < most:
        raise ValueError(
            f"energy: expected energies in the unit of the forces, but they vary {slope:.4g} times as much as the "
            "forces say; energies and forces are in different units"
        )


def stratified(energies: np.ndarray, n: int, rng: np.random.Generator, allowed: np.ndarray | None = None) -> np.ndarray:
    """Choose geometries so that their energies are spread like those of all.

    The energies are put into a histogram with bins by Freedman and Diaconis (at most n/2 bins); every bin gives its
    share, larger remainders first.

    Args:
        energies: ``(n_structures,)``. n: how many to choose. allowed: indices to choose from, default all.

    Returns sorted indices ``(n,)``. Raises `ValueError` if there are fewer than n.
    """
    pool = np.arange(len(energies)) if allowed is None else np.asarray(allowed)
    if not 1 <= n <= len(pool):
        raise ValueError(f"n: expected 1 to {len(pool)} structures to choose, got {n}")
    values = np.asarray(energies, dtype=np.float64)[pool]
    low, high = np.percentile(values, [25, 75])
    width = 2 * (high - low) / len(values) ** (1 / 3)
    spread = float(values.max() - values.min())
    bins = 1 if width <= 0 or spread <= 0 else int(np.clip(np.ceil(spread / width), 1, max(1, n // 2)))
    which = np.minimum((bins * (values - values.min()) / (spread or 1.0)).astype(int), bins - 1)
    share = np.bincount(which, minlength=bins) * (n / len(values))
    take = np.floor(share).astype(int)
    for k in np.argsort(take - share, kind="stable")[: n - int(take.sum())]:
        take[k] += 1
    chosen = [rng.choice(pool[which == k], take[k], replace=False) for k in range(bins) if take[k]]
    return np.sort(np.concatenate(chosen))
