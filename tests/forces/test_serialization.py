"""A stranger's XML is read without executing what it carries; what is missing is an error, not a crash."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from openmmml import MLPotential

from openmm_mlff.forces import serialization
from openmm_mlff.forces.serialization import (
    MissingPluginError,
    UnsafeXMLError,
    load_integrator,
    load_state,
    load_system,
)
from openmm_mlff.potentials.family import save_potential
from openmm_spookynet import SpookyNet

from .conftest import context_of, energy_of, small_spookynet, topology_of

WATER = np.array([8, 1, 1])
WATER_POSITIONS = np.array([[0.0, 0.0, 0.0], [0.0757, 0.0586, 0.0], [-0.0757, 0.0586, 0.0]])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.methodcaller("touch"), (Path(self.marker),)


@pytest.fixture()
def system(model: SpookyNet) -> openmm.System:
    return MLPotential("spookynet", model=model).createSystem(topology_of(WATER))


@pytest.fixture()
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture()
def payload(marker: Path) -> bytes:
    data = pickle.dumps(Payload(marker))
    # it works where it is unpickled, so a file that is not there later means that it was not
    pickle.loads(data)
    assert marker.exists()
    marker.unlink()
    return data


def with_pickle(system: openmm.System, data: bytes | str) -> str:
    """The system's XML with another pickle in its PythonForce."""
    xml = openmm.XmlSerializer.serialize(system)
    start = xml.index('function="') + len('function="')
    hexadecimal = data if isinstance(data, str) else data.hex()
    return xml[:start] + hexadecimal + xml[xml.index('"', start) :]


def options_of(system: openmm.System) -> str:
    force = next(f for f in system.getForces() if isinstance(f, openmm.PythonForce))
    (options,) = serialization.stored_options(force)
    return options


def test_a_system_is_known_by_its_model_not_by_where_the_file_lies(model: SpookyNet, tmp_path: Path) -> None:
    def made(name: str, potential: SpookyNet, charge: int = 0) -> openmm.System:
        (tmp_path / name).mkdir(exist_ok=True)
        file = save_potential(potential, tmp_path / name / "model.safetensors")
        return MLPotential("spookynet", modelPath=str(file)).createSystem(topology_of(WATER), charge=charge)

    here, moved = made("here", model), made("moved", model)
    assert openmm.XmlSerializer.serialize(here) != openmm.XmlSerializer.serialize(moved)
    known = serialization.system_digest(here)
    assert known == serialization.system_digest(moved)
    assert known != serialization.system_digest(made("other", small_spookynet(seed=2)))
    assert known != serialization.system_digest(made("charged", model, charge=2))
    moved.setParticleMass(0, 17.0)
    assert known != serialization.system_digest(moved)


# -- what is good loads -------------------------------------------------------------------------------------------


def test_round_trip(system: openmm.System, tmp_path: Path) -> None:
    xml = openmm.XmlSerializer.serialize(system)
    (tmp_path / "system.xml").write_text(xml, encoding="utf-8")
    expected = energy_of(context_of(system, WATER_POSITIONS))
    for source in (xml, tmp_path / "system.xml", str(tmp_path / "system.xml")):
        loaded = load_system(source)
        assert energy_of(context_of(loaded, WATER_POSITIONS)) == expected
        assert openmm.XmlSerializer.serialize(loaded) == xml


def test_round_trip_of_a_nested_force(system: openmm.System) -> None:
    outer = nested(system)
    loaded = load_system(openmm.XmlSerializer.serialize(outer))
    assert energy_of(context_of(loaded, WATER_POSITIONS)) == energy_of(context_of(outer, WATER_POSITIONS))


def nested(system: openmm.System) -> openmm.System:
    """The system's ML force inside a CustomCVForce inside a CustomCVForce."""
    inner, outer = openmm.CustomCVForce("2*ml"), openmm.CustomCVForce("cv+1")
    inner.addCollectiveVariable("ml", openmm.XmlSerializer.clone(system.getForce(0)))
    outer.addCollectiveVariable("cv", inner)
    made = openmm.System()
    for i in range(system.getNumParticles()):
        made.addParticle(system.getParticleMass(i))
    made.addForce(outer)
    return made


def test_mm_system_state_and_integrator(system: openmm.System, tmp_path: Path) -> None:
    mm = openmm.System()
    mm.addParticle(12.0)
    force = openmm.CustomNonbondedForce("f(r) + 0*(1<2)")
    force.addTabulatedFunction("f", openmm.Continuous1DFunction([0.0, 1.0, 2.0], 0.0, 1.0))
    force.addParticle([])
    mm.addForce(force)
    gb = openmm.CustomGBForce()
    gb.addComputedValue("I", "1", openmm.CustomGBForce.ParticlePair)
    gb.addParticle([])
    mm.addForce(gb)
    xml = openmm.XmlSerializer.serialize(mm)
    assert openmm.XmlSerializer.serialize(load_system(xml)) == xml
    for integrator in (
        openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.001),
        openmm.MTSIntegrator(0.001, [(0, 1)]),
        openmm.NoseHooverIntegrator(300.0, 1.0, 0.001),
    ):
        xml = openmm.XmlSerializer.serialize(integrator)
        loaded = load_integrator(xml)
        assert openmm.XmlSerializer.serialize(loaded) == xml
    state = context_of(system, WATER_POSITIONS).getState(positions=True, velocities=True, energy=True, forces=True)
    xml = openmm.XmlSerializer.serialize(state)
    (tmp_path / "state.xml").write_text(xml, encoding="utf-8")
    np.testing.assert_array_equal(load_state(tmp_path / "state.xml").getPositions(asNumpy=True)._value, WATER_POSITIONS)


def test_a_pickle_of_ours_is_written_anew(system: openmm.System) -> None:
    """Another protocol, as another Python would write it."""
    old = pickle.dumps(
        pickle.loads(bytes.fromhex(openmm.XmlSerializer.serialize(system).split('function="')[1].split('"')[0])), 0
    )
    loaded = load_system(with_pickle(system, old))
    assert openmm.XmlSerializer.serialize(loaded) == openmm.XmlSerializer.serialize(system)


# -- what is not, does not ----------------------------------------------------------------------------------------


def in_system(system: openmm.System, data: bytes) -> str:
    return with_pickle(system, data)


def in_custom_cv(system: openmm.System, data: bytes) -> str:
    return with_pickle(nested(system), data)


def in_unknown_place(system: openmm.System, data: bytes) -> str:
    xml = with_pickle(system, data)
    force = xml[xml.index("<Force ") : xml.index("</Force>") + len("</Force>")]
    return xml.replace("<Constraints/>", f"<Constraints><What><Ever>{force}</Ever></What></Constraints>", 1)


@pytest.mark.parametrize("place", [in_system, in_custom_cv, in_unknown_place])
def test_payload_in_a_system(
    system: openmm.System, payload: bytes, marker: Path, place: Callable[[openmm.System, bytes], str]
) -> None:
    with pytest.raises(UnsafeXMLError, match=r"would run operator.methodcaller, pathlib.*nothing was executed"):
        load_system(place(system, payload))
    assert not marker.exists()


@pytest.mark.parametrize(("load", "kind"), [(load_state, "State"), (load_integrator, "Integrator")])
def test_payload_instead_of_a_state_or_integrator(
    system: openmm.System, payload: bytes, marker: Path, load: Callable[[str], Any], kind: str
) -> None:
    xml = with_pickle(system, payload)
    force = xml[xml.index("<Force ") : xml.index("</Force>") + len("</Force>")]
    bad = '<?xml version="1.0" ?>\n' + force
    with pytest.raises(UnsafeXMLError, match=f"expected XML of type {kind}, got 'PythonForce'"):
        load(bad)
    with pytest.raises(UnsafeXMLError, match=f"expected XML of type {kind}, got 'System'"):
        load(xml)
    good = (
        openmm.VerletIntegrator(0.001)
        if kind == "Integrator"
        else context_of(system, WATER_POSITIONS).getState(positions=True)
    )
    text = openmm.XmlSerializer.serialize(good)
    inside = text.replace(f'type="{kind}"', 'type="State"')
    inside = (
        inside.replace("/>", f">{force}</Integrator>")
        if kind == "Integrator"
        else inside.replace("</State>", f"{force}</State>")
    )
    assert force in inside
    with pytest.raises(UnsafeXMLError, match="would run"):
        load(inside)
    assert not marker.exists()


def test_payload_beside_ours(system: openmm.System, payload: bytes, marker: Path) -> None:
    """A pickle that runs the payload, drops the result, and then makes a computation of ours."""
    ours = pickle.dumps(_computation(system), 0)
    combined = payload.rstrip(b".") + b"0" + ours
    with pytest.raises(UnsafeXMLError, match="would run openmm_mlff"):
        load_system(with_pickle(system, combined))
    assert not marker.exists()


def _computation(system: openmm.System) -> Any:
    from openmm_mlff.forces.python_force import ForceComputation

    return ForceComputation(options_of(system))


class Sneaky:
    """Ours, with a state that unpickling would set on it."""

    def __init__(self, computation: Any, state: Any) -> None:
        self.parts = computation, state

    def __reduce__(self) -> tuple[Any, ...]:
        computation, state = self.parts
        return (*computation.__reduce__(), state)


def test_state_beside_ours(system: openmm.System) -> None:
    data = pickle.dumps(Sneaky(_computation(system), {"spec": 1}))
    with pytest.raises(UnsafeXMLError, match=r"would run openmm_mlff\.forces\.python_force\.ForceComputation"):
        load_system(with_pickle(system, data))


def damaged_pickles() -> list[tuple[str, bytes | str]]:
    good = pickle.dumps(functools.partial(print))
    return [
        ("truncated", good[:-3]),
        ("empty", ""),
        ("odd", good.hex()[:-1]),
        ("not hexadecimal", "zz"),
        ("spaces", good.hex()[:4] + "  " + good.hex()[4:]),
        ("no value", b"."),
        ("extension code", b"\x80\x02\x82\x01."),
        ("persistent id", b"\x80\x02\x8c\x01aQ."),
        ("memo of 64 GB", b"\x80\x02K\x01r" + struct.pack("<I", 2**31) + b"."),
        ("string longer than the pickle", b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a."),
    ]


@pytest.mark.parametrize("data", [d for _, d in damaged_pickles()], ids=[name for name, _ in damaged_pickles()])
def test_damaged_pickle(system: openmm.System, data: bytes | str) -> None:
    with pytest.raises(UnsafeXMLError, match=r"pickle|no readable function"):
        load_system(with_pickle(system, data))


@pytest.mark.parametrize(
    "data",
    [pickle.dumps(1), pickle.dumps("text"), pickle.dumps([]), pickle.dumps(None)],
    ids=["1", "text", "[]", "None"],
)
def test_pickle_that_is_no_function(system: openmm.System, data: bytes) -> None:
    with pytest.raises(UnsafeXMLError, match="is not a function"):
        load_system(with_pickle(system, data))


def test_payload_in_a_comment_or_cdata(system: openmm.System, payload: bytes, marker: Path) -> None:
    """What one XML parser skips and another may not does not reach the other."""
    xml = openmm.XmlSerializer.serialize(system)
    bad = with_pickle(system, payload)
    force = bad[bad.index("<Force ") : bad.index("</Force>") + len("</Force>")]
    for hidden in (f"<!-- --!>{force}<!-- -->", f"<![CDATA[{force}]]>", f"<?x {force}?>"):
        with contextlib.suppress(UnsafeXMLError):
            load_system(xml.replace("<Forces>", f"<Forces>{hidden}"))
        assert not marker.exists()


def test_entities(system: openmm.System) -> None:
    xml = openmm.XmlSerializer.serialize(system)
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    with pytest.raises(UnsafeXMLError, match="document type or entities"):
        load_system(xml.replace("?>", "?>" + bomb, 1))


def test_deep_nesting() -> None:
    for depth in (101, 100_000):
        with pytest.raises(UnsafeXMLError, match="nested deeper"):
            load_system('<System type="System" version="1">' + "<a>" * depth + "</a>" * depth + "</System>")


@pytest.mark.parametrize(
    "text", ["<", "<System", '<System type="System">', "<x/>", '<System type="System" version="1"/>']
)
def test_damaged_xml(text: str) -> None:
    with pytest.raises(UnsafeXMLError, match=r"source: "):
        load_system(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source: expected XML or the path of a file, got .*none.xml"):
        load_system(tmp_path / "none.xml")


# -- what is missing ----------------------------------------------------------------------------------------------


def test_family_that_is_not_installed(system: openmm.System) -> None:
    options = {**json.loads(options_of(system)), "family": "spookynett"}
    from openmm_mlff.forces.python_force import ForceComputation

    data = pickle.dumps(ForceComputation(json.dumps(options)))
    with pytest.raises(MissingPluginError, match=r"no potential is called 'spookynett'; did you mean 'spookynet'"):
        load_system(with_pickle(system, data))


def test_newer_options(system: openmm.System) -> None:
    options = json.dumps({**json.loads(options_of(system)), "version": 99})
    data = b"\x80\x02copenmm_mlff.forces.python_force\nForceComputation\nX" + struct.pack("<I", len(options))
    with pytest.raises(UnsafeXMLError, match="version 99 is newer"):
        load_system(with_pickle(system, data + options.encode() + b"\x85R."))


def test_force_of_an_unknown_plugin(system: openmm.System) -> None:
    xml = openmm.XmlSerializer.serialize(system).replace('type="CMMotionRemover"', 'type="TorchForce"')
    with pytest.raises(MissingPluginError, match=r"'TorchForce' is not one of OpenMM's own classes.*force_types"):
        load_system(xml)
    with pytest.raises(MissingPluginError, match="the OpenMM plugin of 'TorchForce' is not loaded"):
        load_system(xml, force_types=["TorchForce"])


def test_other_packages_can_be_allowed(system: openmm.System) -> None:
    data = pickle.dumps(operator.attrgetter("x"))
    xml = with_pickle(system, data)
    with pytest.raises(UnsafeXMLError, match=r"would run operator.attrgetter.*allow=\['operator.attrgetter'\]"):
        load_system(xml)
    loaded = load_system(xml, allow=["operator.attrgetter"])
    assert isinstance(loaded.getForce(0), openmm.PythonForce)
    with pytest.raises(TypeError, match="expected a list of names"):
        load_system(xml, allow="operator.attrgetter")


def test_allowed_package_that_is_not_installed(system: openmm.System) -> None:
    """openmm itself crashes the interpreter here."""
    data = b"\x80\x02cno_such_package\nForce\n)R."
    with pytest.raises(MissingPluginError, match=r"cannot be loaded here.*no_such_package"):
        load_system(with_pickle(system, data), allow=["no_such_package.Force"])
