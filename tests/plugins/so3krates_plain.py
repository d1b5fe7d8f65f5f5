"""A second SO3krates, written from the papers' formulas with loops over atoms and pairs, in numpy and float64.

It reads the weights of the first one and shares no code with it. Spherical harmonics come from scipy.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from scipy.special import comb, erf, sph_harm_y

from openmm_so3krates import SO3krates
from openmm_so3krates.free_atoms import C6, POLARIZABILITY

KE, BOHR, HARTREE, ALPHA = 14.399645351950548, 0.5291772105638411, 27.211386024367243, 0.007297352566206496


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def softplus(x: Any) -> Any:
    return np.log1p(np.exp(x))


def harmonics(u: np.ndarray, degrees: tuple[int, ...]) -> np.ndarray:
    """Real harmonics from scipy's complex ones, without the Condon-Shortley phase; m = -l..l."""
    theta, phi = math.acos(np.clip(u[2], -1, 1)), math.atan2(u[1], u[0])
    values = []
    for degree in degrees:
        for m in range(-degree, degree + 1):
            y = sph_harm_y(degree, abs(m), theta, phi) * (-1.0) ** m
            values.append(y.real if m == 0 else math.sqrt(2) * (y.real if m > 0 else y.imag))
    return np.array(values)


class PlainSO3krates:
    """Energy terms, charges and Hirshfeld ratios of one structure."""

    def __init__(self, model: SO3krates) -> None:
        self.c = model.config
        self.limit, self.damping = model.long_range_cutoff, model.config.dispersion_damping
        self.w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
        self.slices = np.split(np.arange(sum(2 * x + 1 for x in self.c.degrees)), self._ends())[: len(self.c.degrees)]

    def _ends(self) -> list[int]:
        return list(np.cumsum([2 * degree + 1 for degree in self.c.degrees])[:-1])

    def lin(self, name: str, x: np.ndarray) -> np.ndarray:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.lin(f"{name}.second", silu(self.lin(f"{name}.first", x)))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if f"{name}.scale" not in self.w:
            return x
        if self.c.normalization == "rms":
            return x / math.sqrt((x**2).mean() + 1e-6) * self.w[f"{name}.scale"]
        x = x - x.mean()
        return x / math.sqrt((x**2).mean() + 1e-6) * self.w[f"{name}.scale"] + self.w[f"{name}.bias"]

    def invariants(self, ev: np.ndarray) -> np.ndarray:
        return np.array(
            [(ev[s] ** 2).sum() / math.sqrt(2 * d + 1) for s, d in zip(self.slices, self.c.degrees, strict=True)]
        )

    def basis(self, d: float) -> np.ndarray:
        n = self.c.num_basis_functions
        if self.c.radial_basis == "physnet":
            low = math.exp(-self.c.cutoff)
            centers = np.linspace(low, 1.0, n)
            return np.exp(-((2.0 / n * (1 - low)) ** -2) * (math.exp(-d) - centers) ** 2)
        t = math.exp(-self.c.bernstein_gamma * d)
        return np.array([comb(n - 1, k) * t**k * (1 - t) ** (n - 1 - k) for k in range(n)])

    def cut(self, d: float) -> float:
        x = d / self.c.cutoff
        if x >= 1:
            return 0.0
        if self.c.cutoff_function == "cosine":
            return 0.5 * (math.cos(math.pi * x) + 1)
        return 1 - 10 * x**3 + 15 * x**4 - 6 * x**5

    def electronic(self, name: str, numbers: np.ndarray, psi: float) -> np.ndarray:
        row = int(psi < 0)
        q = self.w[f"{name}.queries"][numbers]
        y = softplus(q @ self.w[f"{name}.keys"][row] / math.sqrt(q.shape[1]))
        out = []
        for share in psi * y / y.sum():
            e = share * self.w[f"{name}.values"][row]
            out.append(e + self.mlp(f"{name}.residual", silu(e)))
        return np.array(out)

    def evaluate(
        self, numbers: np.ndarray, positions: np.ndarray, charge: float, unpaired: float, cell: np.ndarray | None
    ) -> dict[str, Any]:
        c, n = self.c, len(numbers)
        embeddings = [self.w["element_embedding"][numbers]]
        for name, used, psi in (
            ("charge_embedding", c.use_charge_embed, charge),
            ("spin_embedding", c.use_spin_embed, unpaired),
        ):
            if used:
                embeddings.append(self.electronic(name, numbers, psi))
        x = sum(embeddings) / math.sqrt(len(embeddings))
        edges = [e for e in pairs(positions, cell, c.cutoff)]
        shapes = {}
        for k, (i, j, r) in enumerate(edges):
            d = float(np.linalg.norm(r))
            shapes[k] = (i, j, self.cut(d), self.basis(d), harmonics(r / d, c.degrees))
        ev = np.zeros((n, sum(2 * degree + 1 for degree in c.degrees)))
        if c.initial_euclidean == "neighbors":
            for i, _, f, _, y in shapes.values():
                ev[i] += f * y / c.avg_num_neighbors
        for t in range(c.num_layers):
            x, ev = self.layer(f"layers.{t}", x, ev, list(shapes.values()))
        return self.heads(numbers, positions, charge, cell, x, edges)

    def layer(self, name: str, x: np.ndarray, ev: np.ndarray, edges: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        c, (n, features) = self.c, x.shape
        scalars = self.w.get(f"{name}.scalars", np.ones(4))
        divisor = {
            "avg_num_neighbors": c.avg_num_neighbors,
            "sqrt_num_features": math.sqrt(features / c.num_heads),
            "none": 1.0,
        }[c.message_normalization]
        dx, dev = np.zeros_like(x), np.zeros_like(ev)
        kinds = [("features", c.num_heads)] + ([("euclidean", len(c.degrees))] if c.degrees else [])
        for kind, heads in kinds:
            width = features // heads
            qw, kw = (self.w[f"{name}.attention.attention_{kind}.{p}"] for p in ("query", "key"))
            for i, j, f, basis, y in edges:
                w = self.mlp(f"{name}.attention.filter_{kind}.radial", basis)
                if c.degrees:
                    w = w + self.mlp(f"{name}.attention.filter_{kind}.spherical", self.invariants(ev[j] - ev[i]))
                for h in range(heads):
                    s = slice(h * width, (h + 1) * width)
                    q, k = qw[h] @ x[i, s], kw[h] @ x[j, s]
                    if c.qk_normalization:
                        q, k = (v / math.sqrt((v**2).mean() + 1e-6) for v in (q, k))
                    alpha = f * (q * w[s] * k).sum() / divisor
                    if kind == "features":
                        dx[i, s] += alpha * (self.w[f"{name}.attention.value"][h] @ x[j, s])
                    else:
                        dev[i, self.slices[h]] += alpha * y[self.slices[h]]
        x, ev = x + scalars[0] * dx, ev + dev
        rows, vectors = [], []
        for a, b in zip(x, ev, strict=True):
            a = self.norm(f"{name}.norm_1", a)
            if c.residual_mlp_1:
                a = a + scalars[1] * self.mlp(f"{name}.mlp_1", silu(a))
            y = self.lin(f"{name}.exchange.linear", np.concatenate([a, self.invariants(b)]))
            a = a + scalars[2] * y[:features]
            b = b + np.repeat(y[features:], [2 * degree + 1 for degree in c.degrees]) * b
            a = self.norm(f"{name}.norm_2", a)
            if c.residual_mlp_2:
                a = a + scalars[3] * self.mlp(f"{name}.mlp_2", silu(a))
            rows.append(a)
            vectors.append(b)
        return np.array(rows), np.array(vectors).reshape(n, -1)

    def heads(
        self,
        numbers: np.ndarray,
        positions: np.ndarray,
        charge: float,
        cell: np.ndarray | None,
        x: np.ndarray,
        edges: list[Any],
    ) -> dict[str, Any]:
        c, out = self.c, {}
        e = np.array([self.lin("energy_out", silu(self.lin("energy_hidden", a)))[0] for a in x])
        out["network"] = float((e * self.w["energy_scale"][numbers] + self.w["energy_offset"][numbers]).sum())
        if c.use_zbl_repulsion:
            out["repulsion"] = 0.5 * sum(
                self.zbl(numbers[i], numbers[j], float(np.linalg.norm(r))) for i, j, r in edges
            )
        q = h = None
        if c.predict_charges:
            q = np.array([self.mlp("charge_head", a)[0] for a in x]) + self.w["charge_bias"][numbers]
            q = q + (charge - q.sum()) / len(q)
        if c.predict_hirshfeld:
            k = np.array([self.mlp("hirshfeld_head", a) for a in x])
            h = np.abs(
                self.w["hirshfeld_shift"][numbers]
                + (self.w["hirshfeld_query"][numbers] * k).sum(1) / math.sqrt(c.hirshfeld_features)
            )
        reach = 1e9 if self.limit is None else self.limit
        far = [(i, j, float(np.linalg.norm(r))) for i, j, r in pairs(positions, cell, reach)]
        if c.use_electrostatics and q is not None:
            out["electrostatics"] = 0.5 * sum(KE * q[i] * q[j] * self.coulomb(d) for i, j, d in far)
        if c.use_dispersion and h is not None:
            out["dispersion"] = 0.5 * sum(self.vdw(numbers[i], numbers[j], h[i], h[j], d) for i, j, d in far)
        return {"energy": sum(out.values()), "charges": q, "hirshfeld": h, **out}

    def zbl(self, zi: int, zj: int, d: float) -> float:
        raw = {k: softplus(self.w[f"repulsion.{k}_raw"]) for k in ("scale", "power", "weights", "exponents")}
        c = raw["weights"] / raw["weights"].sum()
        screening = (c * np.exp(-raw["exponents"] * d * (zi ** raw["power"] + zj ** raw["power"]) * raw["scale"])).sum()
        return float(KE * zi * zj / d * screening * switch(d, 0.0, 1.5) * self.cut(d))

    def coulomb(self, d: float) -> float:
        s, rc = self.c.electrostatic_sigma, self.limit
        if rc is None:
            return float(erf(d / s) / d)
        v, at = erf(d / s) / d, erf(rc / s) / rc
        slope = (2 * rc * math.exp(-((rc / s) ** 2)) / (math.sqrt(math.pi) * s) - erf(rc / s)) / rc**2
        f = switch(d, 0.45 * rc, rc)
        return float(f * (v - at) + (1 - f) * (v - at - slope * (d - rc)))

    def vdw(self, zi: int, zj: int, hi: float, hj: float, d: float) -> float:
        ai, aj = POLARIZABILITY[zi - 1] * hi, POLARIZABILITY[zj - 1] * hj
        ci, cj = C6[zi - 1] * hi**2, C6[zj - 1] * hj**2
        a = 0.5 * (ai + aj)
        c6 = 2 * ci * cj * ai * aj / (ai**2 * cj + aj**2 * ci)
        rv = ALPHA ** (-4 / 21) * a ** (1 / 7)
        sig = -0.00433008 + 0.24428889 * rv + 0.04125273 * rv**2 - 0.00078893 * rv**3
        g, p, x = 1 / (2 * sig**2), self.c.dispersion_scale * 2 * 2.54 * a ** (1 / 7), d / BOHR
        c8, c10 = 5 * c6 / g, 245 * c6 / (8 * g**2)
        e = -HARTREE * (c6 / (x**6 + p**6) + c8 / (x**8 + p**8) + c10 / (x**10 + p**10))
        return float(e if self.limit is None else e * switch(d, self.limit - self.damping, self.limit))


def switch(x: float, on: float, off: float) -> float:
    c = (x - on) / (off - on)
    a, b = (math.exp(-1 / u) if u > 0 else 0.0 for u in (1 - c, c))
    return a / (a + b)


def pairs(positions: np.ndarray, cell: np.ndarray | None, cutoff: float) -> list[tuple[int, int, np.ndarray]]:
    """All directed pairs of images within the cutoff, by brute force."""
    n, images = len(positions), [np.zeros(3)]
    if cell is not None:
        heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        span = np.ceil(cutoff / heights).astype(int) + 1
        images = [np.array(s) @ cell for s in itertools.product(*(range(-k, k + 1) for k in span))]
    found = []
    for i, j, shift in itertools.product(range(n), range(n), images):
        r = positions[j] + shift - positions[i]
        if 1e-9 < np.linalg.norm(r) <= cutoff:
            found.append((i, j, r))
    return found
