"""Arguments of createSystem, createMixedSystem and MLPotential: checked and in this package's units, or one error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_mlff.forces.force_spec import PRECISIONS
from openmm_mlff.potentials.electrostatics import LONG_RANGE_METHODS
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM

#: keywords of createSystem and createMixedSystem
OPTIONS = (
    *("charge", "multiplicity", "precision", "device", "longRangeCutoff", "longRangeMethod"),
    *("compile", "maxForce", "threads", "phase"),
    *("on_uncertain", "uncertainty_limit", "uncertain_interval", "fall_back"),
)
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
    "coulombmethod": "longRangeMethod",
    "nonbondedmethod": "longRangeMethod",
    "kspace": "longRangeMethod",
    "kspaceelectrostatics": "longRangeMethod",
    "ewald": "longRangeMethod",
    "pme": "longRangeMethod",
    "torchcompile": "compile",
    "numthreads": "threads",
    "forcelimit": "maxForce",
    "solvent": "phase",
    "environment": "phase",
    "onuncertain": "on_uncertain",
    "uncertaintylimit": "uncertainty_limit",
    "fallback": "fall_back",
    "path": "modelPath",
    "file": "modelPath",
    "checkpoint": "modelPath",
}


def nearest_keyword(name: str, known: Iterable[str]) -> str | None:
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


def refuse_unknown(given: Iterable[str], known: tuple[str, ...], where: str, elsewhere: tuple[str, ...]) -> None:
    """`TypeError` for the first name that is not in `known`, with the one that was probably meant."""
    for name in given:
        if name in known:
            continue
        if name in elsewhere:
            right = "createSystem or createMixedSystem" if elsewhere is OPTIONS else f"MLPotential({name}=...)"
            raise TypeError(f"{name}: not a keyword of {where}; pass it to {right}")
        meant = nearest_keyword(name, (*known, *elsewhere))
        hint = f"did you mean {explain(meant)}?" if meant else f"known keywords: {', '.join(known)}"
        raise TypeError(f"{name}: not a keyword of {where}; {hint}")


def warn_unknown(given: dict[str, Any]) -> None:
    """In a mixed system the embedding's keywords come along: only near misses of ours are surely mistakes."""
    for name in given:
        meant = nearest_keyword(name, (*OPTIONS, *CONSTRUCTOR_OPTIONS))
        if meant is not None:
            raise TypeError(f"{name}: not a keyword of createMixedSystem; did you mean {explain(meant)}?")
        warnings.warn(f"{name}: not a keyword of the ML potential; left to the embedding", stacklevel=5)


def explain(keyword: str) -> str:
    """The keyword as an error message shows it."""
    if keyword == "multiplicity":
        return "'multiplicity' (2S+1: 1 singlet, 2 doublet, ...)"
    return f"MLPotential({keyword}=...)" if keyword in CONSTRUCTOR_OPTIONS else repr(keyword)


def atom_list(topology: openmm.app.Topology, atoms: Iterable[int] | None) -> list[int]:
    """The indices `atoms`, or those of all atoms; `ValueError` unless they are some atoms of `topology`, each once."""
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


def atomic_numbers(topology: openmm.app.Topology, chosen: list[int], model: Potential) -> list[int]:
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


def warn_of_immobile(topology: openmm.app.Topology, system: openmm.System, chosen: list[int]) -> None:
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


def check_precision(precision: Any) -> str | None:
    """'single', 'double' or None, else `ValueError`."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected 'single', 'double' or None, got {precision!r}")
    return precision


def check_device(device: Any) -> str | None:
    """The name of a device that torch can use here, or None; else `ValueError` or `TypeError`."""
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


def check_compile(value: Any) -> bool | str:
    """True, False or 'auto', else `ValueError`."""
    if value is True or value is False or value == "auto":
        return value
    raise ValueError(f"compile: expected 'auto', True or False, got {value!r}")


def whole_number(name: str, value: Any) -> int:
    """The number; `ValueError` naming the argument for anything else, a text or a fraction for example."""
    try:
        whole = None if isinstance(value, (str, bytes, bool, np.bool_)) else int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value:
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return whole


def check_threads(threads: Any) -> int | None:
    """A positive number of threads, or None, else `ValueError`."""
    try:
        number = None if threads is None else whole_number("threads", threads)
    except ValueError:
        number = 0
    if number is not None and number < 1:
        raise ValueError(f"threads: expected a whole number >= 1 or None, got {threads!r}")
    return number


def length(value: Any) -> float:
    """angstrom"""
    nanometers = in_units(value, unit.nanometer)
    if not (math.isfinite(nanometers) and nanometers > 0):
        raise ValueError(f"longRangeCutoff: expected a positive length (nm or a Quantity), got {value}")
    return nanometers * ANGSTROM_PER_NM


def check_long_range_method(
    method: Any, model: Potential, region: str, charge: int, keyword: str = "longRangeMethod"
) -> str:
    """The method, if the model offers it and it is right for the region ('open', 'wrapped' or 'periodic').

    Raises `ValueError` naming `keyword` otherwise, and warns of what it means for a charged box.
    """
    if method not in LONG_RANGE_METHODS:
        raise ValueError(f"{keyword}: expected {_alternatives(LONG_RANGE_METHODS)}, got {method!r}")
    if method not in model.long_range_methods:
        offered = _alternatives(model.long_range_methods)
        raise ValueError(f"{keyword}: {model.family} offers {offered} only, got {method!r}")
    if method == "shifted":
        return method
    if region == "open":
        raise ValueError(
            f"{keyword}: {method!r} sums over the images of a periodic box, expected box vectors, got none; in an open "
            "system 'shifted' is right, without a cutoff for all pairs"
        )
    if region == "wrapped":
        raise ValueError(
            f"{keyword}: the ML region of a mixed system is open, so that it has no images to sum over; expected "
            f"'shifted', got {method!r}. Its surroundings follow the force field's own NonbondedForce"
        )
    if charge:
        warnings.warn(
            f"{keyword}: {method!r} neutralises the box of charge {charge:+d} e by a uniform background; energies and "
            "pressures then depend on the size of the box (counter-ions avoid that)",
            stacklevel=4,
        )
    return method


def check_phase(phase: Any, model: Potential) -> str | None:
    """The phase that was asked for, else the model's own; `ValueError` for one that it does not offer."""
    if phase is None:
        return model.phases[0] if model.phases else None
    if model.phases and phase not in model.phases:
        raise ValueError(f"phase: {model.family} offers {_alternatives(model.phases)}, got {phase!r}")
    model.in_phase(phase)
    return phase


def _alternatives(names: Iterable[str]) -> str:
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} or {last}" if most else last


def force_limit(value: Any) -> float | None:
    """kJ/mol/nm, or None for no limit; `ValueError` unless positive."""
    if value is None:
        return None
    limit = in_units(value, unit.kilojoule_per_mole / unit.nanometer)
    if not limit > 0:
        raise ValueError(f"maxForce: expected a positive force (kJ/mol/nm or a Quantity) or None, got {value}")
    return limit if math.isfinite(limit) else None


def uncertainty_limit(value: Any, own: float | None) -> float:
    """eV/angstrom: what was asked for, else the model's own; `ValueError` without either, or unless positive."""
    if value is None:
        if own is None:
            raise ValueError(
                "uncertainty_limit: the model file names none, so one is needed; expected a positive number "
                "(eV/angstrom) or a Quantity, got None"
            )
        return own
    if unit.is_quantity(value):
        force = unit.kilojoule_per_mole / unit.nanometer
        value = in_units(value, force) / KJ_PER_MOL_NM_PER_EV_ANGSTROM
    limit = in_units(value, None)
    if not 0 < limit < math.inf:
        raise ValueError(f"uncertainty_limit: expected a positive number (eV/angstrom) or a Quantity, got {value!r}")
    return limit


def in_units(value: Any, units: Any) -> float:
    """A number, or a Quantity as a number of these units; NaN for anything else."""
    if isinstance(value, (str, bytes, bool, np.bool_)):
        return math.nan
    try:
        return float(value.value_in_unit(units) if unit.is_quantity(value) else value)
    except (TypeError, ValueError, AttributeError):
        return math.nan
