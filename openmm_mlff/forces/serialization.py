"""Loading System, State and Integrator XML that may come from a stranger, without executing what it carries.

A PythonForce is stored as a pickle, and ``openmm.XmlSerializer.deserialize`` unpickles whatever it finds: opening a
file can run any program, and a pickle of a package that is not installed crashes the interpreter. The functions here
parse the XML first, read every pickle in it symbolically, and hand OpenMM a freshly written XML that holds only what
was checked.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openmm

from openmm_mlff.data.pickles import check_memo
from openmm_mlff.forces.embedded_force import EmbeddedComputation
from openmm_mlff.forces.molecule_force import MoleculesComputation
from openmm_mlff.forces.python_force import ForceComputation
from openmm_mlff.potentials.family import find_family

#: what our own forces pickle to: a call of one of these classes with one text
OURS: dict[str, type[ForceComputation]] = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (ForceComputation, EmbeddedComputation, MoleculesComputation)
}
MAX_DEPTH = 100


class UnsafeXMLError(ValueError):
    """The XML holds something that would be executed, or that cannot be checked. Nothing was executed."""


class MissingPluginError(ImportError):
    """The XML needs a plugin or package that is not installed or not loaded."""


def load_system(source: str | Path, allow: Iterable[str] = (), force_types: Iterable[str] = ()) -> openmm.System:
    """Read a System from XML (a path, or the text itself).

    Args:
        allow: dotted names (``package.module.Name``) of functions and classes that other packages' PythonForces may
            use; they are trusted with any arguments. Our own need no entry.
        force_types: names of force classes of loaded OpenMM plugins that the XML may contain beside OpenMM's own.

    Raises `UnsafeXMLError` for a pickle outside the allow-list or an XML that is damaged or not a System,
    `MissingPluginError` if a model family, package or OpenMM plugin is missing.
    """
    return _load(source, "System", openmm.System, allow, force_types)


def load_state(source: str | Path) -> openmm.State:
    """Read a State from XML (a path, or the text itself); raises `UnsafeXMLError` as `load_system` does."""
    return _load(source, "State", openmm.State, (), ())


def load_integrator(source: str | Path) -> openmm.Integrator:
    """Read an Integrator from XML (a path, or the text itself); raises `UnsafeXMLError` as `load_system` does."""
    return _load(source, "Integrator", openmm.Integrator, (), ())


def stored_options(force: openmm.Force) -> set[str]:
    """The stored options (JSON, as `ForceComputation` takes them) of our computations in a force, at any depth."""
    if not isinstance(force, (openmm.PythonForce, openmm.CustomCVForce, openmm.ATMForce)):
        return set()
    root = ET.fromstring(openmm.XmlSerializer.serialize(force))
    return {kind.normalized(text) for _, kind, text in _ours_in(root)}


def without_guards(system: openmm.System) -> openmm.System:
    """A copy of a System whose machine-learned forces watch no uncertainty, as if made without ``on_uncertain``.

    Raises `ValueError` for a PythonForce of others that cannot be copied.
    """
    try:
        root = ET.fromstring(openmm.XmlSerializer.serialize(system))
    except Exception as error:
        raise ValueError(f"system: expected forces that can be copied ({error})") from error
    for element, kind, text in _ours_in(root):
        element.set("function", pickle.dumps(kind(_without(text, "uncertainty"))).hex())
    return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))


def system_digest(system: openmm.System) -> str:
    """sha256 of a System's XML without the places of model files: a model is known by its own checksum."""
    root = ET.fromstring(openmm.XmlSerializer.serialize(system))
    for element, kind, text in _ours_in(root):
        element.set("function", f"{kind.__qualname__} {_without(kind.normalized(text), 'path')}")
    return hashlib.sha256(ET.tostring(root)).hexdigest()


def _ours_in(root: ET.Element) -> Iterator[tuple[ET.Element, type[ForceComputation], str]]:
    """The elements of our computations at any depth, with class and options."""
    for element in root.iter():
        if element.get("type") == "PythonForce":
            ours = _our_options(_Pickle(_decode(element.get("function"))))
            if ours is not None:
                yield element, *ours


def _without(options: str, name: str) -> str:
    """The options but one; embedded regions and many molecules keep those of the model one level down."""
    fields = json.loads(options)
    for part in (fields, fields.get("region"), fields.get("common")):
        if isinstance(part, dict):
            part.pop(name, None)
    return json.dumps(fields)


def _load(source: str | Path, kind: str, expected: type, allow: Iterable[str], force_types: Iterable[str]) -> Any:
    root = _parse(_read(source))
    stored = root.get("type", "")
    if stored not in (_types(kind) if kind == "Integrator" else {kind}):
        raise UnsafeXMLError(f"source: expected XML of type {kind}, got {stored or root.tag!r}")
    if isinstance(allow, str) or isinstance(force_types, str):
        raise TypeError("allow, force_types: expected a list of names, got one text")
    _check(root, frozenset(allow), _types() | frozenset(force_types))
    try:
        loaded = openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))
    except Exception as error:
        missing = re.search(r"no serialization proxy registered for type (\S+)", str(error))
        if missing:
            raise MissingPluginError(f"source: the OpenMM plugin of {missing.group(1)} is not loaded") from error
        raise UnsafeXMLError(f"source: OpenMM cannot read this {kind} ({error})") from error
    if not isinstance(loaded, expected):
        raise UnsafeXMLError(f"source: expected a {kind}, got a {type(loaded).__name__}")
    return loaded


def _read(source: str | Path) -> str:
    if isinstance(source, str) and source.lstrip().startswith("<"):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source: expected XML or the path of a file, got {str(source)[:200]!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeXMLError(f"source: {path.name} is not an XML text ({error})") from error


def _parse(text: str) -> ET.Element:
    # OpenMM writes no document type; without one there are no entities that could grow or read files
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UnsafeXMLError("source: the XML declares a document type or entities, which OpenMM's never does")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise UnsafeXMLError(f"source: the XML is damaged or incomplete ({error})") from error
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
    if level:
        raise UnsafeXMLError(f"source: the XML is nested deeper than {MAX_DEPTH} levels")
    return root


def _check(root: ET.Element, allow: frozenset[str], types: frozenset[str]) -> None:
    """Refuse what must not reach OpenMM; rewrite every pickle of ours from its options."""
    for element in root.iter():
        kind = element.get("type")
        if kind is None or kind.isdigit():
            continue
        if kind not in types:
            raise MissingPluginError(
                f"source: {kind!r} is not one of OpenMM's own classes; if you trust the plugin that brings it, load "
                f"that and pass force_types=[{kind!r}]"
            )
        if kind == "PythonForce":
            element.set("function", _checked(_decode(element.get("function")), allow).hex())


def _checked(data: bytes, allow: frozenset[str]) -> bytes:
    """A pickle that is safe to load: written anew for ours, as it is for allowed ones."""
    found = _Pickle(data)
    ours = _our_options(found)
    if ours is not None:
        # the stranger's pickle itself is never unpickled
        return pickle.dumps(_checked_computation(*ours))
    forbidden = sorted(found.names - allow)
    if forbidden:
        raise UnsafeXMLError(
            f"source: a PythonForce in it would run {', '.join(forbidden)}; nothing was executed. If you trust its "
            f"author, pass allow={forbidden!r}"
        )
    try:
        function = pickle.loads(data)
    except Exception as error:
        raise MissingPluginError(f"source: a PythonForce in it cannot be loaded here ({error})") from error
    if not callable(function):
        raise UnsafeXMLError(f"source: a PythonForce in it holds a {type(function).__name__}, which is not a function")
    return data


def _checked_computation(kind: type[ForceComputation], options: str) -> ForceComputation:
    try:
        computation = kind(options)
    except ValueError as error:
        raise UnsafeXMLError(f"source: {error}") from error
    try:
        find_family(computation.spec.family)
    except (ValueError, ImportError) as error:
        raise MissingPluginError(f"source: the plugin of a force in it is missing ({error})") from error
    return computation


def _our_options(found: _Pickle) -> tuple[type[ForceComputation], str] | None:
    """The class and its options text if the pickle is exactly ``ForceComputation(text)``, or another of `OURS`."""
    value = found.value
    if not isinstance(value, _Inert) or value.state or value.dotted not in OURS or found.names != {value.dotted}:
        return None
    if len(value.args) != 1 or not isinstance(value.args[0], str):
        return None
    return OURS[value.dotted], value.args[0]


def _decode(text: str | None) -> bytes:
    if text is None or len(text) % 2 or re.fullmatch("[0-9a-fA-F]+", text) is None:
        raise UnsafeXMLError("source: a PythonForce in it has no readable function")
    return bytes.fromhex(text)


@cache
def _types(base: str = "") -> frozenset[str]:
    """Classes that OpenMM itself can read; with `base`, those derived from that class."""
    bases = (getattr(openmm, base),) if base else (openmm.Force, openmm.Integrator, openmm.TabulatedFunction)
    names = {name for name, value in vars(openmm).items() if isinstance(value, type) and issubclass(value, bases)}
    return frozenset(names if base else names | {"System", "State"})


# -- reading a pickle without executing it -------------------------------------------------------------------------


class _Inert:
    """Stands for any object that a pickle asks for; takes what unpickling does to it and does nothing."""

    dotted = ""

    args: tuple[Any, ...]
    state: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        made = object.__new__(cls)
        made.args, made.state = args, [kwargs] if kwargs else []
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state.append((key, value))

    def append(self, value: Any) -> None:
        self.state.append(value)

    def extend(self, values: Any) -> None:
        self.state.append(values)

    def add(self, value: Any) -> None:
        self.state.append(value)


class _Pickle(pickle.Unpickler):
    """A pickle read symbolically.

    Attributes:
        names: dotted names of everything that loading it would look up. value: what it would make, of `_Inert`.

    Raises `UnsafeXMLError` if it cannot be read in this way.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: set[str] = set()
        try:
            for opcode, _, _ in pickletools.genops(data):
                if opcode.name.startswith(("EXT", "PERSID", "BINPERSID", "NEXT_BUFFER")):
                    raise UnsafeXMLError(f"source: a pickle in it uses {opcode.name}, which cannot be checked")
            check_memo(data)
            self.value = self.load()
        except UnsafeXMLError:
            raise
        except Exception as error:
            raise UnsafeXMLError(f"source: a pickle in it is damaged ({error})") from error

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        self.names.add(dotted)
        return type("_Inert", (_Inert,), {"dotted": dotted})
