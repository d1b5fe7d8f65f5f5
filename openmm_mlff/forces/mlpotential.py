"""The implementation behind ``openmmml.MLPotential(name, ...)`` for every family of this package."""

from __future__ import annotations

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
from openmm_mlff.forces.arguments import (
    CONSTRUCTOR_OPTIONS,
    EMBEDDING_OPTIONS,
    OPTIONS,
    atom_list,
    atomic_numbers,
    check_compile,
    check_device,
    check_long_range_method,
    check_phase,
    check_precision,
    check_threads,
    force_limit,
    length,
    refuse_unknown,
    warn_of_immobile,
    warn_unknown,
    whole_number,
)
from openmm_mlff.forces.arguments import uncertainty_limit as check_uncertainty_limit
from openmm_mlff.forces.force_spec import DEFAULT_MAX_FORCE, ForceSpec
from openmm_mlff.forces.loading import load_model
from openmm_mlff.forces.python_force import ForceComputation, make_force, other_spec
from openmm_mlff.forces.uncertainty import ON_UNCERTAIN, OtherModel, UncertaintySpec
from openmm_mlff.potentials import family as families
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import Family
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.units import ANGSTROM_PER_NM

#: nm; the pairs within a longer one fill the memory, and whoever asks for it means angstroms
LONGEST_PERIODIC_CUTOFF = 5.0


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
        refuse_unknown(args, CONSTRUCTOR_OPTIONS, f"MLPotential({name!r}, ...)", elsewhere=OPTIONS)
        model = args.get("model")
        if model is not None:
            self._path, self._sha256 = None, self._store(model, args)
            self._own_cutoff, self._own_method = model.long_range_cutoff, model.long_range_method
            self._predicts_charges = model.predicts_charges
        else:
            self._path, self._sha256 = self._find(args.get("modelPath"), args.get("sha256"))
            stored = load_model(self._sha256, family.name, self._path, device="cpu")
            self._own_cutoff, self._own_method = stored.long_range_cutoff, "shifted"
            self._predicts_charges = stored.predicts_charges

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
        known = published.get(self.name)
        if given is not None and (self.name in shipped or (known is not None and known.is_it is None)):
            raise ValueError(
                f"modelPath: {self.name!r} is one particular model; to use a file of your own, call "
                f"MLPotential({self.family.name!r}, modelPath=...)"
            )
        if given is not None:
            path = _given(given)
        elif known is not None:
            path = _found(known)
            if known.is_it is None:
                sha256 = known.sha256
        elif self.name in shipped:
            path = shipped[self.name].path
            if not path.is_file():
                raise FileNotFoundError(f"{self.name}: its model file {path.name} is missing from this installation")
        else:
            models = ", ".join(repr(n) for n in [*shipped, *published]) or "none"
            raise ValueError(f"modelPath: {self.name!r} needs a model file, got None; ready-made models: {models}")
        if sha256 is not None:
            model_file.verify(path, sha256)
        # damaged files are refused before they get into the cache
        model = families.load_potential(path, self.family.name)
        if known is not None and known.is_it is not None and not known.is_it(model):
            raise ValueError(
                f"modelPath: {path} holds another model than {self.name!r}; to use it all the same, call "
                f"MLPotential({self.family.name!r}, modelPath=...)"
            )
        return str(path), families.remember_potential(path, self.family, model)

    def getMLLongRange(self) -> bool:
        """False, whatever `longRangeMethod` a whole box may have.

        openmm-ml asks this for mixed systems only. Their ML region is open there: it has no periodic images of its own,
        so those interactions stay with the MM force field.
        """
        return False

    def getSupportedEmbeddings(self) -> list[str]:
        """'electrostatic' for models that predict charges, beside openmm-ml's own 'mechanical'."""
        return ["electrostatic"] if self._predicts_charges else []

    def createMixedSystem(
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: list[int],
        forceGroup: int,
        interpolate: bool,
        embedding: str,
        returnInfo: bool = False,
        **args: Any,
    ) -> openmm.System | dict[str, Any]:
        """A mixed system with electrostatic embedding (see `forces.embedding` and `embedding_arguments.Settings`).

        Raises `ValueError` or `TypeError` naming the argument.
        """
        from openmm_mlff.forces.embedding import create_mixed_system

        if embedding not in self.getSupportedEmbeddings():
            raise ValueError(f"embedding: {self.name} offers no {embedding!r}")
        mixed = create_mixed_system(self.addForces, topology, system, atoms, forceGroup, interpolate, args)
        if mixed.system.usesPeriodicBoundaryConditions() and not interpolate:
            _keep_molecules(topology, mixed.system, atoms, forceGroup)
        if not returnInfo:
            return mixed.system
        old_to_new = list(range(topology.getNumAtoms()))
        return {"system": mixed.system, "topology": mixed.topology, "oldToNew": old_to_new}

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
        longRangeMethod: str | None = None,
        compile: bool | str = "auto",
        maxForce: float | unit.Quantity | None = DEFAULT_MAX_FORCE,
        threads: int | None = None,
        phase: str | None = None,
        on_uncertain: str | None = None,
        uncertainty_limit: float | unit.Quantity | None = None,
        uncertain_interval: int = 100,
        fall_back: str | Path | None = None,
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
            longRangeMethod: of the charges of a periodic system: 'shifted' (to zero at the cutoff), or 'ewald' or 'pme'
                (with all images) where the family offers them; None for the model's own.
            compile: True, False, or 'auto' (native code, or a compiled graph that the disk cache holds already).
            maxForce: kJ/mol/nm or a Quantity; a larger force stops the run. None switches this off.
            threads: torch threads on the CPU; None chooses by the number of atoms.
            phase: which energy, for potentials that offer several (`Potential.phases`); None for the model's own.
            on_uncertain: what an ensemble does when it is unsure of a force: 'warn', 'save' (the frame, for labelling,
                in the folder uncertain_frames, see `running.save_uncertain_frames`), 'stop', or 'fall_back': the model
                `fall_back` takes over for good. That exchanges the force field in the middle of a run: the energy
                jumps (the log says by how much), what was sampled before and after belongs to two different
                ensembles, and it does not switch back, because a switch that follows the geometry conserves nothing.
            uncertainty_limit: eV/angstrom or a Quantity, of the force on any atom; None for that of the model file.
            uncertain_interval: steps between two saved frames, at least.
            fall_back: a model file, or the name of a model.

        Raises `ValueError` or `TypeError` naming the argument.
        """
        if atoms is None:
            refuse_unknown(rest, OPTIONS, "createSystem", elsewhere=CONSTRUCTOR_OPTIONS)
        else:
            warn_unknown({k: v for k, v in rest.items() if k not in EMBEDDING_OPTIONS})
        chosen = atom_list(topology, atoms)
        model = load_model(self._sha256, self.family.name, self._path, device="cpu")
        numbers = atomic_numbers(topology, chosen, model)
        charge, multiplicity = whole_number("charge", charge), whole_number("multiplicity", multiplicity)
        phase = check_phase(phase, model)
        model = model if phase is None else model.in_phase(phase)
        model.check_electrons(numbers, charge, multiplicity)
        if len(chosen) < topology.getNumAtoms():
            _refuse_implicit(model, phase)
        # openmm-ml hands over an empty system when it interpolates, so the topology is asked first
        periodic = topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions()
        region = "open" if not periodic else "periodic" if atoms is None else "wrapped"
        if longRangeMethod is None:
            longRangeMethod = self._own_method if region == "periodic" else "shifted"
        spec = ForceSpec(
            sha256=self._sha256,
            family=self.family.name,
            path=self._path,
            numbers=tuple(numbers),
            atoms=None if atoms is None else tuple(chosen),
            charge=charge,
            multiplicity=multiplicity,
            precision=check_precision(precision),
            device=check_device(device),
            long_range_cutoff=length(longRangeCutoff) if longRangeCutoff is not None else self._own_cutoff,
            long_range_method=check_long_range_method(longRangeMethod, model, region, charge),
            region=region,
            compile=check_compile(compile),
            max_force=force_limit(maxForce),
            threads=check_threads(threads),
            phase=phase,
            coupling_parameter=model.coupling_parameter,
            uncertainty=read_uncertainty(
                model, self.family.name, on_uncertain, uncertainty_limit, uncertain_interval, fall_back, longRangeCutoff
            ),
        )
        computation = ForceComputation(spec)
        self._check_model(computation, topology)
        if spec.uncertainty is not None and spec.uncertainty.other is not None:
            self._check_model(ForceComputation(other_spec(spec)), topology)
        system.addForce(make_force(computation, None if atoms is None else chosen, periodic, forceGroup))
        warn_of_immobile(topology, system, chosen)
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
        nanometers = (spec.long_range_cutoff or 0.0) / ANGSTROM_PER_NM
        if cell is not None and model.long_range and nanometers > LONGEST_PERIODIC_CUTOFF:
            raise ValueError(
                f"longRangeCutoff: expected at most {LONGEST_PERIODIC_CUTOFF:g} nm in a periodic box, got "
                f"{nanometers:g} nm; every image within it would be a pair"
            )


def _refuse_implicit(model: Potential, phase: str | None) -> None:
    """A region among other atoms would be solvated twice: by them, and by the continuum in its energy."""
    if model.implicit_solvent:
        vacuum = [name for name in model.phases if not model.in_phase(name).implicit_solvent]
        instead = f"; expected {' or '.join(repr(name) for name in vacuum)}" if vacuum else ""
        raise ValueError(
            f"phase: the energy of {model.family} in phase {phase!r} holds a solvent around the whole molecule, so it "
            f"cannot describe some atoms among others{instead}"
        )


def read_uncertainty(
    model: Potential,
    name: str,
    action: str | None,
    limit: float | unit.Quantity | None,
    interval: int,
    fall_back: str | Path | None,
    long_range_cutoff: float | unit.Quantity | None,
) -> UncertaintySpec | None:
    """What the keywords of `MLFFPotentialImpl.addForces` about uncertainty ask for; None if nothing."""
    if action is None:
        given = {"uncertainty_limit": limit, "fall_back": fall_back}
        for keyword, value in given.items():
            if value is not None:
                raise ValueError(f"{keyword}: expected None without on_uncertain, got {value!r}")
        return None
    if action not in ON_UNCERTAIN:
        raise ValueError(f"on_uncertain: expected {', '.join(map(repr, ON_UNCERTAIN))} or None, got {action!r}")
    if not isinstance(model, Ensemble):
        raise ValueError(
            f"on_uncertain: expected an ensemble, whose members disagree where it is unsure, got a {name!r} model; "
            "join models by `openmm-mlff models ensemble`"
        )
    other = None if fall_back is None else _other_model(fall_back, long_range_cutoff)
    return UncertaintySpec(action, check_uncertainty_limit(limit, model.config.force_limit), interval, other)


def _other_model(given: str | Path, long_range_cutoff: float | unit.Quantity | None) -> OtherModel:
    """The model file, or the model that a plugin ships or knows, in the cache."""
    path = Path(given).expanduser()
    name, arguments = str(given), {}
    if path.is_file():
        name, arguments = families.load_potential(path).family, {"modelPath": path}
    elif path.suffix:
        raise FileNotFoundError(f"fall_back: no file at {path}")
    found = MLFFPotentialImpl(name, families.find_family(name), arguments)
    model = load_model(found._sha256, found.family.name, found._path, device="cpu")
    cutoff = length(long_range_cutoff) if long_range_cutoff is not None else found._own_cutoff
    phase = model.phases[0] if model.phases else None
    return OtherModel(found._sha256, found.family.name, found._path, cutoff, phase)


def _given(path: Any) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"modelPath: expected the path of a model file, got {type(path).__name__}")
    absolute = Path(path).expanduser().absolute()
    if not absolute.is_file():
        raise FileNotFoundError(f"modelPath: no file at {absolute}")
    return absolute


def _found(model: families.PublishedModel) -> Path:
    path = families.find_published(model)
    if path is None:
        package = f"install it with pip install 'openmm-mlff[{model.extra}]', " if model.extra is not None else ""
        raise FileNotFoundError(
            f"{model.name}: not in the cache ({model_file.cache_dir()}); {package}fetch it with `openmm-mlff models "
            f"fetch {model.name}`, or download {model.url} and use MLPotential({model.family!r}, modelPath=...)"
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
