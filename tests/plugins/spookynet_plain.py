"""SpookyNet written a second time, atom by atom and pair by pair in numpy, to judge the one in the package.

Follows the equations of Unke et al., Nat. Commun. 12, 7273 (2021) and what the published program (OUnke/SpookyNet, MIT)
does where the paper leaves it open; shares no code with the package. Reads the dictionary of a published checkpoint.
Also makes such dictionaries with random weights, so that every variant can be tested without the published file.
Angstrom, eV, e; float64.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

Array = np.ndarray
KE = 14.399645351950548  # eV angstrom
BOHR, HARTREE = 0.5291772105638411, 27.211386024367243
PARTS = ("electron", "pre", "local_x", "local_s", "local_p", "local_d", "local", "nonlocal_q", "nonlocal_k",
         "nonlocal_v", "post", "output")  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "activation": "swish",
    "num_features": 6,
    "num_basis_functions": 5,
    "num_modules": 2,
    "cutoff": 4.0,
    "lr_cutoff": None,
    "basis_functions": "exp-bernstein",
    "exp_weighting": True,
    "use_irreps": True,
    "use_nonlinear_embedding": False,
    "use_zbl_repulsion": True,
    "use_electrostatics": True,
    "use_d4_dispersion": False,
    "module_keep_prob": 1.0,
} | {f"num_residual_{part}": 1 for part in PARTS}


def softplus(x: Array | float) -> Any:
    return np.logaddexp(0.0, x)


def switch(r: float, on: float, off: float) -> float:
    t = (r - on) / (off - on)
    if t <= 0:
        return 1.0
    if t >= 1:
        return 0.0
    falling, rising = math.exp(-1 / (1 - t)), math.exp(-1 / t)
    return falling / (falling + rising)


class PlainSpookyNet:
    """The energy of one structure; `saved` is a published checkpoint (options and ``state_dict``).

    With `freeze_maxima` the maxima in the attention keep the values of the first call, as if no gradient went through.
    """

    def __init__(self, saved: dict[str, Any], freeze_maxima: bool = False) -> None:
        self.freeze_maxima = freeze_maxima
        self.maxima: dict[str, tuple[Array, Array]] = {}
        self.o = DEFAULTS | {"use_irreps": False, "use_nonlinear_embedding": True} | saved
        self.w = {name: np.asarray(t, dtype=np.float64) for name, t in saved["state_dict"].items()}

    # -- networks ----------------------------------------------------------------------------------------------------

    def act(self, name: str, x: Array) -> Array:
        a, b = self.w[f"{name}.alpha"], self.w[f"{name}.beta"]
        if self.o["activation"] == "swish":
            return a * x / (1.0 + np.exp(-b * x))
        return a * (softplus(b * x) - math.log(2.0)) / b

    def linear(self, name: str, x: Array) -> Array:
        return self.w[f"{name}.weight"] @ x + self.w.get(f"{name}.bias", 0.0)

    def residual(self, name: str, x: Array) -> Array:
        y = self.linear(f"{name}.linear1", self.act(f"{name}.activation1", x))
        return x + self.linear(f"{name}.linear2", self.act(f"{name}.activation2", y))

    def stack(self, name: str, blocks: int, x: Array) -> Array:
        for b in range(blocks):
            x = self.residual(f"{name}.stack.{b}", x)
        return x

    def mlp(self, name: str, part: str, x: Array) -> Array:
        x = self.stack(f"{name}.residual", self.o[f"num_residual_{part}"], x)
        return self.linear(f"{name}.linear", self.act(f"{name}.activation", x))

    # -- embeddings --------------------------------------------------------------------------------------------------

    def embedding(self, z: int) -> Array:
        n = "nuclear_embedding."
        return self.w[n + "element_embedding"][z] + self.linear(n + "config_linear", self.w[n + "electron_config"][z])

    def electronic(self, name: str, z: list[Array], value: float, signed: bool) -> list[Array]:
        if self.o["use_nonlinear_embedding"]:
            return self.nonlinear(name, z, value)
        e = np.array([max(value, 0.0), max(-value, 0.0)] if signed else [abs(value)])
        k = self.linear(f"{name}.linear_k", e / np.maximum(e, 1.0))
        v = self.linear(f"{name}.linear_v", e)
        a = [softplus(self.linear(f"{name}.linear_q", x) @ k / math.sqrt(len(k))) for x in z]
        return [self.mlp(f"{name}.resblock", "electron", x / (sum(a) + 1e-8) * v) for x in a]

    def nonlinear(self, name: str, z: list[Array], value: float) -> list[Array]:
        k = self.mlp(f"{name}.resblock_k", "electron", self.linear(f"{name}.featurize_k", np.array([value])))
        v = self.mlp(f"{name}.resblock_v", "electron", self.linear(f"{name}.featurize_v", np.array([value])))
        dot = np.array([self.linear(f"{name}.linear_q", x) @ k for x in z])
        a = np.exp((dot - dot.max()) / math.sqrt(len(k)))
        return [x / (a.sum() + 1e-8) * v for x in a]

    # -- interactions ------------------------------------------------------------------------------------------------

    def cutoff_function(self, r: float) -> float:
        c = self.o["cutoff"]
        return math.exp(-(r**2) / ((c - r) * (c + r))) if r < c else 0.0

    def radial(self, r: float) -> Array:
        n = self.o["num_basis_functions"] - 1
        alpha = softplus(self.w["radial_basis_functions._alpha"])
        e = math.exp(-alpha * r)
        # the stored logarithms of the binomials are rounded to single precision, and belong to the trained function
        binomial = np.exp(self.w["radial_basis_functions.logc"])
        bernstein = [binomial[v] * e ** (n - v) * (1 - e) ** v for v in range(n + 1)]
        return np.array(bernstein) * self.cutoff_function(r) * (e if self.o["exp_weighting"] else 1.0)

    def angular(self, u: Array) -> Array:
        x, y, z = u
        r2, r3 = math.sqrt(2.0), math.sqrt(3.0)
        if self.o["use_irreps"]:
            return np.array([r3 * x * y, r3 * x * z, r3 * y * z, (3 * z * z - 1) / 2, r3 / 2 * (x * x - y * y)])
        return np.array([x * x, y * y, z * z, r2 * x * y, r2 * x * z, r2 * y * z])

    def attention(self, name: str, q: Array, k: Array, v: Array) -> Array:
        omega = self.w[f"{name}.attention.omega"]
        d, m = omega.shape

        def phi(x: Array, largest: Array) -> Array:
            u = x @ omega / d**0.25
            return (np.exp(u - (x**2).sum(1, keepdims=True) / (2 * math.sqrt(d)) - largest) + 1e-4) / math.sqrt(m)

        largest = ((q @ omega / d**0.25).max(1, keepdims=True), (k @ omega / d**0.25).max())
        if self.freeze_maxima:
            largest = self.maxima.setdefault(name, largest)
        phi_q, phi_k = phi(q, largest[0]), phi(k, largest[1])
        return (phi_q @ (phi_k.T @ v)) / (phi_q @ phi_k.sum(0) + 1e-8)[:, None]

    def module(self, t: int, x: list[Array], pairs: list[tuple[int, int, Array]]) -> tuple[list[Array], list[Array]]:
        name = f"module.{t}"
        local, far = f"{name}.local_interaction", f"{name}.nonlocal_interaction"
        x = [self.stack(f"{name}.residual_pre", self.o["num_residual_pre"], xi) for xi in x]
        heads = {h: [self.mlp(f"{local}.resblock_{h}", f"local_{h}", xi) for xi in x] for h in "xspd"}
        features = self.o["num_features"]
        s = [h.copy() for h in heads["x"]]
        p = [np.zeros((3, features)) for _ in x]
        d = [np.zeros((5 if self.o["use_irreps"] else 6, features)) for _ in x]
        for i, j, vector in pairs:
            r = float(np.linalg.norm(vector))
            rho, u = self.radial(r), vector / r
            s[i] += self.linear(f"{local}.radial_s", rho) * heads["s"][j]
            p[i] += np.outer(u, self.linear(f"{local}.radial_p", rho) * heads["p"][j])
            d[i] += np.outer(self.angular(u), self.linear(f"{local}.radial_d", rho) * heads["d"][j])
        q, k, v = (np.array([self.mlp(f"{far}.resblock_{h}", f"nonlocal_{h}", xi) for xi in x]) for h in "qkv")
        nonlocal_ = self.attention(far, q, k, v)
        out = []
        for i, xi in enumerate(x):
            total = s[i]
            for moments, kind in ((p[i], "p"), (d[i], "d")):
                projected = moments @ self.w[f"{local}.projection_{kind}.weight"].T
                total = total + (projected[:, :features] * projected[:, features:]).sum(0)
            xi = xi + self.mlp(f"{local}.resblock", "local", total) + nonlocal_[i]
            out.append(self.stack(f"{name}.residual_post", self.o["num_residual_post"], xi))
        return out, [self.mlp(f"{name}.resblock", "output", xi) for xi in out]

    # -- energy terms ------------------------------------------------------------------------------------------------

    def repulsion(self, zi: int, zj: int, r: float) -> float:
        w = {
            k: float(softplus(self.w[f"zbl_repulsion_energy._{k}"]).item())
            for k in ("adiv", "apow", "c1", "c2", "c3", "c4", "a1", "a2", "a3", "a4")
        }
        x = (zi ** w["apow"] + zj ** w["apow"]) * w["adiv"] * r
        total = sum(w[f"c{k}"] for k in (1, 2, 3, 4))
        screening = sum(w[f"c{k}"] / total * math.exp(-w[f"a{k}"] * x) for k in (1, 2, 3, 4))
        return KE / 2 * zi * zj / r * self.cutoff_function(r) * screening

    def coulomb(self, qi: float, qj: float, r: float) -> float:
        c, limit = self.o["cutoff"], self.o["lr_cutoff"]
        s = switch(r, 0.25 * c, 0.75 * c)
        far, near = 1 / r, 1 / math.sqrt(r * r + 1)
        if limit is not None:
            if r >= limit:
                return 0.0
            far += r / limit**2 - 2 / limit
            near += r * limit / (limit**2 + 1) ** 1.5 - (2 * limit**2 + 1) / (limit**2 + 1) ** 1.5
        return KE / 2 * qi * qj * (s * near + (1 - s) * far)

    def dispersion(self, z: list[int], charges: Array, pairs: list[tuple[int, int, Array]]) -> float:
        t = {k.removeprefix("d4_dispersion_energy."): v for k, v in self.w.items() if k.startswith("d4_")}
        s6, s8, a1, a2, scaleq = (float(softplus(t[f"_{k}"])) for k in ("s6", "s8", "a1", "a2", "scaleq"))
        limit = None if self.o["lr_cutoff"] is None else self.o["lr_cutoff"] / BOHR
        count = np.zeros(len(z))
        for i, j, vector in pairs:
            r = float(np.linalg.norm(vector)) / BOHR
            bond = 4.0 / 3.0 * (t["rcov"][z[i]] + t["rcov"][z[j]])
            polarity = 4.10451 * math.exp(-((abs(t["en"][z[i]] - t["en"][z[j]]) + 19.08857) ** 2) / 254.5553148552)
            smooth = 1.0 if limit is None else switch(r, limit - 1 / 1.8897261246, limit)
            count[i] += polarity * 0.5 * (1 + math.erf(-7.5 * (r - bond) / bond)) * smooth

        def scaling(reference: float, actual: float, hardness: float) -> float:
            return (
                math.exp(3 * (1 - math.exp(2 * hardness * (1 - reference / actual)))) if actual > 1e-8 else math.exp(3)
            )

        def zeta(i: int) -> Array:
            gauss = np.array(
                [
                    sum(
                        t["ncount_mask"][z[i], a, k]
                        * math.exp(-6 * t["ncount_weight"][z[i], a, k] * (count[i] - t["cn"][z[i], a, k]) ** 2)
                        for k in range(3)
                    )
                    for a in range(7)
                ]
            )
            weight = gauss / gauss.sum() if gauss.sum() > 1e-8 else t["fixgweights"][z[i]]
            zeff = t["zeff"][z[i]]
            return weight * np.array(
                [scaling(zeff + t["refq"][z[i], a] * scaleq, zeff + charges[i], t["gam"][z[i]]) for a in range(7)]
            )

        def alpha(element: int, a: int) -> Array:
            system = int(t["refsys"][element, a])
            screened = t["hcount"][element, a] * t["sscale"][system] * t["secaiw"][system]
            zeff = t["zeff"][system]
            screened = screened * scaling(zeff, zeff + t["refh"][element, a] * scaleq, t["gam"][system])
            return np.maximum(t["ascale"][element, a] * (t["alphaiw"][element, a] - screened), 0.0)

        energy, weights = 0.0, [zeta(i) for i in range(len(z))]
        for i, j, vector in pairs:
            r = float(np.linalg.norm(vector)) / BOHR
            if limit is not None and r >= limit:
                continue
            c6 = sum(
                weights[i][a]
                * weights[j][b]
                * 3
                / math.pi
                * (t["casimir_polder_weights"] * alpha(z[i], a) * alpha(z[j], b)).sum()
                for a in range(7)
                for b in range(7)
            )
            size = math.sqrt(3.0) * t["sqrt_r4r2"][z[i]] * t["sqrt_r4r2"][z[j]]
            r0 = a1 * size + a2
            power = {}
            for n in (6, 8):
                power[n] = 1 / (r**n + r0**n)
                if limit is not None:
                    edge = 1 / (limit**n + r0**n)
                    power[n] += -edge + n * limit**n * edge**2 * (r / limit - 1)
            energy -= HARTREE / 2 * c6 * (s6 * power[6] + s8 * size**2 * power[8])
        return energy

    def images(self, positions: Array, cell: Array | None, cutoff: float) -> list[tuple[int, int, Array]]:
        """Directed pairs of images within the cutoff, and their vectors."""
        reach = [0, 0, 0]
        if cell is not None:
            reach = [math.ceil(cutoff * h) + 2 for h in np.linalg.norm(np.linalg.inv(cell), axis=0)]
        found = []
        for shift in itertools.product(*(range(-m, m + 1) for m in reach)):
            offset = np.zeros(3) if cell is None else np.array(shift) @ cell
            for i, j in itertools.product(range(len(positions)), repeat=2):
                vector = positions[j] + offset - positions[i]
                if (i != j or any(shift)) and np.linalg.norm(vector) < cutoff:
                    found.append((i, j, vector))
        return found

    def evaluate(
        self, numbers: Array, positions: Array, charge: float = 0, unpaired: float = 0, cell: Array | None = None
    ) -> dict[str, Any]:
        """``energy`` and its terms network, repulsion, electrostatics, dispersion (eV), and ``charges`` (e)."""
        z = [int(n) for n in numbers]
        short = self.images(positions, cell, self.o["cutoff"])
        long = self.images(positions, cell, self.o["lr_cutoff"] or math.inf)
        nuclear = [self.embedding(n) for n in z]
        total_charge = self.electronic("charge_embedding", nuclear, charge, signed=True)
        spin = self.electronic("magmom_embedding", nuclear, unpaired, signed=False)
        x = [a + b + c for a, b, c in zip(nuclear, total_charge, spin, strict=True)]
        features = [np.zeros(self.o["num_features"]) for _ in z]
        for t in range(self.o["num_modules"]):
            x, y = self.module(t, x, short)
            features = [f + yi for f, yi in zip(features, y, strict=True)]
        out = np.array([self.linear("output", f) + self.w["element_bias"][n] for f, n in zip(features, z, strict=True)])
        charges = out[:, 1] + (charge - out[:, 1].sum()) / len(z)
        terms = {"network": out[:, 0].sum()}
        distance = [(i, j, float(np.linalg.norm(v))) for i, j, v in long]
        if self.o["use_zbl_repulsion"]:
            terms["repulsion"] = sum(self.repulsion(z[i], z[j], float(np.linalg.norm(v))) for i, j, v in short)
        if self.o["use_electrostatics"]:
            terms["electrostatics"] = sum(self.coulomb(charges[i], charges[j], r) for i, j, r in distance)
        if self.o["use_d4_dispersion"]:
            terms["dispersion"] = self.dispersion(z, charges, long)
        return {"energy": sum(terms.values()), "charges": charges} | terms

    def slope(self, numbers: Array, positions: Array, direction: Array, *state: Any, h: float = 1e-3) -> float:
        """Derivative of the energy along a direction ``(n_atoms, 3)``, by fourth-order central differences."""
        energies = [self.evaluate(numbers, positions + k * h * direction, *state)["energy"] for k in (-2, -1, 1, 2)]
        return float(np.array([1.0, -8.0, 8.0, -1.0]) @ energies) / (12 * h)

    def forces(self, numbers: Array, positions: Array, *state: Any) -> Array:
        """Minus the gradient of the energy, ``(n_atoms, 3)`` eV/angstrom."""
        self.evaluate(numbers, positions, *state)
        units = np.eye(positions.size).reshape(-1, *positions.shape)
        return -np.array([self.slope(numbers, positions, u, *state) for u in units]).reshape(positions.shape)


# -- checkpoints with random weights ---------------------------------------------------------------------------------


def random_checkpoint(seed: int, **options: Any) -> dict[str, Any]:
    """A dictionary as the published program saves it, every tensor random, float64."""
    o = DEFAULTS | options
    rng = np.random.default_rng(seed)
    features, w = o["num_features"], {}

    def normal(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        w[name] = mean + scale * rng.normal(size=shape)

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        normal(f"{name}.weight", outputs, inputs, scale=0.8 / math.sqrt(inputs))
        if bias:
            normal(f"{name}.bias", outputs, scale=0.3)

    def activation(name: str) -> None:
        normal(f"{name}.alpha", features, mean=1.0, scale=0.2)
        normal(f"{name}.beta", features, mean=1.7, scale=0.2)

    def stack(name: str, blocks: int, bias: bool = True) -> None:
        for b in range(blocks):
            for k in (1, 2):
                activation(f"{name}.stack.{b}.activation{k}")
                linear(f"{name}.stack.{b}.linear{k}", features, features, bias)

    def mlp(name: str, part: str, bias: bool = True) -> None:
        stack(f"{name}.residual", o[f"num_residual_{part}"], bias)
        activation(f"{name}.activation")
        linear(f"{name}.linear", features, features, bias)

    normal("element_bias", 87, 2, scale=0.5)
    linear("output", 2, features, bias=False)
    w["output.weight"][1] *= 0.3
    normal("nuclear_embedding.element_embedding", 87, features, scale=0.5)
    w["nuclear_embedding.electron_config"] = rng.random((87, 20))
    linear("nuclear_embedding.config_linear", features, 20, bias=False)
    for name, inputs in (("charge_embedding", 2), ("magmom_embedding", 1)):
        if o["use_nonlinear_embedding"]:
            linear(f"{name}.linear_q", features, features, bias=False)
            linear(f"{name}.featurize_k", features, 1)
            linear(f"{name}.featurize_v", features, 1, bias=False)
            mlp(f"{name}.resblock_k", "electron")
            mlp(f"{name}.resblock_v", "electron", bias=False)
        else:
            linear(f"{name}.linear_q", features, features)
            linear(f"{name}.linear_k", features, inputs, bias=False)
            linear(f"{name}.linear_v", features, inputs, bias=False)
            mlp(f"{name}.resblock", "electron", bias=False)
    n = o["num_basis_functions"] - 1
    w["radial_basis_functions._alpha"] = np.array(0.3)
    w["radial_basis_functions.logc"] = np.log([math.comb(n, v) for v in range(n + 1)])
    w["radial_basis_functions.n"] = np.arange(n, -1, -1.0)
    w["radial_basis_functions.v"] = np.arange(n + 1.0)
    for t in range(o["num_modules"]):
        name = f"module.{t}"
        local, far = f"{name}.local_interaction", f"{name}.nonlocal_interaction"
        stack(f"{name}.residual_pre", o["num_residual_pre"])
        stack(f"{name}.residual_post", o["num_residual_post"])
        for kind in "spd":
            linear(f"{local}.radial_{kind}", features, n + 1, bias=False)
        for kind in "xspd":
            mlp(f"{local}.resblock_{kind}", f"local_{kind}")
        for kind in "qkv":
            mlp(f"{far}.resblock_{kind}", f"nonlocal_{kind}")
        for kind in "pd":
            linear(f"{local}.projection_{kind}", 2 * features, features, bias=False)
        mlp(f"{local}.resblock", "local")
        mlp(f"{name}.resblock", "output")
        normal(f"{far}.attention.omega", features, o.get("num_random_features", features))
    if o["use_zbl_repulsion"]:
        for k in ("adiv", "apow", "c1", "c2", "c3", "c4", "a1", "a2", "a3", "a4"):
            normal(f"zbl_repulsion_energy._{k}", 1, mean=0.8 if k == "adiv" else -0.5, scale=0.3)
    if o["use_d4_dispersion"]:
        _random_d4(w, rng)
    w["keep_prob"] = np.array(0.9)
    state = {k: torch.tensor(v, dtype=torch.int64 if k.endswith("refsys") else torch.float64) for k, v in w.items()}
    saved = {k: v for k, v in o.items() if k != "num_random_features"}
    return saved | {"state_dict": state}


def _random_d4(w: dict[str, Array], rng: np.random.Generator) -> None:
    def table(name: str, low: float, high: float, *shape: int) -> None:
        w[f"d4_dispersion_energy.{name}"] = rng.uniform(low, high, shape)

    w["d4_dispersion_energy.refsys"] = rng.integers(0, 18, (87, 7))
    for name, low, high, *shape in [
        ("_s6", 0.2, 0.8), ("_s8", 1.0, 1.6), ("_a1", -0.8, 0.0), ("_a2", 3.0, 4.0), ("_scaleq", 0.0, 1.0),
        ("zeff", 1, 8, 87), ("refh", -0.3, 0.3, 87, 7), ("sscale", 0.2, 1, 18), ("secaiw", 0, 3, 18, 23),
        ("gam", 0.2, 0.6, 87), ("ascale", 0.5, 1.5, 87, 7), ("alphaiw", 1, 8, 87, 7, 23), ("hcount", 0, 1, 87, 7),
        ("casimir_polder_weights", 0, 0.3, 23), ("rcov", 0.6, 1.6, 87), ("en", 1, 4, 87),
        ("ncount_weight", 0.5, 1.5, 87, 7, 3), ("cn", 0, 4, 87, 7, 3), ("fixgweights", 0, 1, 87, 7),
        ("refq", -0.3, 0.3, 87, 7), ("sqrt_r4r2", 1, 3, 87),
    ]:  # fmt: skip
        table(name, low, high, *shape)  # type: ignore[arg-type]
    w["d4_dispersion_energy.ncount_mask"] = rng.integers(0, 2, (87, 7, 3))
