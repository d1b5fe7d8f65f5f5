"""Kernel matrices against automatic differentiation and sgdml's own solutions; solvers against one another."""

from __future__ import annotations

import math
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_gdml import conjugate_gradients, solvers
from openmm_gdml.operators import KernelOperator, force_blocks
from openmm_gdml.solvers import NotPositiveDefinite, Solution, parse_memory, solve

SIGMA = 1.5
SWAP = np.array([[0, 1, 2, 3], [0, 2, 1, 3]])


def geometries(n: int, seed: int = 0, atoms: int = 4) -> Tensor:
    rng = np.random.default_rng(seed)
    base = np.array([[0.0, 0, 0], [1.1, 0, 0.1], [-0.3, 1.0, 0], [0.2, 0.3, 1.2], [1.0, 1.1, 0.9]])[:atoms]
    return torch.from_numpy(base + rng.normal(0, 0.15, (n, atoms, 3)))


def inverse_distances(r: Tensor) -> Tensor:
    i, j = torch.tril_indices(len(r), len(r), -1)
    return 1.0 / (r[i] - r[j]).square().sum(-1).sqrt()


def kernel(a: Tensor, b: Tensor, permutations: np.ndarray) -> Tensor:
    """sum_p kappa(|x(a) - x(p b)|), written plainly."""
    total = a.new_zeros(())
    for p in permutations:
        d = math.sqrt(5) * (inverse_distances(a) - inverse_distances(b[p])).norm() / SIGMA
        total = total + (1 + d + d * d / 3) * torch.exp(-d)
    return total


@pytest.mark.parametrize("permutations", [SWAP[:1], SWAP])
def test_blocks_are_second_derivatives_of_the_kernel(permutations: np.ndarray) -> None:
    a, b = geometries(2, 1), geometries(3, 2)
    blocks = force_blocks(a, b, SIGMA, permutations)
    second = torch.func.jacrev(torch.func.jacrev(kernel, argnums=0), argnums=1)
    for k in range(2):
        for m in range(3):
            expected = second(a[k], b[m], permutations).reshape(12, 12)
            assert torch.allclose(blocks[k, :, m], expected, atol=1e-11)


@pytest.mark.parametrize("energies", [False, True])
def test_operator_is_one_matrix_in_every_form(energies: bool) -> None:
    operator = KernelOperator(geometries(7), SIGMA, SWAP, energies=energies)
    k = operator.dense()
    assert torch.allclose(k, k.T, atol=1e-12)
    assert float(torch.linalg.eigvalsh(k).min()) > -1e-10
    v = torch.from_numpy(np.random.default_rng(3).normal(size=operator.n))
    assert torch.allclose(operator.matvec(v), k @ v, atol=1e-9)
    indices = [5, 0, operator.n - 1, 40]
    assert torch.allclose(operator.columns(indices), k[:, indices], atol=1e-12)
    assert torch.allclose(operator.diagonal(), k.diagonal(), atol=1e-12)
    assert operator.point(13) == 1


def test_energy_rows_are_derivatives_of_force_rows() -> None:
    r = geometries(3)
    k = KernelOperator(r, SIGMA, SWAP, energies=True).dense()
    first = torch.func.jacrev(kernel, argnums=1)
    for a in range(3):
        for b in range(3):
            assert float(k[36 + a, 36 + b]) == pytest.approx(float(kernel(r[a], r[b], SWAP)), abs=1e-12)
            # the covariance of an energy with a force is minus the derivative
            expected = -first(r[a], r[b], SWAP).flatten()
            assert torch.allclose(k[36 + a, 12 * b : 12 * b + 12], expected, atol=1e-12)


@pytest.mark.parametrize("name", ["ethanol_nosym_M200_S1", "ala2_M180_S27", "cu27_M60_S27"])
def test_the_coefficients_of_sgdml_solve_our_equations(shared: Path, name: str) -> None:
    model = np.load(shared / "data" / "gdml" / f"{name}_model.npz", allow_pickle=False)
    data = np.load(shared / "data" / "gdml" / f"dataset_{name.split('_')[0]}.npz", allow_pickle=False)
    chosen = model["idxs_train"].astype(int)
    y = torch.from_numpy(data["F"][chosen].ravel() / float(model["std"]))
    lattice = model["lattice"].T if "lattice" in model.files else None
    operator = KernelOperator(data["R"][chosen], float(model["sig"]), model["perms"].astype(int), lattice)
    alpha = -torch.from_numpy(model["alphas_F"])
    residual = operator.matvec(alpha) + float(model["lam"]) * alpha - y
    # what a direct solution leaves: coefficients of 1e8 times the rounding of a matrix of order one
    assert float(residual.abs().max()) < 1e-5


@pytest.fixture(scope="module")
def problem() -> tuple[KernelOperator, Tensor, Tensor]:
    operator = KernelOperator(geometries(40), SIGMA, SWAP)
    y = torch.from_numpy(np.random.default_rng(5).normal(size=operator.n))
    exact = torch.linalg.solve(operator.dense() + 1e-4 * torch.eye(operator.n, dtype=torch.float64), y)
    return operator, y, exact


@pytest.mark.parametrize("method", ["cholesky", "eigen", "cg", "auto"])
def test_every_method_finds_the_solution(problem: tuple[KernelOperator, Tensor, Tensor], method: str) -> None:
    operator, y, exact = problem
    found = solve(operator, y, method, 1e-4, tolerance=1e-9)
    assert found.converged and found.residual < 1e-8
    assert torch.allclose(found.alpha, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("choice", ["uniform", "leverage", "cholesky", "eigen"])
def test_more_columns_take_fewer_iterations(problem: tuple[KernelOperator, Tensor, Tensor], choice: str) -> None:
    operator, y, exact = problem
    counts = []
    for columns in (0.05, 0.5, 1.0):
        found = solve(operator, y, "cg", 1e-4, preconditioner=choice, columns=columns, tolerance=1e-8, memory="1 GB")
        assert torch.allclose(found.alpha, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
        counts.append(found.iterations)
    assert counts[0] > counts[1] >= counts[2]
    assert counts[2] <= 5  # the preconditioner is the inverse


def test_an_interrupted_iteration_goes_on(problem: tuple[KernelOperator, Tensor, Tensor], tmp_path: Path) -> None:
    operator, y, _ = problem
    options = {"columns": 0.1, "tolerance": 1e-8, "seed": 3, "memory": "1 GB"}
    whole = solve(operator, y, "cg", 1e-4, **options)  # type: ignore[arg-type]
    checkpoint = tmp_path / "cg.checkpoint"

    def stop(step: int, steps: int, residual: float) -> None:
        if step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(operator, y, "cg", 1e-4, checkpoint=checkpoint, checkpoint_seconds=0.0, progress=stop, **options)  # type: ignore[arg-type]
    kept = len(conjugate_gradients.read_checkpoint(checkpoint, _problem(operator, y)).history)  # type: ignore[union-attr]
    assert 8 <= kept <= 12
    again = solve(operator, y, "cg", 1e-4, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
    assert again.history[:kept] == whole.history[:kept]
    assert again.iterations == whole.iterations
    assert torch.allclose(again.alpha, whole.alpha, rtol=1e-9)


def _problem(operator: KernelOperator, y: Tensor) -> str:
    return conjugate_gradients._fingerprint(operator, y, 1e-4, "leverage", 3)


def test_a_checkpoint_of_another_problem_is_refused(
    problem: tuple[KernelOperator, Tensor, Tensor], tmp_path: Path
) -> None:
    operator, y, _ = problem
    checkpoint = tmp_path / "cg.checkpoint"
    solve(operator, y, "cg", 1e-4, checkpoint=checkpoint, max_iterations=2)
    with pytest.raises(ValueError, match="checkpoint"):
        solve(operator, 2 * y, "cg", 1e-4, checkpoint=checkpoint)


def test_memory_limits(problem: tuple[KernelOperator, Tensor, Tensor]) -> None:
    operator, y, _ = problem
    assert parse_memory("4 GB") == 4_000_000_000 and parse_memory("500 MB") == 500_000_000
    for wrong in ("much", -1, True, "0 GB"):
        with pytest.raises(ValueError, match="memory: expected"):
            parse_memory(wrong)
    with pytest.raises(MemoryError, match=r"cholesky needs .* GB, the limit is"):
        solve(operator, y, "cholesky", memory="1 MB")
    with pytest.raises(MemoryError, match="inducing columns needs"):
        solve(operator, y, "cg", memory="1 MB")


def test_a_singular_matrix_is_said_to_be_one() -> None:
    # without regularisation the translations and rotations of a single geometry make the matrix singular
    operator = KernelOperator(geometries(6), SIGMA)
    with pytest.raises(NotPositiveDefinite, match=r"lam = 1e-30 is not positive definite at geometry 0; .*larger lam"):
        solve(operator, torch.ones(operator.n, dtype=torch.float64), "cholesky", 1e-30)


def test_wrong_arguments_are_named(problem: tuple[KernelOperator, Tensor, Tensor]) -> None:
    operator, y, _ = problem
    for arguments, message in (
        ({"lam": 0.0}, "lam: expected"),
        ({"method": "lu"}, "method: expected"),
        ({"tolerance": 2.0}, "tolerance: expected"),
        ({"method": "cg", "preconditioner": "jacobi"}, "preconditioner: expected"),
        ({"method": "cg", "columns": 10**6}, "columns: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(operator, y, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y: expected"):
        solve(operator, y[:-1])
    assert solvers.METHODS[0] == "auto"


SCRIPT = """
import os, signal, sys
import numpy as np, torch
from openmm_gdml.operators import KernelOperator
from openmm_gdml.solvers import solve
rng = np.random.default_rng(5)
operator = KernelOperator(rng.normal(0, 0.1, (40, 4, 3)) + np.eye(4, 3), 1.5)
def stop(step, steps, residual):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
options = dict(columns=0.05, tolerance=1e-8, checkpoint_seconds=0.0, progress=stop, memory="1 GB")
found = solve(operator, torch.from_numpy(rng.normal(size=operator.n)), "cg", 1e-5, checkpoint=sys.argv[1], **options)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a killed process and one that goes on from its checkpoint do together is what one does undisturbed
    script = tmp_path / "solve.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def here(checkpoint: str) -> Solution:
        monkeypatch.setattr(sys, "argv", ["solve.py", str(tmp_path / checkpoint), "-1"])
        return runpy.run_path(str(script))["found"]  # type: ignore[no-any-return]

    whole = here("whole")
    assert whole.converged and whole.iterations > 20
    command = [sys.executable, str(script), str(tmp_path / "killed"), "15"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    again = here("killed")
    assert again.history == whole.history and torch.equal(again.alpha, whole.alpha)
