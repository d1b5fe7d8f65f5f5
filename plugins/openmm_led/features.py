"""positions -> inputs of the encoder and coordinates of the decoder -> positions of all atoms.

*Inputs* are what the encoder sees. *Coordinates* are what the decoder samples; they have an exact way back to the
chosen atoms, and the atoms that are not chosen (hydrogens, say) are rebuilt beside these from a template. Molecules
come in whole: mending those that are broken across a periodic box is the caller's business.

Units: nm, rad. Arrays have the frame as their first axis, numpy in gives numpy out, tensors keep their gradient; all
is float64.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_led import zmatrix
from openmm_led.geometry import signed_volumes, superpose_centred, typical
from openmm_led.molecule import Molecule
from openmm_led.zmatrix import Array, ZMatrix, check_array, on_torch

KINDS = ("internal", "distances", "cartesian", "raw")

#: most frames that a template is fitted to, evenly spaced
_TEMPLATE_FRAMES = 5000


@dataclass(frozen=True, eq=False)
class Features:
    """How a molecule is seen; made by `internal`, `distances`, `cartesian` or `raw`.

    Attributes:
        kind: one of `KINDS`.
        n_atoms: of the topology.
        molecule: None for ``raw``.
        tree: internal coordinates of all atoms, the chosen ones first. chosen: how many are chosen.
        pairs_of: atoms whose distances are inputs (``distances``).
        reference: ``(n_chosen, 3)`` nm, centred, that chosen atoms are laid upon (``cartesian``).
        template: internal coordinates of the atoms that are not chosen, after `fit_template`.
        n_columns: of the positions of each particle, from x on (``raw``).
    """

    kind: str
    n_atoms: int
    molecule: Molecule | None = None
    tree: ZMatrix | None = None
    chosen: int = 0
    pairs_of: tuple[int, ...] = ()
    reference: np.ndarray | None = None
    template: np.ndarray | None = None
    n_columns: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "raw":
            if self.n_atoms < 1 or not 1 <= self.n_columns <= 3:
                raise ValueError(
                    f"raw: expected at least 1 particle and 1 to 3 columns, got {self.n_atoms} and {self.n_columns}"
                )
            return
        if self.molecule is None or self.tree is None:
            raise ValueError(f"molecule, tree: expected both for features of kind {self.kind!r}")
        if not len(self.molecule) == self.tree.n_atoms == self.n_atoms or max(self.tree.atoms) >= self.n_atoms:
            raise ValueError(f"tree: expected {len(self.molecule)} atoms, got {self.tree.n_atoms}")
        if not 3 <= self.chosen <= self.n_atoms:
            raise ValueError(f"chosen: expected 3 to {self.n_atoms} atoms, got {self.chosen}")
        if not set(self.pairs_of) <= set(self.tree.atoms[: self.chosen]):
            raise ValueError("pairs_of: expected atoms that are among the chosen ones, got others")
        if self.template is not None and self.template.shape != (self._n_rest,):
            raise ValueError(f"template: expected {self._n_rest} values, got {self.template.shape}")
        if self.kind == "cartesian":
            check_array("reference", None if self.reference is None else self.reference[None], self.chosen, 3)

    # ------------------------------------------------------------------------------------------- ways to make them
    @classmethod
    def internal(cls, topology: Any, atoms: str | Iterable[int] = "heavy") -> Features:
        """Bonds, angles, one dihedral per rotatable bond and improper offsets; angles of rotation as sine and cosine.

        Args:
            topology: of openmm or mdtraj, one molecule with its bonds.
            atoms: ``"heavy"``, ``"all"``, ``"backbone"`` or indices; joined by bonds among themselves.

        Raises `ValueError` naming the argument.
        """
        molecule = Molecule.of(topology)
        chosen = molecule.select(atoms)
        return cls("internal", len(molecule), molecule, zmatrix.build(molecule, chosen), len(chosen))

    @classmethod
    def distances(
        cls, topology: Any, atoms: str | Iterable[int] | None = None, coordinates: str | Iterable[int] = "heavy"
    ) -> Features:
        """Inputs are distances of pairs; coordinates are those of `internal` for the atoms `coordinates`.

        Distances do not know left from right, so volumes with a sign go with them: those of the tetrahedral centres,
        and those that four atoms span that follow one another in the list of `atoms`.

        Args:
            atoms: of the pairs, among `coordinates`; by default CA where there are at least four, else all of these.
        """
        molecule = Molecule.of(topology)
        chosen = molecule.select(coordinates)
        if atoms is None:
            alphas = [i for i in chosen if molecule.names[i] == "CA" and molecule.elements[i] == "C"]
            pairs_of = tuple(alphas) if len(alphas) >= 4 else chosen
        else:
            pairs_of = molecule.select(atoms)
        if len(pairs_of) < 2 or not set(pairs_of) <= set(chosen):
            raise ValueError(f"atoms: expected at least two of the atoms of the coordinates, got {list(pairs_of)}")
        return cls("distances", len(molecule), molecule, zmatrix.build(molecule, chosen), len(chosen), pairs_of)

    @classmethod
    def cartesian(cls, topology: Any, reference: np.ndarray, atoms: str | Iterable[int] = "heavy") -> Features:
        """Inputs and coordinates are positions of chosen atoms, moved and turned onto a reference.

        Args:
            reference: ``(n_atoms, 3)`` nm, positions of all atoms of the topology.
            atoms: as in `internal`.
        """
        molecule = Molecule.of(topology)
        chosen = molecule.select(atoms)
        reference = np.asarray(reference, dtype=np.float64)
        check_array("reference", reference[None], len(molecule), 3)
        centred = reference[list(chosen)] - reference[list(chosen)].mean(0)
        if np.linalg.svd(centred, compute_uv=False)[1] < 1e-4:
            raise ValueError("reference: expected atoms that are not on one line, got a straight line")
        tree = zmatrix.build(molecule, chosen)
        return cls("cartesian", len(molecule), molecule, tree, len(chosen), reference=centred)

    @classmethod
    def raw(cls, n_coordinates: int, n_particles: int = 1) -> Features:
        """Inputs and coordinates are x, or x and y, or x, y and z of every particle of a model potential, as they are.

        Args:
            n_coordinates: of all particles together; the columns left out are zero on the way back.
        """
        if n_particles < 1 or n_coordinates % n_particles:
            raise ValueError(f"n_coordinates: expected a multiple of the {n_particles} particles, got {n_coordinates}")
        return cls("raw", n_particles, n_columns=n_coordinates // n_particles)

    # ------------------------------------------------------------------------------------------- what they are made of
    @property
    def _full(self) -> ZMatrix:
        if self.tree is None:
            raise ValueError(f"features: {self.kind!r} have no internal coordinates")
        return self.tree

    @property
    def _known(self) -> Molecule:
        if self.molecule is None:
            raise ValueError(f"features: {self.kind!r} know no molecule")
        return self.molecule

    @cached_property
    def zmatrix(self) -> ZMatrix:
        """Internal coordinates of the chosen atoms."""
        return self._full.head(self.chosen)

    @cached_property
    def atoms(self) -> tuple[int, ...]:
        """Chosen atoms, ascending."""
        return tuple(range(self.n_atoms)) if self.tree is None else tuple(sorted(self.tree.atoms[: self.chosen]))

    @property
    def _n_rest(self) -> int:
        return 3 * (self.n_atoms - self.chosen)

    @cached_property
    def _own(self) -> np.ndarray:
        """Columns of the chosen atoms in the full tree."""
        return self._full.head_columns(self.chosen)

    @cached_property
    def _rest(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self._full.n_values), self._own)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Of each coordinate: ``bond``, ``angle``, ``dihedral``, ``improper``, ``cartesian`` or ``raw``."""
        if self.kind == "raw":
            return ("raw",) * (self.n_atoms * self.n_columns)
        return ("cartesian",) * (3 * self.chosen) if self.kind == "cartesian" else self.zmatrix.kinds

    @cached_property
    def names(self) -> list[str]:
        """Of the coordinates, such as ``dihedral ALA2-C ALA2-CA ALA2-N ACE1-C`` or ``x of ALA2-CA``."""
        if self.kind == "raw":
            axes = [f"{axis}{i}" if self.n_atoms > 1 else axis for i in range(self.n_atoms) for axis in "xyz"]
            return [axis for n, axis in enumerate(axes) if n % 3 < self.n_columns]
        if self.kind == "cartesian":
            return [f"{axis} of {self._known.label(i)}" for i in self.atoms for axis in "xyz"]
        columns = zip(self.zmatrix.kinds, self.zmatrix.quadruples, strict=True)
        return [" ".join([kind, *map(self._known.label, atoms)]) for kind, atoms in columns]

    @cached_property
    def periodic(self) -> np.ndarray:
        """``(n_coordinates,)``, True for coordinates that are the same after 2 pi."""
        return np.isin(self.kinds, ("dihedral", "improper"))

    @property
    def n_coordinates(self) -> int:
        return len(self.kinds)

    @property
    def n_inputs(self) -> int:
        if self.kind == "internal":
            return self.n_coordinates + int(self.periodic.sum())
        if self.kind == "distances":
            n = len(self.pairs_of)
            return n * (n - 1) // 2 + len(self._volumes)
        return self.n_coordinates

    @cached_property
    def _volumes(self) -> np.ndarray:
        """Four atoms of each signed volume among the inputs."""
        inside = set(self.atoms)
        centres = [centre for centre in self._known.centres if set(centre) <= inside]
        chain = [self.pairs_of[k : k + 4] for k in range(len(self.pairs_of) - 3)]
        return np.array(centres + chain, dtype=np.int64).reshape(-1, 4)

    # ------------------------------------------------------------------------------------------- there and back
    def coordinates(self, positions: Array) -> Array:
        """``(n, n_atoms, 3)`` nm -> ``(n, n_coordinates)``.

        Raises `ValueError` for another shape, for frames that are not finite, and where torsions hang on a straight
        angle.
        """
        check_array("positions", positions, self.n_atoms, 3)
        if self.kind == "raw":
            return on_torch(lambda x: x[:, :, : self.n_columns].flatten(1), positions)
        if self.kind == "cartesian":
            return on_torch(lambda x: self._aligned(x[:, list(self.atoms)]).flatten(1), positions)
        return self.zmatrix.values(positions)

    def inputs(self, positions: Array) -> Array:
        """``(n, n_atoms, 3)`` nm -> ``(n, n_inputs)``; errors as of `coordinates`."""
        if self.kind == "distances":
            check_array("positions", positions, self.n_atoms, 3)
            return on_torch(self._distances, positions)
        coordinates = self.coordinates(positions)
        return self._expanded(coordinates) if self.kind == "internal" else coordinates

    def inputs_of(self, coordinates: Array) -> Array:
        """``(n, n_coordinates)`` -> ``(n, n_inputs)``: those of the positions that the coordinates stand for."""
        check_array("coordinates", coordinates, self.n_coordinates)
        if self.kind == "internal":
            return self._expanded(coordinates)
        if self.kind == "distances":
            return on_torch(lambda c: self._distances(self._scattered(self.zmatrix.positions(c))), coordinates)
        if self.kind == "cartesian":
            return on_torch(lambda c: self._aligned(c.unflatten(1, (-1, 3))).flatten(1), coordinates)
        return on_torch(lambda c: c, coordinates)

    def positions(self, coordinates: Array) -> Array:
        """``(n, n_coordinates)`` -> ``(n, n_atoms, 3)`` nm, all atoms of the topology.

        Chosen atoms are exact; the others are put beside them by the template. Where the molecule lies and how it is
        turned is that of the reference (``cartesian``) or of the tree's first atoms; see `geometry.superpose`.

        Raises `ValueError` if there are atoms to rebuild and no template was fitted.
        """
        check_array("coordinates", coordinates, self.n_coordinates)
        if self.kind == "raw":
            missing = 3 - self.n_columns
            return on_torch(
                lambda c: torch.nn.functional.pad(c.unflatten(1, (-1, self.n_columns)), (0, missing)), coordinates
            )
        if self.kind == "cartesian":
            return on_torch(self._rebuilt_beside, coordinates)
        if isinstance(coordinates, Tensor):
            return self._full.positions(self._completed(coordinates.to(torch.float64)))
        values = np.empty((len(coordinates), self._full.n_values))
        values[:, self._own], values[:, self._rest] = coordinates, self._template
        return self._full.positions(values)

    @property
    def _template(self) -> np.ndarray:
        if self.template is None and self._n_rest:
            raise ValueError(
                f"template: {self.n_atoms - self.chosen} atoms are not chosen and have to be rebuilt; "
                "expected fit_template to be called first"
            )
        return np.zeros(0) if self.template is None else self.template

    def _completed(self, values: Tensor) -> Tensor:
        """Values of the chosen atoms -> of all atoms."""
        template = torch.from_numpy(self._template).to(values.device).expand(len(values), -1)
        order = np.argsort(np.concatenate([self._own, self._rest]))
        return torch.cat([values, template], 1)[:, torch.from_numpy(order).to(values.device)]

    def _rebuilt_beside(self, coordinates: Tensor) -> Tensor:
        chosen = coordinates.unflatten(1, (-1, 3))
        if not self._n_rest:
            return chosen
        scattered = self._scattered(chosen)
        # a decoder may put three atoms on a line; what hangs on them is for a relaxation to find
        every = self._full.positions(self._completed(self.zmatrix.values(scattered, straight=True)))
        # the tree starts at the origin, along x, in the xy plane: put that frame on the same atoms
        first, second, third = (scattered[:, atom] for atom in self._full.atoms[:3])
        x = torch.nn.functional.normalize(second - first, dim=-1)
        z = torch.nn.functional.normalize(torch.linalg.cross(x, third - first), dim=-1)
        axes = torch.stack([x, torch.linalg.cross(z, x), z], 1)
        every = every @ axes + first[:, None]
        keep = torch.zeros(self.n_atoms, 1, dtype=torch.bool, device=chosen.device)
        keep[list(self.atoms)] = True
        return torch.where(keep, scattered, every)

    def _scattered(self, chosen: Tensor) -> Tensor:
        """Positions of the chosen atoms -> of all, zero where an atom is not chosen."""
        if not self._n_rest:
            return chosen
        index = torch.tensor(self.atoms, device=chosen.device)
        return chosen.new_zeros(len(chosen), self.n_atoms, 3).index_copy(1, index, chosen)

    def _expanded(self, values: Array) -> Array:
        periodic = torch.from_numpy(self.periodic)

        def expand(v: Tensor) -> Tensor:
            turns = v[:, periodic.to(v.device)]
            return torch.cat([v[:, ~periodic.to(v.device)], torch.sin(turns), torch.cos(turns)], 1)

        return on_torch(expand, values)

    def _distances(self, positions: Tensor) -> Tensor:
        atoms = positions[:, list(self.pairs_of)]
        i, j = torch.triu_indices(len(self.pairs_of), len(self.pairs_of), 1, device=positions.device)
        return torch.cat([(atoms[:, i] - atoms[:, j]).norm(dim=-1), signed_volumes(positions, self._volumes)], 1)

    def _aligned(self, chosen: Tensor) -> Tensor:
        reference = torch.as_tensor(self.reference, dtype=chosen.dtype, device=chosen.device)
        return superpose_centred(chosen, reference)

    # ------------------------------------------------------------------------------------------- template
    def fit_template(self, positions: np.ndarray) -> Features:
        """The same with a template for atoms that are not chosen, from positions ``(n, n_atoms, 3)`` nm of MD.

        Bonds and angles are means, improper offsets circular means; a dihedral (a methyl group, a side chain that is
        not chosen) gets the value that is most populated, whatever the other dihedrals are.
        """
        if self.kind == "raw" or not self._n_rest:
            return self
        check_array("positions", positions, self.n_atoms, 3)
        if len(positions) == 0:
            raise ValueError("positions: expected at least one frame to fit the template to, got none")
        some = positions[np.unique(np.linspace(0, len(positions) - 1, _TEMPLATE_FRAMES).astype(int))]
        values = self._full.values(np.asarray(some, dtype=np.float64))
        template = [typical(values[:, column], self._full.kinds[column]) for column in self._rest]
        return dataclasses.replace(self, template=np.array(template))

    # ------------------------------------------------------------------------------------------- handedness
    @property
    def centres(self) -> tuple[tuple[int, int, int, int], ...]:
        """Tetrahedral centres of the whole molecule, each with three heavy neighbours (`Molecule.centres`)."""
        return () if self.molecule is None else self.molecule.centres

    def chirality(self, positions: Array) -> Array:
        """``(n, n_atoms, 3)`` nm -> signed volumes of the `centres`, ``(n, n_centres)`` nm^3.

        ``(a - c) . ((b - c) x (d - c))`` with the neighbours a, b, d of the centre c in the order of their index: about
        +-0.0026 for carbon.
        """
        check_array("positions", positions, self.n_atoms, 3)
        index = np.array(self.centres, dtype=np.int64).reshape(-1, 4)
        return on_torch(lambda x: signed_volumes(x, index), positions)

    def inverted(self, positions: Array, reference_signs: np.ndarray) -> np.ndarray:
        """``(n,)``, True for frames in which any centre has not its handedness.

        Args:
            reference_signs: ``(n_centres,)``, +1 or -1: the sign of `chirality` in MD.
        """
        signs = np.asarray(reference_signs)
        if signs.shape != (len(self.centres),) or not np.isin(signs, (-1, 1)).all():
            raise ValueError(
                f"reference_signs: expected +1 or -1 for {len(self.centres)} centres, got {signs.tolist()}"
            )
        volumes = np.asarray(
            self.chirality(positions.detach().cpu().numpy() if isinstance(positions, Tensor) else positions)
        )
        return (volumes * signs <= 0).any(1)

    # ------------------------------------------------------------------------------------------- identity
    def fingerprint(self, topology: Any = None) -> str:
        """sha256 of elements, atom names, residue names and bonds: of a topology, or else of the features' own."""
        if topology is not None:
            return Molecule.of(topology).fingerprint
        if self.molecule is None:
            return hashlib.sha256(f"raw {self.n_atoms} {self.n_columns}".encode()).hexdigest()
        return self.molecule.fingerprint

    def check_topology(self, topology: Any) -> None:
        """Raise `ValueError`, naming the first difference, for a topology other than that of the features.

        Particles of a model potential (``raw``) are only counted.
        """
        if self.molecule is not None:
            self.molecule.check(topology)
            return
        atoms = topology.atoms() if callable(topology.atoms) else topology.atoms
        n = sum(1 for _ in atoms)
        if n != self.n_atoms:
            raise ValueError(f"topology: expected {self.n_atoms} particles, got {n}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; the tree is written out, so that a later version cannot read it differently."""
        return {
            "kind": self.kind,
            "n_atoms": self.n_atoms,
            "molecule": None if self.molecule is None else self.molecule.to_dict(),
            "tree": None if self.tree is None else self.tree.to_dict(),
            "chosen": self.chosen,
            "pairs_of": list(self.pairs_of),
            "reference": None if self.reference is None else self.reference.tolist(),
            "template": None if self.template is None else self.template.tolist(),
            "n_columns": self.n_columns,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Features:
        """The inverse of `to_dict`; raises `ValueError` for a record that is damaged."""
        missing = [name for name in (f.name for f in dataclasses.fields(cls)) if name not in record]
        if missing:
            raise ValueError(f"features: expected {', '.join(missing)} in the record, got {sorted(record)}")
        return cls(
            str(record["kind"]),
            int(record["n_atoms"]),
            None if record["molecule"] is None else Molecule.from_dict(record["molecule"]),
            None if record["tree"] is None else ZMatrix.from_dict(record["tree"]),
            int(record["chosen"]),
            tuple(int(i) for i in record["pairs_of"]),
            None if record["reference"] is None else np.array(record["reference"], dtype=np.float64),
            None if record["template"] is None else np.array(record["template"], dtype=np.float64),
            int(record["n_columns"]),
        )
