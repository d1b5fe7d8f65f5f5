"""The implementation behind ``openmmml.MLPotential(name, ...)`` for every family of this package."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from openmmml.mlpotential import MLPotentialImpl

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.python_force import (
    DEFAULT_MAX_FORCE,
    PRECISIONS,
    ForceComputation,
    ForceSpec,
    load_model,
    make_force,
)
from openmm_mlff.potentials import family as families
from openmm_mlff.potentials.family import Family
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.units import ANGSTROM_PER_NM

#: keywords of createSystem and createMixedSystem
OPTIONS = ("charge", "multiplicity", "precision", "device", "longRangeCutoff", "compile", "maxForce", "threads")
#: keywords of MLPotential
CONSTRUCTOR_OPTIONS = ("modelPath", "model", "sha256")
#: keywords that openmm-ml's embeddings pass through
EMBEDDING_OPTIONS = ("mlLongRange", "linkAtomDistances")
#: what people write instead, in lower case without underscores
SYNONYMS = {
    "spin": "multiplicity",
    "totalspin": "multiplicity",
    "spinmultiplicity": "multiplicity",
    "magmom": "multiplicity",
    "unpaired": "multiplicity",
    "uhf": "multiplicity",
    "mult": "multiplicity",
    "totalcharge": "charge",
    "netcharge": "charge",
    "q": "charge",
    "dtype": "precision",
    "cutoff": "longRangeCutoff",
    "lrcutoff": "longRangeCutoff",
    "coulombcutoff": "longRangeCutoff",
    "torchcompile": "compile",
    "numthreads": "threads",
    "forcelimit": "maxForce",
    "path": "modelPath",
    "file": "modelPath",
    "checkpoint": "modelPath",
}


class MLFFPotentialImpl(MLPotentialImpl):
    """``MLPotential(name, modelPath=..., sha256=...)`` or ``MLPotential(name, model=...)``.

    Args:
        name: a family (takes a model), or a model that a plugin ships or knows where to fetch (takes none).
        family: the family that the name belongs to.
        args: ``modelPath``: a model file. ``model``: a `Potential` in memory (its weights are copied into the cache).
            ``sha256``: refuse another file.

    Raises `ValueError` or `TypeError` naming the argument, and `FileNotFoundError` for a missing file.
    """

    def __init__(self, name: str, family: Family, args: dict[str, Any]) -> None:
        self.name = name
        self.family = family
        _refuse_unknown(args, CONSTRUCTOR_OPTIONS, f"MLPotential({name!r}, ...)", elsewhere=OPTIONS)
        model = args.get("model")
        if model is not None:
            self._path, self._sha256 = None, self._store(model, args)
            self._own_cutoff = model.long_range_cutoff
        else:
            self._path, self._sha256 = self._find(args.get("modelPath"), args.get("sha256"))
            self._own_cutoff = load_model(self._sha256, family.name, self._path, device="cpu").long_range_cutoff

    def _store(self, model: Any, args: dict[str, Any]) -> str:
        if args.get("modelPath") is not None:
            raise ValueError("model: expected either model or modelPath, got both")
        if not isinstance(model, Potential) or model.family != self.family.name:
            kind = f"a {model.family!r} potential" if isinstance(model, Potential) else type(model).__name__
            raise TypeError(f"model: expected a {self.family.name!r} potential, got {kind}")
        return families.store_potential(model)

    def _find(self, given: Any, sha256: str | None) -> tuple[str, str]:
        """The path and checksum of the model file, which is copied into the cache."""
        shipped = {m.name: m for m in self.family.bundled}
        published = {m.name: m for m in self.family.published}
        if self.name in shipped or self.name in published:
            if given is not None:
                raise ValueError(
                    f"modelPath: {self.name!r} is one particular model; to use a file of your own, call "
                    f"MLPotential({self.family.name!r}, modelPath=...)"
                )
            if self.name in published:
                path, sha256 = _fetched(published[self.name]), published[self.name].sha256
            else:
                path = shipped[self.name].path
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{self.name}: its model file {path.name} is missing from this installation"
                    )
        else:
            if given is None:
                models = ", ".join(repr(n) for n in [*shipped, *published]) or "none"
                raise ValueError(f"modelPath: {self.name!r} needs a model file, got None; ready-made models: {models}")
            if not isinstance(given, (str, Path)):
                raise TypeError(f"modelPath: expected the path of a model file, got {type(given).__name__}")
            path = Path(given).expanduser().absolute()
            if not path.is_file():
                raise FileNotFoundError(f"modelPath: no file at {path}")
        if sha256 is not None:
            model_file.verify(path, sha256)
        # damaged files are refused before they get into the cache
        families.load_potential(path, self.family.name)
        return str(path), model_file.remember(path)

    def getMLLongRange(self) -> bool:
        """False: an ML region has no periodic images of its own, so those interactions stay with the MM force field."""
        return False

    def addForces(
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        charge: int = 0,
        multiplicity: int = 1,
        precision: str | None = None,
        device: str | torch.device | None = None,
        longRangeCutoff: float | unit.Quantity | None = None,
        compile: bool | str = "auto",
        maxForce: float | unit.Quantity | None = DEFAULT_MAX_FORCE,
        threads: int | None = None,
        **rest: Any,
    ) -> None:
        """Add the ML potential of some or all atoms to a system.

        Without `atoms` all are taken, with periodic images if the topology has box vectors. With `atoms` they are one
        open region, which must span less than half of a periodic box.

        Args:
            charge: total charge of the ML atoms in e. multiplicity: their spin multiplicity 2S+1.
            precision: 'single', 'double', or None for that of the model file.
            device: 'cpu', 'cuda', 'cuda:1', ...; None takes CUDA where there is one.
            longRangeCutoff: of the model's 1/r terms, nm or a Quantity; needed for periodic systems.
            compile: True, False, or 'auto' (compiled if the disk cache holds the compiled graph already).
            maxForce: kJ/mol/nm or a Quantity; a larger force stops the run. None switches this off.
            threads: torch threads on the CPU; None chooses by the number of atoms.

        Raises `ValueError` or `TypeError` naming the argument.
        """
        if atoms is None:
            _refuse_unknown(rest, OPTIONS, "createSystem", elsewhere=CONSTRUCTOR_OPTIONS)
        else:
            _warn_unknown({k: v for k, v in rest.items() if k not in EMBEDDING_OPTIONS})
        chosen = _atom_list(topology, atoms)
        model = load_model(self._sha256, self.family.name, self._path, device="cpu")
        numbers = _atomic_numbers(topology, chosen, model)
        model.check_electrons(numbers, charge, multiplicity)
        # openmm-ml hands over an empty system when it interpolates, so the topology is asked first
        periodic = topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions()
        spec = ForceSpec(
            sha256=self._sha256,
            family=self.family.name,
            path=self._path,
            numbers=tuple(numbers),
            atoms=None if atoms is None else tuple(chosen),
            charge=int(charge),
            multiplicity=int(multiplicity),
            precision=_check_precision(precision),
            device=_check_device(device),
            long_range_cutoff=_length(longRangeCutoff) if longRangeCutoff is not None else self._own_cutoff,
            region="open" if not periodic else "periodic" if atoms is None else "wrapped",
            compile=_check_compile(compile),
            max_force=_force_limit(maxForce),
            threads=_check_threads(threads),
        )
        computation = ForceComputation(spec)
        self._check_model(computation, topology)
        system.addForce(make_force(computation, None if atoms is None else chosen, periodic, forceGroup))
        _warn_of_immobile(topology, system, chosen)
        # an empty system means interpolation: the MM bonds stay there and keep the molecules
        if periodic and system.getNumParticles():
            _keep_molecules(topology, system, chosen, forceGroup)

    def _check_model(self, computation: ForceComputation, topology: openmm.app.Topology) -> None:
        spec, model = computation.spec, computation.model
        cell = None
        if spec.region == "periodic":
            box = topology.getPeriodicBoxVectors()
            cell = np.eye(3) if box is None else np.array(box.value_in_unit(unit.angstrom))
        indices = list(range(len(spec.numbers))) if spec.atoms is None else list(spec.atoms)
        place = {index: k for k, index in enumerate(indices)}
        pairs = [(place.get(b.atom1.index), place.get(b.atom2.index)) for b in topology.bonds()]
        # for families that know their atoms by place; the positions are not known yet
        info = {"topology_indices": indices, "topology_bonds": [p for p in pairs if None not in p]}
        zeros = np.zeros((len(spec.numbers), 3))
        model.check(Structure(np.array(spec.numbers), zeros, spec.charge, spec.multiplicity, cell, info=info))
        if cell is not None and model.long_range and spec.long_range_cutoff is None:
            raise ValueError(
                f"longRangeCutoff: a periodic system needs one, because {self.name} has 1/r interactions that must go "
                "to zero smoothly; expected a length such as longRangeCutoff=1.0 (nm), got None. For an isolated "
                "molecule, remove the box with topology.setPeriodicBoxVectors(None)"
            )


# -- arguments ---------------------------------------------------------------------------------------------------


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The keyword that was probably meant, or None."""
    plain = name.lower().replace("_", "")
    by_plain = {k.lower(): k for k in known}
    meant = SYNONYMS.get(plain)
    if meant is not None:
        return meant if meant in by_plain.values() else None
    if plain in by_plain:
        return by_plain[plain]
    import difflib

    close = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.75)
    return by_plain[close[0]] if close else None


def _refuse_unknown(given: Iterable[str], known: tuple[str, ...], where: str, elsewhere: tuple[str, ...]) -> None:
    for name in given:
        if name in known:
            continue
        if name in elsewhere:
            right = "createSystem or createMixedSystem" if elsewhere is OPTIONS else f"MLPotential({name}=...)"
            raise TypeError(f"{name}: not a keyword of {where}; pass it to {right}")
        meant = _nearest(name, (*known, *elsewhere))
        hint = f"did you mean {_explain(meant)}?" if meant else f"known keywords: {', '.join(known)}"
        raise TypeError(f"{name}: not a keyword of {where}; {hint}")


def _warn_unknown(given: dict[str, Any]) -> None:
    """In a mixed system the embedding's keywords come along: only near misses of ours are surely mistakes."""
    for name in given:
        meant = _nearest(name, (*OPTIONS, *CONSTRUCTOR_OPTIONS))
        if meant is not None:
            raise TypeError(f"{name}: not a keyword of createMixedSystem; did you mean {_explain(meant)}?")
        warnings.warn(f"{name}: not a keyword of the ML potential; left to the embedding", stacklevel=5)


def _explain(keyword: str) -> str:
    if keyword == "multiplicity":
        return "'multiplicity' (2S+1: 1 singlet, 2 doublet, ...)"
    return f"MLPotential({keyword}=...)" if keyword in CONSTRUCTOR_OPTIONS else repr(keyword)


def _atom_list(topology: openmm.app.Topology, atoms: Iterable[int] | None) -> list[int]:
    n = topology.getNumAtoms()
    if atoms is None:
        chosen = list(range(n))
    else:
        chosen = []
        for i in atoms:
            if isinstance(i, (bool, np.bool_)) or int(i) != i:
                raise ValueError(f"atoms: expected whole numbers, got {i!r}")
            if not 0 <= i < n:
                raise ValueError(f"atoms: expected indices from 0 to {n - 1}, got {int(i)}")
            chosen.append(int(i))
    if not chosen:
        raise ValueError("atoms: expected at least one atom, got none")
    if len(set(chosen)) != len(chosen):
        repeated = next(i for k, i in enumerate(chosen) if i in chosen[:k])
        raise ValueError(f"atoms: expected every index once, got {repeated} more than once")
    return chosen


def _atomic_numbers(topology: openmm.app.Topology, chosen: list[int], model: Potential) -> list[int]:
    """Atomic numbers by element; of a coarse-grained model's beads by their names."""
    every = list(topology.atoms())
    atoms = [every[i] for i in chosen]
    names = tuple(atom.name for atom in atoms)
    if model.beads is not None and names == model.beads:
        return list(model.bead_numbers)
    for i, atom in zip(chosen, atoms, strict=True):
        if atom.element is None:
            if model.beads is not None:
                raise ValueError(
                    f"beads: expected {' '.join(model.beads)} in this order, got {' '.join(names)} (atom {i} has no "
                    "element, so that only its name could tell what it is)"
                )
            raise ValueError(f"elements: expected an element for every ML atom, got none for atom {i}")
    return [atom.element.atomic_number for atom in atoms]


def _warn_of_immobile(topology: openmm.app.Topology, system: openmm.System, chosen: list[int]) -> None:
    """Beads without elements get no mass from openmm-ml, and OpenMM does not move what has none."""
    elements = [atom.element for atom in topology.atoms()]
    still = [
        i
        for i in chosen
        if elements[i] is None and i < system.getNumParticles() and system.getParticleMass(i)._value == 0
    ]
    if still:
        warnings.warn(
            f"masses: beads {still} have no element and so no mass; OpenMM will not move them until "
            "system.setParticleMass(index, mass) gives them one",
            stacklevel=4,
        )


def _check_precision(precision: Any) -> str | None:
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected 'single', 'double' or None, got {precision!r}")
    return precision


def _check_device(device: Any) -> str | None:
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a name such as 'cpu' or 'cuda:0', or None, got {type(device).__name__}")
    try:
        name = str(torch.device(device))
        torch.zeros(1, device=name)
    except Exception as error:
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"device: expected one of {', '.join(known)}, or None, got {str(device)!r} ({why})") from None
    return name


def _check_compile(value: Any) -> bool | str:
    if value is True or value is False or value == "auto":
        return value
    raise ValueError(f"compile: expected 'auto', True or False, got {value!r}")


def _check_threads(threads: Any) -> int | None:
    if threads is not None and (isinstance(threads, bool) or int(threads) != threads or threads < 1):
        raise ValueError(f"threads: expected a whole number >= 1 or None, got {threads!r}")
    return None if threads is None else int(threads)


def _length(value: Any) -> float:
    """angstrom"""
    nanometers = value.value_in_unit(unit.nanometer) if unit.is_quantity(value) else float(value)
    if not (math.isfinite(nanometers) and nanometers > 0):
        raise ValueError(f"longRangeCutoff: expected a positive length (nm or a Quantity), got {value}")
    return nanometers * ANGSTROM_PER_NM


def _force_limit(value: Any) -> float | None:
    if value is None:
        return None
    limit = value.value_in_unit(unit.kilojoule_per_mole / unit.nanometer) if unit.is_quantity(value) else float(value)
    if not limit > 0:
        raise ValueError(f"maxForce: expected a positive force (kJ/mol/nm or a Quantity) or None, got {value}")
    return limit if math.isfinite(limit) else None


def _fetched(model: families.PublishedModel) -> Path:
    path = model_file.cached(model.sha256)
    if path is None:
        raise FileNotFoundError(
            f"{model.name}: not in the cache ({model_file.cache_dir()}); fetch it with `openmm-mlff models` or "
            f"download {model.url} and use MLPotential({model.family!r}, modelPath=...)"
        )
    return path


# -- molecules ---------------------------------------------------------------------------------------------------


def _keep_molecules(topology: openmm.app.Topology, system: openmm.System, atoms: list[int], group: int) -> None:
    """Bonds without energy between ML atoms, so that OpenMM sees the molecules that the Monte Carlo barostat scales."""
    members = set(atoms)
    pairs = [(b.atom1.index, b.atom2.index) for b in topology.bonds()]
    pairs = [p for p in pairs if members.issuperset(p)]
    if not pairs:
        return
    force = openmm.HarmonicBondForce()
    force.setName("ML molecules (no energy)")
    force.setForceGroup(group)
    force.setUsesPeriodicBoundaryConditions(True)
    for i, j in pairs:
        force.addBond(i, j, 0.1, 0.0)
    system.addForce(force)
