"""Estimators of free energies on systems with exact answers: are the error bars as large as the errors?

Two states of one coordinate: a shifted well, a well of another width, a double well (f by quadrature). From each state
frames are drawn that are independent, or an AR(1) series of statistical inefficiency 9 carried over to the density by
its quantiles. 200 repeats give z = (estimate - exact) / error for every estimator, which is N(0, 1) if value and error
bar are right. Also: gradients of differentiable free energies and averages against the covariance formula and finite
differences, and Bennett's equation by bisection against pymbar. Takes about ten minutes.

    python benchmarks/free_energy.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _common import machine, write
from scipy import stats

from openmm_mlff.analysis import free_energy
from openmm_mlff.training import reweighting

CORRELATION = 0.8
WINDOWS = 4
RESAMPLES = 100


@dataclass(frozen=True)
class State:
    """u(x) = a (x - b)^2 + h (x^2 - 1)^2 + s x + c, with f, and samples of its density by its quantiles."""

    a: float = 0.0
    b: float = 0.0
    h: float = 0.0
    s: float = 0.0
    c: float = 0.0

    def u(self, x: np.ndarray) -> np.ndarray:
        return self.a * (x - self.b) ** 2 + self.h * (x**2 - 1) ** 2 + self.s * x + self.c

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        grid = np.linspace(-9.0, 9.0, 200_001) if self.h == 0 else np.linspace(-3.5, 3.5, 200_001)
        return grid, np.exp(-self.u(grid))

    @property
    def f(self) -> float:
        grid, density = self.table()
        return -float(np.log(np.trapezoid(density, grid)))

    def sampler(self, rng: np.random.Generator) -> Callable[[int, float], np.ndarray]:
        grid, density = self.table()
        cumulative = np.cumsum(density) / density.sum()
        return lambda n, correlation: np.interp(stats.norm.cdf(series(rng, n, correlation)), cumulative, grid)

    def towards(self, other: State, c: float) -> State:
        """(1 - c) u + c u_other; for wells without a double one, which keep their form."""
        if self.h or other.h:
            return State(h=(1 - c) * self.h + c * other.h, s=(1 - c) * self.s + c * other.s)
        a = (1 - c) * self.a + c * other.a
        b = ((1 - c) * self.a * self.b + c * other.a * other.b) / a
        constant = (1 - c) * (self.a * self.b**2 + self.c) + c * (other.a * other.b**2 + other.c) - a * b**2
        return State(a=a, b=b, c=constant)


#: pairs of states
SYSTEMS = {
    "shifted": (State(a=0.5), State(a=0.5, b=1.2, c=5.0)),
    "harmonic": (State(a=0.5), State(a=1.5, b=0.7)),
    "double well": (State(h=2.0), State(h=4.0, s=0.7)),
}


def series(rng: np.random.Generator, n: int, correlation: float) -> np.ndarray:
    """A stationary AR(1) series of unit variance."""
    x = rng.normal(size=n)
    x[1:] *= np.sqrt(1 - correlation**2)
    for i in range(1, n):
        x[i] += correlation * x[i - 1]
    return x


def scores(z: Sequence[float], degrees: int | None = None) -> dict[str, float]:
    """Mean, spread and coverage of z, with the p-values of a Kolmogorov-Smirnov and a two-sided chi-square test.

    `degrees` of freedom of Student's t, where the error comes from that many resamplings and one.
    """
    z = np.asarray(z)
    reference = stats.norm if degrees is None else stats.t(degrees)
    tail = float(stats.chi2(len(z)).cdf(float(np.sum(stats.norm.ppf(reference.cdf(z)) ** 2))))
    return {
        "mean": round(float(z.mean()), 3),
        "std": round(float(z.std(ddof=1)), 3),
        "within_1": round(float(np.mean(np.abs(z) < 1)), 3),
        "within_2": round(float(np.mean(np.abs(z) < 2)), 3),
        "p_kolmogorov_smirnov": round(float(stats.kstest(z, reference.cdf).pvalue), 4),
        "p_chi_square": round(2 * min(tail, 1 - tail), 4),
    }


def z_table(repeats: int, seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for system, (first, last) in SYSTEMS.items():
        exact = last.f - first.f
        chain = [first.towards(last, c) for c in np.linspace(0, 1, WINDOWS)]
        for correlation in (0.0, CORRELATION):
            n = 300 if correlation == 0 else 1500
            rng = np.random.default_rng([seed, len(rows)])
            samplers = [state.sampler(rng) for state in chain]
            z: dict[str, list[float]] = {name: [] for name in ("BAR", "BAR, bootstrap", "MBAR", "Zwanzig")}
            begun = time.perf_counter()
            for repeat in range(repeats):
                x = [sampler(n, correlation) for sampler in samplers]
                forward, reverse = last.u(x[0]) - first.u(x[0]), first.u(x[-1]) - last.u(x[-1])
                found = free_energy.bar(forward, reverse)
                z["BAR"].append((found.delta - exact) / found.error)
                error = free_energy.block_bootstrap(
                    lambda f, r: float(reweighting.bar(torch.from_numpy(f), torch.from_numpy(r), 1e-6)),
                    forward,
                    reverse,
                    samples=RESAMPLES,
                    seed=repeat,
                )
                z["BAR, bootstrap"].append((found.delta - exact) / error)
                windows = free_energy.mbar([np.array([s.u(y) for s in chain]) for y in x])
                z["MBAR"].append(float((windows.delta[-1] - exact) / windows.error[-1]))
                near = chain[1]  # Zwanzig's formula where it may be used: a third of the way
                side = free_energy.zwanzig(near.u(x[0]) - first.u(x[0]))
                z["Zwanzig"].append((side.delta - (near.f - first.f)) / side.error)
            for name, values in z.items():
                degrees = RESAMPLES - 1 if "bootstrap" in name else None
                row = {"system": system, "correlation": correlation, "estimator": name, "frames": n}
                rows.append(row | scores(values, degrees))
                print(
                    f"{system:12} {correlation:4.1f}  {name:15} mean {rows[-1]['mean']:6} std {rows[-1]['std']:6} "
                    f"within 1, 2: {rows[-1]['within_1']:5} {rows[-1]['within_2']:5}  "
                    f"p: KS {rows[-1]['p_kolmogorov_smirnov']:6}, chi2 {rows[-1]['p_chi_square']:6}"
                )
            print(f"  {time.perf_counter() - begun:.0f} s")
    return rows


def gradient_table(seed: int) -> list[dict[str, object]]:
    """Largest relative deviation of autograd from the covariance formula, and from central differences."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(series(rng, 500, 0.0))
    powers = torch.stack([x, x**2, x**4], dim=1)  # du/dtheta of u = theta . (x, x^2, x^4)
    old, theta = powers @ torch.tensor([0.0, 0.5, 0.0]).double(), torch.tensor([0.3, 0.6, 0.02]).double()

    def free(t: torch.Tensor) -> torch.Tensor:
        return reweighting.zwanzig(powers @ t - old)

    def mean(t: torch.Tensor) -> torch.Tensor:
        return reweighting.average(reweighting.weights(powers @ t, old), torch.cos(x))

    w = reweighting.weights(powers @ theta, old)
    formulas = {
        "free energy": w @ powers,
        "average": -((w * torch.cos(x)) @ powers - (w @ torch.cos(x)) * (w @ powers)),
    }
    rows: list[dict[str, object]] = []
    for name, function in (("free energy", free), ("average", mean)):
        leaf = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        step = 1e-5 * torch.eye(3, dtype=torch.float64)
        difference = torch.stack([(function(theta + h) - function(theta - h)) / 2e-5 for h in step])
        scale = gradient.abs().max()
        rows.append(
            {
                "quantity": name,
                "formula": float((gradient - formulas[name]).abs().max() / scale),
                "finite_differences": float((gradient - difference).abs().max() / scale),
            }
        )
        print(
            f"gradient of {name}: formula {rows[-1]['formula']:.1e}, differences {rows[-1]['finite_differences']:.1e}"
        )
    return rows


def bisection(repeats: int, seed: int) -> float:
    """Largest difference between bisection and pymbar over Gaussian work of many sizes, kT."""
    rng, worst = np.random.default_rng(seed), 0.0
    for _ in range(repeats):
        n, m, shift, width = rng.integers(20, 500), rng.integers(20, 500), rng.normal(0, 100), rng.uniform(0.2, 2.5)
        w_f = rng.normal(shift + width**2 / 2, width, n)
        w_r = rng.normal(-shift + width**2 / 2, width, m)
        ours = float(reweighting.bar(torch.from_numpy(w_f), torch.from_numpy(w_r)))
        worst = max(worst, abs(ours - free_energy.bar(w_f, w_r, None).delta))
    print(f"bisection against pymbar, {repeats} pairs: at most {worst:.1e} kT apart")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = z_table(args.repeats, args.seed)
    p = [float(row[name]) for row in rows for name in ("p_kolmogorov_smirnov", "p_chi_square")]
    print(f"{len(p)} p-values: smallest {min(p)}, {np.mean(np.array(p) < 0.05):.0%} below 0.05")
    write(
        "free_energy",
        {
            "repeats": args.repeats,
            "seed": args.seed,
            "z_scores": rows,
            "smallest_p": min(p),
            "share_of_p_below_0.05": round(float(np.mean(np.array(p) < 0.05)), 3),
            "gradients": gradient_table(args.seed),
            "bisection_against_pymbar_kT": bisection(200, args.seed),
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()
