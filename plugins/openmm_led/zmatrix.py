"""positions <-> bonds, angles and torsions along a tree of bonds, exactly and differentiably.

Every rotatable bond has one dihedral; the other atoms on that bond are given by improper offsets from the first one, so
that the handedness of a centre is a coordinate of its own and not the difference of two independent torsions.
Placement is that of Parsons et al., J. Comput. Chem. 26, 1063 (2005), with frames that are passed on from bond to bond
instead of being rebuilt from positions, so that no cross product has to be normalised.

Units: nm, rad. Arrays have the frame as their first axis; what goes in as numpy comes out as numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from openmm_led.molecule import Molecule, fragments

#: one array library for what goes in and what comes out
Array = TypeVar("Array", np.ndarray, Tensor)

#: smallest sine of an angle on which torsions hang: three atoms within 0.06 degrees of a line
LEAST_SINE = 1e-3
#: frames that are worked on at a time, which bounds the memory
_CHUNK = 4096
_AXIS_NAMES = ("N", "CA", "C")


def on_torch(function: Callable[[Tensor], Tensor], array: Array) -> Array:
    """Call `function` with float64: a tensor as it is, an array in pieces of frames and without gradients."""
    if isinstance(array, Tensor):
        return function(array.to(torch.float64))
    starts = range(0, max(len(array), 1), _CHUNK)
    with torch.no_grad():
        pieces = [function(torch.tensor(array[k : k + _CHUNK], dtype=torch.float64)).numpy() for k in starts]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def check_array(name: str, array: Any, *shape: int) -> None:
    """Raise `ValueError` unless this is an array or tensor of shape ``(n, *shape)`` whose frames are all finite."""
    if not isinstance(array, np.ndarray | Tensor):
        raise ValueError(f"{name}: expected a numpy array or a torch tensor, got {type(array).__name__}")
    if tuple(array.shape[1:]) != shape or array.ndim != len(shape) + 1:
        expected = ", ".join(["n", *map(str, shape)])
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(array.shape)}")
    finite = torch.isfinite(array) if isinstance(array, Tensor) else np.isfinite(array)
    if not bool(finite.all()):
        frame = int(np.argmin(np.asarray(finite.reshape(len(array), -1).all(1).tolist())))
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in frame {frame}")


@dataclass(frozen=True)
class _Tables:
    """Index arrays of `ZMatrix._place`, of one array library; atoms in the order of their depth in the tree."""

    bond: Any
    angle: Any
    torsion: Any
    main: Any
    levels: tuple[tuple[Any, int, int], ...]
    back: Any
    start: Any


@dataclass(frozen=True)
class ZMatrix:
    """Internal coordinates of a connected set of atoms.

    Columns of `values`: the N-1 bonds of ``atoms[1:]``, the N-2 angles of ``atoms[2:]``, the N-3 torsions of
    ``atoms[3:]``, in this order.

    Attributes:
        atoms: indices in the molecule, each after those it refers to.
        references: of each atom: the one it is bonded to, that of the angle, that of the torsion; -1 where there is
            none. The torsion of atom i with references (j, k, l) is the dihedral angle i-j-k-l; it is improper where l
            hangs on j, as i does.

    Raises `ValueError` for references that are not a tree in this order.
    """

    atoms: tuple[int, ...]
    references: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if len(self.atoms) < 3 or len(self.atoms) != len(self.references) or len(set(self.atoms)) != len(self.atoms):
            raise ValueError(f"atoms: expected at least 3 different atoms with references, got {list(self.atoms)}")
        known: set[int] = {-1}
        for row, (atom, references) in enumerate(zip(self.atoms, self.references, strict=True)):
            due = min(row, 3)
            if len(references) != 3 or len(set(references[:due])) != due or any(r != -1 for r in references[due:]):
                raise ValueError(f"references: expected {due} of atom {atom}, got {list(references)}")
            if atom < 0 or not known.issuperset(references) or -1 in references[:due]:
                raise ValueError(f"references: expected those of atom {atom} to come before it, got {list(references)}")
            known.add(atom)

    @property
    def n_atoms(self) -> int:
        return len(self.atoms)

    @property
    def n_values(self) -> int:
        return 3 * len(self.atoms) - 6

    @cached_property
    def _parents(self) -> dict[int, int]:
        return {atom: row[0] for atom, row in zip(self.atoms, self.references, strict=True)}

    @cached_property
    def quadruples(self) -> tuple[tuple[int, ...], ...]:
        """Atoms of each column: two of a bond, three of an angle, four of a torsion, the one that it places first."""
        rows = list(zip(self.atoms, self.references, strict=True))
        return tuple((atom, *row[:width]) for width in (1, 2, 3) for atom, row in rows[width:])

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Of each column: ``bond``, ``angle``, ``dihedral`` or ``improper``."""
        n, parents = self.n_atoms, self._parents
        torsions = ["improper" if parents[q[3]] == q[1] else "dihedral" for q in self.quadruples[2 * n - 3 :]]
        return ("bond",) * (n - 1) + ("angle",) * (n - 2) + tuple(torsions)

    def head(self, n: int) -> ZMatrix:
        """That of the first n atoms."""
        return ZMatrix(self.atoms[:n], self.references[:n])

    def head_columns(self, n: int) -> np.ndarray:
        """Where the columns of ``head(n)`` are among the own ones, ``(3 n - 6,)``."""
        own = self.n_atoms
        return np.concatenate([np.arange(n - 1), own - 1 + np.arange(n - 2), 2 * own - 3 + np.arange(n - 3)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {"atoms": list(self.atoms), "references": [list(row) for row in self.references]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ZMatrix:
        """The inverse of `to_dict`; raises `ValueError` for a record that is damaged."""
        try:
            rows = [tuple(int(i) for i in row) for row in record["references"]]
            return cls(tuple(int(i) for i in record["atoms"]), tuple((r[0], r[1], r[2]) for r in rows))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"zmatrix: expected atoms and references, got {error!r}") from error

    # ------------------------------------------------------------------------------------ positions -> values
    def values(self, positions: Array, *, straight: bool = False) -> Array:
        """Bonds, angles and torsions (in (-pi, pi]), ``(n, 3 N - 6)``.

        Args:
            positions: ``(n, n_atoms of the molecule, 3)`` nm; molecules whole, which is the caller's business where
                there is a periodic box.
            straight: accept three atoms on a line on which others hang; the torsions about it mean little then.

        Raises `ValueError` for positions that are not finite and, unless `straight`, where three atoms on which others
        hang are on a line.
        """
        if positions.ndim != 3 or positions.shape[1] <= max(self.atoms) or positions.shape[2] != 3:
            raise ValueError(
                f"positions: expected shape (n, more than {max(self.atoms)}, 3), got {tuple(positions.shape)}"
            )
        check_array("positions", positions, *positions.shape[1:])
        return on_torch(lambda x: self._measure(x, straight), positions)

    @cached_property
    def _columns(self) -> list[Tensor]:
        """Atoms and their three references, as far as there are any."""
        rows = torch.tensor([(atom, *row) for atom, row in zip(self.atoms, self.references, strict=True)])
        return [rows[max(width, 1) :, width].contiguous() for width in range(4)]

    def _measure(self, positions: Tensor, straight: bool) -> Tensor:
        at = [positions[:, index.to(positions.device)] for index in self._columns]
        # of each width the atoms that have it: i from the second atom on, k from the third, l from the fourth
        i, j, k, m = at[0], at[1], at[2], at[3]
        bond = j - i
        axis = k - j[:, 1:]
        normal = torch.cross(bond[:, 1:], axis, dim=-1)
        angle = torch.atan2(normal.norm(dim=-1), -(bond[:, 1:] * axis).sum(-1))
        if not straight:
            self._check_bent(angle)
        other = torch.cross(axis[:, 1:], m - k[:, 1:], dim=-1)
        sine = (bond[:, 2:] * other).sum(-1) * axis[:, 1:].norm(dim=-1)
        torsion = torch.atan2(sine, (normal[:, 1:] * other).sum(-1))
        return torch.cat([bond.norm(dim=-1), angle, torsion], dim=1)

    @cached_property
    def _hinges(self) -> np.ndarray:
        """Columns among the angles on which torsions hang: that of the third atom, and those of atoms with children."""
        carriers = {*self._parents.values(), self.atoms[2]} if self.n_atoms > 3 else set()
        return np.array([row for row, atom in enumerate(self.atoms[2:]) if atom in carriers], dtype=np.int64)

    def _check_bent(self, angle: Tensor) -> None:
        straight = torch.sin(angle[:, self._hinges]).abs() < LEAST_SINE
        if bool(straight.any()):
            frame, column = (int(x) for x in straight.nonzero()[0])
            atoms = self.quadruples[self.n_atoms - 1 + int(self._hinges[column])]
            raise ValueError(
                f"positions: expected atoms {', '.join(map(str, atoms))} to form an angle on which torsions can hang, "
                f"got a straight line in frame {frame}"
            )

    # ------------------------------------------------------------------------------------ values -> positions
    def positions(self, values: Array) -> Array:
        """Atoms in the order of their index in the molecule, ``(n, N, 3)`` nm.

        Args:
            values: ``(n, 3 N - 6)``, as `values` gives them.

        The first atom of the tree is at the origin, the second on the x axis, the third in the xy plane with y >= 0.
        """
        check_array("values", values, self.n_values)
        if isinstance(values, Tensor):
            return self._place(torch, values.to(torch.float64), self._tensors(values.device))
        return np.ascontiguousarray(self._place(np, values.astype(np.float64, copy=False), self._arrays))

    @staticmethod
    def _place(xp: Any, values: Any, tables: _Tables) -> Any:
        n = len(values)
        like = {"dtype": values.dtype} | ({"device": values.device} if xp is torch else {})
        # two rows more than there are values: an angle of 0 and one of pi
        rows = xp.concatenate([values.T, xp.zeros((1, n), **like), xp.full((1, n), np.pi, **like)])
        theta, phi = rows[tables.angle], rows[tables.torsion] + rows[tables.main]
        c, s, cos_phi, sin_phi = xp.cos(theta), xp.sin(theta), xp.cos(phi), xp.sin(phi)
        turn = xp.stack(
            [-c, -s, xp.zeros_like(c), s * cos_phi, -c * cos_phi, -sin_phi, s * sin_phi, -c * sin_phi, cos_phi], -1
        ).reshape((*c.shape, 3, 3))
        bond = rows[tables.bond][..., None]
        # of each atom: x along the bond that leads to it, y towards what torsions about this bond are measured from
        frames = tables.start
        place = xp.zeros((1, n, 3), **like)
        placed = [place]
        for parent, first, last in tables.levels:
            frames = frames[parent] @ turn[first:last]
            place = place[parent] + bond[first:last] * frames[..., 0]
            placed.append(place)
        return xp.swapaxes(xp.concatenate(placed)[tables.back], 0, 1)

    @cached_property
    def _arrays(self) -> _Tables:
        n = self.n_atoms
        row = {atom: k for k, atom in enumerate(self.atoms)}
        depth = {self.atoms[0]: 0}
        for atom in self.atoms[1:]:
            depth[atom] = depth[self._parents[atom]] + 1
        order = sorted(self.atoms, key=lambda atom: depth[atom])
        zero, straight = self.n_values, self.n_values + 1
        angle, torsion, main = [], [], []
        for atom in order[1:]:
            k = row[atom]
            # the frame of the first atom looks away from the second: that one turns it round and is itself the axis
            angle.append(n - 1 + k - 2 if k > 1 else zero)
            torsion.append(2 * n - 3 + k - 3 if k > 2 else zero if k == 2 else straight)
            # an offset is from the atom it refers to, whose own torsion is zero by choice if it is the third atom
            offset = k > 2 and self.kinds[2 * n - 6 + k] == "improper"
            k_main = row[self.references[k][2]] if offset else 2
            main.append(2 * n - 6 + k_main if k_main > 2 else zero)
        levels, first = [], 0
        for level in range(1, max(depth.values()) + 1):
            above = [atom for atom in order if depth[atom] == level - 1]
            here = [atom for atom in order if depth[atom] == level]
            parent = np.array([above.index(self._parents[atom]) for atom in here])
            levels.append((parent, first, first + len(here)))
            first += len(here)
        return _Tables(
            np.array([row[atom] - 1 for atom in order[1:]]),
            np.array(angle),
            np.array(torsion),
            np.array(main),
            tuple(levels),
            np.argsort(np.array(order)),
            np.diag([-1.0, 1.0, -1.0])[None, None],
        )

    @cached_property
    def _cache(self) -> dict[torch.device, _Tables]:
        return {}

    def _tensors(self, device: torch.device) -> _Tables:
        if device not in self._cache:
            a = self._arrays
            index = [torch.from_numpy(x).to(device) for x in (a.bond, a.angle, a.torsion, a.main, a.back, a.start)]
            levels = tuple((torch.from_numpy(p).to(device), first, last) for p, first, last in a.levels)
            self._cache[device] = _Tables(index[0], index[1], index[2], index[3], levels, index[4], index[5])
        return self._cache[device]


# ---------------------------------------------------------------------------------------------- building the tree
def build(molecule: Molecule, atoms: Sequence[int]) -> ZMatrix:
    """Internal coordinates of all atoms of a molecule, `atoms` first: ``head(len(atoms))`` is that of these alone.

    The tree starts in the middle of the longest chain of `atoms` and follows bonds outwards, breadth first. Rings are
    left open at the bond opposite to where the tree enters them, disulfide bridges wherever another way exists.
    Dihedrals are measured along the backbone, or else along the larger branch.

    Raises `ValueError` for fewer than three atoms, atoms that are not joined by bonds among themselves, or a molecule
    of several parts.
    """
    if len(atoms) < 3:
        raise ValueError(f"atoms: expected at least 3, got {len(atoms)}")
    for name, group in (("topology", range(len(molecule))), ("atoms", atoms)):
        parts = fragments(molecule, group)
        if len(parts) > 1:
            raise ValueError(
                f"{name}: expected atoms joined by bonds, got {len(parts)} separate parts, "
                f"for instance with {molecule.label(parts[0][0])} and with {molecule.label(parts[1][0])}"
            )
    chosen = frozenset(atoms)
    root = _middle(molecule, chosen)
    parents = _spanning_tree(molecule, {root: -1}, chosen)
    parents = _spanning_tree(molecule, parents, frozenset(range(len(molecule))))
    children = _ranked_children(molecule, parents, chosen)
    second = children[root][0]
    third = children[second][0] if any(i in chosen for i in children[second]) else children[root][1]
    order = [root]
    for atom in order:
        order += children[atom]
    rest = [atom for atom in order if atom not in (root, second, third)]
    order = [root, second, third] + [i for i in rest if i in chosen] + [i for i in rest if i not in chosen]

    references = [(-1, -1, -1), (root, -1, -1), (parents[third], root if parents[third] == second else second, -1)]
    main = {parents[third]: third}
    for atom in order[3:]:
        parent = parents[atom]
        if parent == root:
            axis, reference = second, third
        elif parent == second:
            axis, reference = root, third
        else:
            axis = parents[parent]
            reference = second if axis == root else parents[axis]
        references.append((parent, axis, main.setdefault(parent, atom) if parent in main else reference))
        main.setdefault(parent, atom)
    return ZMatrix(tuple(order), tuple(references))


def _spanning_tree(molecule: Molecule, parents: Mapping[int, int], allowed: frozenset[int]) -> dict[int, int]:
    """Breadth first from atoms that have a parent; disulfide bridges are crossed only when nothing else is left."""
    found = dict(parents)
    queue, bridges = list(found), []
    while True:
        for atom in queue:
            around = [i for i in molecule.neighbours[atom] if i in allowed and i not in found]
            for other in sorted(around, key=lambda i: (molecule.names[i] not in _AXIS_NAMES, not molecule.heavy(i), i)):
                if molecule.elements[atom] == molecule.elements[other] == "S":
                    bridges.append((atom, other))
                    continue
                found[other] = atom
                queue.append(other)
        bridges = [bridge for bridge in bridges if bridge[1] not in found]
        if not bridges:
            return found
        atom, other = bridges.pop(0)
        found[other] = atom
        queue = [other]


def _middle(molecule: Molecule, atoms: frozenset[int]) -> int:
    """Middle of the longest chain of bonds, found by two searches; a short tree has fewer levels to place."""
    far = min(atoms)
    for _ in range(2):
        parents = _spanning_tree(molecule, {far: -1}, atoms)
        depth = {far: 0}
        for atom, parent in parents.items():
            depth[atom] = 0 if parent == -1 else depth[parent] + 1
        far = max(depth, key=lambda atom: depth[atom])
    chain = [far]
    while parents[chain[-1]] != -1:
        chain.append(parents[chain[-1]])
    return chain[len(chain) // 2]


def _ranked_children(molecule: Molecule, parents: Mapping[int, int], chosen: frozenset[int]) -> dict[int, list[int]]:
    """Atoms that hang on each atom, the one that carries the dihedral of their bond first."""
    size = dict.fromkeys(parents, 1)
    for atom in reversed(list(parents)):
        if parents[atom] != -1:
            size[parents[atom]] += size[atom]
    children: dict[int, list[int]] = {atom: [] for atom in parents}
    for atom, parent in parents.items():
        if parent != -1:
            children[parent].append(atom)

    def rank(atom: int) -> tuple[bool, bool, bool, int, int]:
        along = molecule.names[atom] in _AXIS_NAMES
        return atom not in chosen, not along, not molecule.heavy(atom), -size[atom], atom

    return {atom: sorted(group, key=rank) for atom, group in children.items()}
