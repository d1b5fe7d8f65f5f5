"""Labelled geometries of one molecule (or one supercell) -> a GDML model.

    model = GDML(sigma=[10, 20, 30]).fit(structures, validation)

Forces y, divided by their standard deviation, are fitted by (K + lambda 1) alpha = y (see `operators`); the energy then
follows but for a constant, which is the mean difference over the training set. sigma and lambda are chosen by the force
error on validation data. S. Chmiela et al., Sci. Adv. 3, e1603015 (2017); Nat. Commun. 9, 3887 (2018).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_gdml import matching, solvers
from openmm_gdml import permutations as symmetry
from openmm_gdml.algorithmic import AlgorithmicOperator
from openmm_gdml.descriptors import INVERSE_DISTANCES, Descriptor, descriptor, gradients_of, name_of, takes
from openmm_gdml.model import GDMLPotential
from openmm_gdml.operators import KernelOperator
from openmm_gdml.training_set import TrainingSet, energies_fit
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential, save_potential


@dataclass
class GDML:
    """Trains GDML models; the attributes are its settings.

    Attributes:
        sigma: length scale in the unit of the descriptor (1/angstrom); several are compared on validation data.
        lam: regularisation; several are compared on validation data.
        permutations: of equal atoms: ``"auto"`` finds them from bonds (see `permutations.find`), ``"matching"`` by
            comparing geometries (see `matching.find`), ``None`` uses none, or an array ``(S, N)`` that forms a group.
        energy_constraints: fit energies besides forces.
        solver: ``auto``, ``cholesky``, ``cg`` or ``eigen`` (see `solvers.solve`), with its `preconditioner`, inducing
            `columns`, `memory` limit and `tolerance`.
        lattice: box vectors as rows, ``(3, 3)`` angstrom; None takes the structures' own cell.
        descriptor, descriptor_options: what geometries are compared by (see `descriptors`): a name, or a function of
            positions ``(..., N, 3)`` or ``(N, 3)``, which is registered under its own name.
        keep_alphas: whether the model keeps the coefficients before contraction, to train further.
        seed: of the iterative solver's random columns.
        progress: show bars.
        selection: after `fit`: one row per candidate with sigma, lam and errors on validation data.
        solution: after `fit`: how the chosen model's linear system was solved; None if an earlier run did it.
    """

    sigma: float | Sequence[float] = 20.0
    lam: float | Sequence[float] = 1e-10
    permutations: str | np.ndarray | Sequence[Sequence[int]] | None = "auto"
    energy_constraints: bool = False
    solver: str = "auto"
    preconditioner: str = "leverage"
    columns: int | float | None = None
    memory: int | float | str | None = None
    tolerance: float = 1e-4
    lattice: np.ndarray | None = None
    descriptor: str | Descriptor = INVERSE_DISTANCES
    descriptor_options: Mapping[str, Any] = field(default_factory=dict)
    keep_alphas: bool = False
    seed: int = 0
    progress: bool = False
    selection: list[dict[str, Any]] = field(default_factory=list, init=False)
    solution: solvers.Solution | None = field(default=None, init=False)

    def fit(
        self,
        structures: Sequence[Structure],
        validation: Sequence[Structure] | None = None,
        folder: str | Path | None = None,
    ) -> GDMLPotential:
        """Train on all `structures`, which need forces (and energies, for the constant of the energy).

        Args:
            validation: structures to choose sigma and lambda with; needed if there are several.
            folder: where every candidate is kept, so that a second call goes on where the first was interrupted.

        Raises `ValueError` naming what is wrong with the data or a setting, `MemoryError` if the solver cannot stay
        below the memory limit, `ArithmeticError` if it does not converge.
        """
        data = TrainingSet.of(structures, self.lattice)
        valid = None if validation is None else TrainingSet.of(validation, self.lattice, like=data, least=1)
        if self.energy_constraints and data.energies is None:
            raise ValueError("energy_constraints: expected energies for all structures, got structures without")
        group = self._group(data, structures)
        candidates = list(itertools.product(_listed(self.sigma, "sigma"), _listed(self.lam, "lam")))
        if len(candidates) > 1 and valid is None:
            raise ValueError("validation: expected structures to choose sigma and lambda with, got None")
        self.selection = []
        best: tuple[float, GDMLPotential, solvers.Solution | None] | None = None
        for sigma, lam in candidates:
            model, solution, row = self._candidate(data, valid, group, sigma, lam, folder)
            self.selection.append(row)
            error = row.get("forces_rmse", 0.0)
            if best is None or error < best[0]:
                best = error, model, solution
        assert best is not None
        self.solution = best[2]
        self._warn_at_the_edge(best[1])
        return best[1]

    def _group(self, data: TrainingSet, structures: Sequence[Structure]) -> np.ndarray:
        if self.permutations is None:
            return np.arange(len(data.numbers))[None]
        if isinstance(self.permutations, str):
            if self.permutations not in ("auto", "matching"):
                raise ValueError(
                    f"permutations: expected 'auto', 'matching', None or an array, got {self.permutations!r}"
                )
            if data.lattice is not None:
                raise ValueError(
                    "permutations: bonds do not tell the symmetry of a periodic material; expected None or an array "
                    "(openmm_gdml.crystals finds it), got "
                    f"{self.permutations!r}"
                )
            if self.permutations == "matching":
                return matching.find(structures)
            return symmetry.find(structures).group
        return symmetry.validate(self.permutations, data.numbers)

    def _candidate(
        self,
        data: TrainingSet,
        valid: TrainingSet | None,
        group: np.ndarray,
        sigma: float,
        lam: float,
        folder: str | Path | None,
    ) -> tuple[GDMLPotential, solvers.Solution | None, dict[str, Any]]:
        """One fit and its errors on validation data, or both as an earlier run has left them in `folder`."""
        kept = None if folder is None else Path(folder) / f"sigma{sigma:g}_lam{lam:g}"
        about = "" if kept is None else self._fingerprint(data, group)
        if kept is not None and kept.with_name(kept.name + ".json").exists():
            row = json.loads(kept.with_name(kept.name + ".json").read_text(encoding="utf-8"))
            if row.pop("about", about) != about:
                raise ValueError(
                    f"folder: {kept.parent} holds candidates of other data or settings; choose another one"
                )
            model = load_potential(kept.with_name(kept.name + ".safetensors"))
            assert isinstance(model, GDMLPotential)
            return model, None, row
        checkpoint = None if kept is None else kept.with_name(kept.name + ".checkpoint")
        model, solution = self._fit_one(data, group, sigma, lam, checkpoint)
        row = {"sigma": sigma, "lam": lam, "solver": solution.method, "residual": solution.residual}
        row |= {"iterations": solution.iterations, "columns": solution.n_columns, "seconds": solution.seconds}
        if valid is not None:
            row |= valid.errors(model)
        if kept is not None:
            save_potential(model, kept.with_name(kept.name + ".safetensors"))
            content = json.dumps(row | {"about": about}, indent=1) + "\n"
            write_atomically(kept.with_name(kept.name + ".json"), content.encode())
            checkpoint.unlink(missing_ok=True)  # type: ignore[union-attr]
        return model, solution, row

    def _fingerprint(self, data: TrainingSet, group: np.ndarray) -> str:
        """Tells the data and the settings that decide a candidate from others."""
        name, options = self.description(data)
        settings = [name, options, self.energy_constraints, self.solver, self.tolerance, self.seed, self.keep_alphas]
        digest = hashlib.sha256(json.dumps(settings, default=str).encode() + np.ascontiguousarray(group).tobytes())
        products = () if data.products is None else (data.products.directions, data.products.products)
        for tensor in (data.positions, data.forces, data.energies, *products):
            digest.update(b"none" if tensor is None else tensor.numpy().tobytes())
        return digest.hexdigest()

    def _fit_one(
        self, data: TrainingSet, group: np.ndarray, sigma: float, lam: float, checkpoint: Path | None
    ) -> tuple[GDMLPotential, solvers.Solution]:
        limit = solvers.parse_memory(self.memory)
        operator = self.operator(data, group, sigma, limit)
        y = data.forces.flatten()
        offset = 0.0
        if self.energy_constraints:
            assert data.energies is not None
            offset = float(data.energies.mean())
            y = torch.cat([y, data.energies - offset])
        scale = float(y.std(correction=0))
        if not scale > 0:
            raise ValueError("structures: expected forces that are not all equal, got a standard deviation of zero")
        if data.products is not None:
            y = torch.cat([y, data.products.products.flatten()])
        with solvers.progress_bar(f"sigma {sigma:g}, lambda {lam:g}", self.progress) as show:
            solution = solvers.solve(
                operator,
                y / scale,
                self.solver,
                lam,
                preconditioner=self.preconditioner,
                columns=self.columns,
                memory=limit,
                tolerance=self.tolerance,
                checkpoint=checkpoint,
                seed=self.seed,
                progress=show,
            )
        if not solution.converged:
            raise ArithmeticError(
                f"solver: conjugate gradients stopped at a residual of {solution.residual:.1e} after "
                f"{solution.iterations} iterations with {solution.n_columns} inducing columns; allow more memory, more "
                "columns or a larger lam"
            )
        return self._model(data, group, sigma, lam, operator, solution.alpha * scale, offset), solution

    def description(self, data: TrainingSet) -> tuple[str, dict[str, Any]]:
        """Name and options of the descriptor; atomic numbers are filled in where it has an option for them."""
        name, options = name_of(self.descriptor), dict(self.descriptor_options)
        if takes(descriptor(name), "numbers"):
            options.setdefault("numbers", [int(z) for z in data.numbers])
        return name, options

    def operator(
        self, data: TrainingSet, group: np.ndarray, sigma: float, limit: int
    ) -> KernelOperator | AlgorithmicOperator:
        """The kernel matrix of a training set: in closed form for pair descriptors, else by differentiation."""
        name, options = self.description(data)
        gradients = gradients_of(name, options)
        if gradients is not None and data.products is None:
            return KernelOperator(
                data.positions,
                sigma,
                group,
                data.lattice,
                self.energy_constraints,
                min(limit // 8, 1 << 30),
                gradients=gradients,
            )
        function = descriptor(name, options)
        if data.lattice is not None:
            if not takes(function, "lattice"):
                raise ValueError(
                    f"descriptor: expected one with an option `lattice` for periodic structures, got {name}"
                )
            function = functools.partial(function, lattice=torch.from_numpy(data.lattice))
        directions, at = (None, None) if data.products is None else (data.products.directions, data.products.at)
        return AlgorithmicOperator(data.positions, sigma, function, group, self.energy_constraints, directions, at)

    def _model(
        self,
        data: TrainingSet,
        group: np.ndarray,
        sigma: float,
        lam: float,
        operator: KernelOperator | AlgorithmicOperator,
        alpha: Tensor,
        offset: float,
    ) -> GDMLPotential:
        """The model of a solution ``alpha (n,)`` in eV: the covariance with forces is minus a derivative."""
        alphas = -alpha[: data.forces.numel()].view_as(data.forces)
        name, options = self.description(data)
        first, energies, products = operator.model_terms(alpha)
        model = GDMLPotential.from_coefficients(
            data.numbers,
            sigma,
            operator.descriptors,
            first,
            offset,
            group,
            energies,
            data.lattice,
            alphas if self.keep_alphas else None,
            products,
            lam=lam,
            descriptor=name,
            descriptor_options=options,
            charge=data.charge,
            multiplicity=data.multiplicity,
        )
        if data.energies is None:
            warnings.warn(
                "the training data have no energies: those of the model have an unknown constant", stacklevel=5
            )
        elif not self.energy_constraints:
            predicted = data.predict(model)[0]
            energies_fit(data.energies, predicted)
            model.shift += (data.energies - predicted).mean()
        return model

    def _warn_at_the_edge(self, model: GDMLPotential) -> None:
        for name in ("sigma", "lam"):
            tried = sorted({row[name] for row in self.selection})
            chosen = getattr(model.config, name)
            if len(tried) > 2 and chosen in (tried[0], tried[-1]):
                warnings.warn(
                    f"{name} = {chosen:g} is at the edge of those tried, {tried[0]:g} to {tried[-1]:g}; widen them",
                    stacklevel=3,
                )


def _listed(value: float | Sequence[float], name: str) -> list[float]:
    values = [float(v) for v in (value if isinstance(value, (Sequence, np.ndarray)) else [value])]
    if not values or not all(0 < v < float("inf") for v in values):
        raise ValueError(f"{name}: expected a positive number or several, got {value!r}")
    return values
