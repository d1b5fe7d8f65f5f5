"""What an ML region feels of the charges around it, and what these feel of it: potential, energy and forces.

The charges q_i of the ML atoms have the energy sum_i q_i phi_i in the potential of the MM charges; the model's
evaluator adds it and differentiates q_i(R) (`Evaluator`, argument ``potential``). What is left is here: phi, its slope
under the ML atoms, and the reaction on the MM atoms.

With Ewald sums the ML region also meets its own periodic images. As in mechanical embedding, these carry fixed
reference charges s_i, by default those of the force field: with psi the interaction of unit charges in different cells,

    E_images = sum_ij (q_i s_j - s_i s_j/2) psi_ij,

which is sum_ij q_i q_j psi_ij/2 but for terms of second order in q - s. So phi does not depend on the model's charges.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np

from openmm_mlff.forces.induction import induced_dipoles, widths
from openmm_mlff.forces.mm_field import TWO_BY_SQRT_PI, Kernel, Mesh, Pairs, Slopes, radial
from openmm_mlff.units import COULOMB_EV_ANGSTROM

METHODS = ("coulomb", "reaction field", "mesh")


def pack(values: np.ndarray) -> str:
    """Numbers as a short text (float64, deflated, base 64)."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, dtype="<f8").tobytes(), 9)).decode()


def unpack(text: str, n: int) -> np.ndarray:
    """The `n` numbers of a text; raises `ValueError` for anything else."""
    try:
        reader = zlib.decompressobj()
        data = reader.decompress(base64.b64decode(text.encode(), validate=True), 8 * n + 1)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"charges: the stored charges cannot be read ({error})") from error
    if len(data) != 8 * n:
        raise ValueError(f"charges: expected {n} stored charges, got {len(data) / 8:g} or more")
    return np.frombuffer(data, dtype="<f8").astype(np.float64)


@dataclass(frozen=True)
class SurroundingsSpec:
    """What the surroundings are; plain JSON values.

    Attributes:
        n_particles: of the system. charges: of all of them (`pack`), those of ML atoms being the reference charges of
            their images. method: 'coulomb', 'reaction field' or 'mesh' (Ewald). cutoff: angstrom; None for none.
        dielectric: of the reaction field. alpha: 1/angstrom and grid: of the mesh.
        damping: b in angstrom; the MM charges act on the ML charges as erf(r/b)/r. 0 for none.
        polarizabilities: angstrom^3, of the ML atoms; None for no induction. induction_damping: the MM charges make the
            field that induces dipoles as erf(r/b)/r, with b this many times `induction.widths`.
    """

    n_particles: int
    charges: str
    method: str = "coulomb"
    cutoff: float | None = None
    dielectric: float = 78.3
    alpha: float = 0.0
    grid: tuple[int, int, int] | None = None
    damping: float = 0.0
    polarizabilities: tuple[float, ...] | None = None
    induction_damping: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if (self.cutoff is None) != (self.method == "coulomb"):
            raise ValueError(f"cutoff: does not fit {self.method}, got {self.cutoff}")
        if self.method == "mesh" and (self.grid is None or self.alpha <= 0.0):
            raise ValueError(f"grid, alpha: a mesh needs both, got {self.grid}, {self.alpha}")
        for name, kind in (("grid", int), ("polarizabilities", float)):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(kind(x) for x in value))
        if self.grid is not None and (len(self.grid) != 3 or not all(6 <= n <= 4096 for n in self.grid)):
            raise ValueError(f"grid: expected three numbers of points between 6 and 4096, got {self.grid}")
        unpack(self.charges, self.n_particles)

    def kernel(self) -> Kernel:
        """g(r) of the direct sum."""
        if self.cutoff is None:
            return Kernel()
        if self.method == "reaction field":
            return Kernel.reaction_field(self.cutoff, self.dielectric)
        return Kernel(self.cutoff, alpha=self.alpha)


@dataclass
class _Frame:
    """What `field` found and `react` needs again; without Coulomb's constant.

    Attributes:
        slopes, induction: of the pairs, for charges and for induced dipoles. dipoles, energy, forces: of induction.
        reciprocal, hessian: first and second derivatives of the mesh potential at the sites. own: see `_Own`.
    """

    positions: np.ndarray
    sites: np.ndarray
    pairs: Pairs
    slopes: Slopes
    induction: Slopes | None = None
    dipoles: np.ndarray | None = None
    energy: float = 0.0
    forces: np.ndarray | None = None
    reciprocal: np.ndarray | None = None
    hessian: np.ndarray | None = None
    own: _Own | None = None


class Surroundings:
    """First ``phi = field(positions, sites, cell)``, then ``energy, site_forces, forces = react(charges)``.

    Args of the constructor: which particles of the system the ML atoms are, in the order of the sites.
    """

    def __init__(self, spec: SurroundingsSpec, atoms: tuple[int, ...]) -> None:
        self.spec = spec
        self._atoms = np.array(atoms, dtype=np.int64)
        self.charges = unpack(spec.charges, spec.n_particles)
        self._reference = self.charges[self._atoms]
        outside = np.ones(spec.n_particles, dtype=bool)
        outside[self._atoms] = False
        self._sources = np.flatnonzero(outside & (self.charges != 0.0))
        self._kernel = spec.kernel()
        n = len(atoms)
        self._damping = np.full(n, spec.damping)
        self._polarizabilities: np.ndarray | None = None
        if spec.polarizabilities is not None:
            if len(spec.polarizabilities) != n:
                raise ValueError(f"polarizabilities: expected {n}, got {len(spec.polarizabilities)}")
            self._polarizabilities = np.array(spec.polarizabilities)
            self._induction_damping = spec.induction_damping * widths(self._polarizabilities)
        self._mesh: Mesh | None = None
        if spec.method == "mesh":
            assert spec.grid is not None
            self._mesh = Mesh(spec.alpha, spec.grid)
            self._charged = np.flatnonzero(self.charges != 0.0)
        self._frame: _Frame | None = None

    def field(self, positions: np.ndarray, sites: np.ndarray, cell: np.ndarray | None) -> np.ndarray:
        """The potential at the ML atoms, ``(n_sites,)`` V.

        Args:
            positions: of all particles ``(n, 3)``, in any image. sites: of the ML atoms, the region in one piece.
            cell: box vectors as rows; None for an open system. All in angstrom.

        Raises `ValueError` if the box has become smaller than twice the cutoff.
        """
        cutoff = np.inf if self.spec.cutoff is None else self.spec.cutoff
        if cell is not None and 2.0 * cutoff > np.diag(cell).min():
            raise ValueError(
                f"cell: the periodic box is {np.diag(cell).min() / 10:.3f} nm wide, less than twice the cutoff of "
                f"{cutoff / 10:.3f} nm"
            )
        positions, sites = np.ascontiguousarray(positions), np.ascontiguousarray(sites)
        pairs = Pairs(self._sources, positions, sites, cell, cutoff)
        phi, _, slopes = pairs.potential(self.charges, self._kernel, self._damping)
        frame = self._frame = _Frame(positions, sites, pairs, slopes)
        lattice = None
        if self._mesh is not None:
            assert cell is not None
            self._mesh.set_box(cell)
            lattice = self._lattice(frame, self._mesh)
            phi += lattice[0]
        if self._polarizabilities is not None:
            _, slope, frame.induction = pairs.potential(self.charges, self._kernel, self._induction_damping)
            if lattice is not None:
                slope += lattice[1]
            frame.energy, frame.dipoles, frame.forces = induced_dipoles(sites, -slope, self._polarizabilities)
        return phi * COULOMB_EV_ANGSTROM

    def react(self, charges: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """What the energy sum_i q_i phi_i leaves out.

        Args:
            charges: q of the ML atoms in e, ``(n_sites,)``, at the positions of the last `field`.

        Returns: further energy (images among themselves, induction) in eV; forces at fixed q on the ML atoms
        ``(n_sites, 3)`` and on the sources ``(n, 3)``, to which ML atoms belong if they have images; eV/angstrom.
        """
        frame = self._frame
        if frame is None:
            raise ValueError("field: expected a call of field before react")
        charges = np.ascontiguousarray(charges, dtype=np.float64)
        site_forces, forces = np.zeros_like(frame.sites), np.zeros_like(frame.positions)
        frame.pairs.react(frame.slopes, charges, None, site_forces, forces)
        energy = frame.energy
        if frame.dipoles is not None and frame.induction is not None and frame.forces is not None:
            frame.pairs.react(frame.induction, None, frame.dipoles, site_forces, forces)
            site_forces += frame.forces
        if self._mesh is not None:
            energy += self._lattice_reaction(frame, self._mesh, charges, site_forces, forces)
        ke = COULOMB_EV_ANGSTROM
        return energy * ke, site_forces * ke, forces * ke

    # -- the mesh ----------------------------------------------------------------------------------------------------

    def _lattice(self, frame: _Frame, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
        """Potential and gradient at the sites: the reciprocal sum without the region's own nearest images."""
        s = self._reference
        grid = mesh.potential(mesh.spread(frame.positions, self.charges, which=self._charged))
        wants_second = self._polarizabilities is not None
        phi, frame.reciprocal, frame.hessian = mesh.gather(grid, frame.sites, second=wants_second)
        phi -= self._background(mesh) * self.charges.sum()
        if not s.any():
            return phi, frame.reciprocal
        frame.own = _Own(frame.sites, mesh.alpha)
        return phi - frame.own.g @ s, frame.reciprocal - np.einsum("ij,ijx,j->ix", frame.own.slope, frame.own.d, s)

    def _lattice_reaction(
        self, frame: _Frame, mesh: Mesh, charges: np.ndarray, site_forces: np.ndarray, forces: np.ndarray
    ) -> float:
        """Add forces; returns -sum_ij s_i s_j psi_ij/2."""
        s, mu = self._reference, frame.dipoles
        assert frame.reciprocal is not None
        site_forces -= charges[:, None] * frame.reciprocal
        if mu is not None and frame.hessian is not None:
            site_forces -= np.einsum("ixy,iy->ix", frame.hessian, mu)
        spread = [mesh.spread(frame.sites, charges, mu)]
        if frame.own is not None:
            spread.append(mesh.spread(frame.sites, s))
        grids = mesh.potential(np.stack(spread))
        _, slope, _ = mesh.gather(grids[0], frame.positions, which=self._charged)
        forces[self._charged] -= self.charges[self._charged, None] * slope
        if frame.own is None:
            return 0.0
        phi, slope, _ = mesh.gather(grids[1], frame.sites)
        site_forces += s[:, None] * slope
        site_forces += frame.own.forces(charges, s, mu)
        return -0.5 * float(s @ (phi - frame.own.g @ s - self._background(mesh) * s.sum()))

    def _background(self, mesh: Mesh) -> float:
        """Minus the potential of the charge that neutralises the box, per charge (1/angstrom)."""
        return float(np.pi / (mesh.volume * mesh.alpha**2))


class _Own:
    """What a reciprocal sum holds of the region's own nearest images: e(r) = erf(alpha r)/r.

    Attributes:
        g: e(r) ``(n, n)``, with its limit for r = 0 on the diagonal. slope, bend: its derivatives as in `radial`, zero
            on the diagonal. d: ``(n, n, 3)`` angstrom, from the second to the first.
    """

    def __init__(self, sites: np.ndarray, alpha: float) -> None:
        n = len(sites)
        self.d = sites[:, None] - sites[None]
        r = np.linalg.norm(self.d, axis=-1)
        np.fill_diagonal(r, 1.0)
        self.g, self.slope, self.bend = radial(Kernel(), r, 1.0 / alpha)
        self.g[range(n), range(n)] = TWO_BY_SQRT_PI * alpha
        for values in (self.slope, self.bend):
            np.fill_diagonal(values, 0.0)

    def forces(self, q: np.ndarray, s: np.ndarray, mu: np.ndarray | None) -> np.ndarray:
        """-d/dR of minus these pairs' energy, for charges q and dipoles mu in the potential of s and s in that of q."""
        weights = np.outer(q, s) + np.outer(s, q) - np.outer(s, s)
        found = np.einsum("ij,ijx->ix", weights * self.slope, self.d)
        if mu is not None:
            along = self.bend * np.einsum("ix,ijx->ij", mu, self.d)
            pairs = s[None, :, None] * (self.slope[..., None] * mu[:, None] + along[..., None] * self.d)
            found += pairs.sum(1) - pairs.sum(0)
        return found
