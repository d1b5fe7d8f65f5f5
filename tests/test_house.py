"""The house holds together: imports in any order, plugins that fail alone, nothing of one machine in the tree."""

from __future__ import annotations

import ast
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openmm_mlff import _plugins

ROOTS = ("openmm_mlff", "openmm_gdml", "openmm_nequip", "openmm_resolv", "openmm_so3krates", "openmm_spookynet")


def fresh_python(code: str, *path: Path) -> str:
    """Run code in a new interpreter, with folders put in front of its path; its standard output."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    # -P: the current folder is not on the path, so that what runs is what is installed
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules() -> list[str]:
    found = []
    for root in ROOTS:
        package = __import__(root)
        found += [root, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{root}."))]
    return [m for m in found if not m.endswith("__main__")]


def packages() -> list[str]:
    found = []
    for root in ROOTS:
        package = __import__(root)
        found += [root, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{root}.") if m.ispkg)]
    return found


# Third-party libraries are imported once; then every module of ours is the first of ours in a process of its own.
IMPORT_EACH = """
import importlib, importlib.util, json, os, sys, traceback
for name in ("numpy", "torch", "openmm.app", "ase", "mdtraj", "safetensors.torch", "vesin", "rich", "matplotlib",
             "h5py", "scipy", "tblite", "rdkit", "lightning_fabric"):
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        importlib.import_module(name)
ours = {"openmmml", "openmm_mlff", "openmm_gdml", "openmm_nequip", "openmm_resolv", "openmm_so3krates"}
ours |= {"openmm_spookynet"}
foreign = [m for m in sys.modules if m.partition(".")[0] in ours]
assert not foreign, foreign
failed = {}
for name in json.loads(sys.argv[1]):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            importlib.import_module(name)
            message = ""
        except BaseException:
            message = traceback.format_exc() or "failed"
        with os.fdopen(write, "w") as stream:
            stream.write(message)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        message = stream.read()
    if os.waitpid(child, 0)[1] != 0:
        message = message or "the interpreter died"
    if message:
        failed[name] = message
print(json.dumps(failed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_the_first_one_imported() -> None:
    names = [*modules(), "openmmml"]
    assert {"openmm_mlff.data.structures", "openmm_mlff.cli", "openmm_gdml", "openmm_spookynet"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_EACH, json.dumps(names)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


# fast tests know the same of every module (above, in forks) and of the packages of the wheel (test_wheel.py)
@pytest.mark.slow
@pytest.mark.parametrize("package", packages())
def test_every_package_imports_first_in_a_fresh_interpreter(package: str) -> None:
    fresh_python(f"import {package}")


@pytest.mark.parametrize("order", list(itertools.permutations(["openmmml", "openmm_mlff", "openmm_spookynet"])))
def test_every_import_order(order: tuple[str, ...]) -> None:
    check = "from openmmml import MLPotential; assert 'spookynet' in MLPotential._implFactories"
    fresh_python(f"import {', '.join(order)}\n{check}")


def test_openmmml_and_the_core_do_not_load_torch() -> None:
    code = "import sys; import openmmml, openmm_mlff, openmm_mlff.cli; print('torch' in sys.modules)"
    assert fresh_python(code).split() == ["False"]


def test_help_does_not_load_torch() -> None:
    code = "import sys; from openmm_mlff.cli import main; print(main([])); print('torch' in sys.modules)"
    assert fresh_python(code).splitlines()[-2:] == ["0", "False"]


def fake_distribution(folder: Path, name: str, entry_points: str, **sources: str) -> None:
    """An installed distribution, as pip would leave it: metadata with entry points, and modules."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    for module, text in sources.items():
        (folder / f"{module}.py").write_text(text, encoding="utf-8")


BROKEN = """
[openmmml.potentials]
broken = openmm_mlff._openmmml:Factory
[openmm_mlff.potentials]
broken = broken_plugin:family
[openmm_mlff.commands]
broken-command = broken_plugin:add_parser
"""


def test_a_broken_plugin_fails_alone(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "broken-plugin", BROKEN, broken_plugin="import a_library_that_nobody_has\n")
    code = """
import openmmml
from openmmml import MLPotential
assert {"broken", "spookynet"} <= set(MLPotential._implFactories)
from openmm_mlff import _plugins
assert _plugins.load(_plugins.POTENTIALS, "spookynet").name == "spookynet"
try:
    MLPotential("broken")
except ImportError as error:
    print(error)
"""
    message = fresh_python(code, tmp_path)
    assert "'broken'" in message and "broken-plugin 1.0" in message and "a_library_that_nobody_has" in message


def test_a_broken_command_is_named_and_left_out(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "broken-plugin", BROKEN, broken_plugin="raise RuntimeError('no such device')\n")
    code = "import sys; sys.stderr = sys.stdout; from openmm_mlff.cli import main; main([])"
    output = fresh_python(code, tmp_path)
    assert "'broken-command' left out" in output and "no such device" in output
    assert "simulate" in output and "usage: openmm-mlff" in output


def test_a_plugin_that_registers_something_else_is_named(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "broken-plugin", BROKEN, broken_plugin="family = 'not a Family'\n")
    code = """
from openmmml import MLPotential
try:
    MLPotential("broken")
except ImportError as error:
    print(error)
"""
    assert "'broken' registers a str, expected a Family" in fresh_python(code, tmp_path)


def test_one_name_claimed_twice_is_refused(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "usurper", "[openmm_mlff.potentials]\nspookynet = usurper:family\n")
    code = """
from openmm_mlff import _plugins
try:
    _plugins.load(_plugins.POTENTIALS, "spookynet")
except ImportError as error:
    print(error)
"""
    message = fresh_python(code, tmp_path)
    assert "claimed twice" in message and "usurper 1.0" in message and "openmm-mlff" in message


def test_an_unknown_potential_lists_the_near_ones() -> None:
    from openmmml import MLPotential

    with pytest.raises(ValueError, match="no potential is called 'spokynet'; did you mean 'spookynet'"):
        MLPotential("spokynet")
    with pytest.raises(KeyError, match=r"no potential is called 'ani2'; did you mean 'ani2x'"):
        MLPotential("ani2")
    with pytest.raises(ValueError, match="no potential is called 'spokynet'; did you mean 'spookynet'"):
        _plugins.load(_plugins.POTENTIALS, "spokynet")


def test_both_groups_hold_every_name_of_every_family() -> None:
    """openmm-ml and the core know the same names: families, their aliases, and models shipped or known."""
    in_openmmml = {
        n for n, p in _plugins.registered("openmmml.potentials").items() if p.value.startswith("openmm_mlff.")
    }
    assert in_openmmml == _plugins.registered(_plugins.POTENTIALS).keys()
    expected = set()
    for name in _plugins.registered(_plugins.POTENTIALS):
        family = _plugins.load(_plugins.POTENTIALS, name)
        models = (*family.bundled, *family.published)
        expected |= {family.name, *family.aliases, *(m.name for m in models)}
        assert {m.family for m in models} <= {family.name}
    assert in_openmmml == expected


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("spooky", ["spookynet", "gdml"], "did you mean 'spookynet'?"),
        ("SpookyNet", ["spookynet", "gdml"], "did you mean 'spookynet'?"),
        ("zzz", ["spookynet", "gdml"], "known: gdml, spookynet"),
        ("zzz", [], "none is installed"),
    ],
)
def test_near_names(name: str, known: list[str], expected: str) -> None:
    assert _plugins.near(name, known) == expected


def test_every_package_says_which_arrow_it_is() -> None:
    for name in packages():
        module = __import__(name, fromlist=["_"])
        first_line = (module.__doc__ or "").strip().splitlines()[0] if module.__doc__ else ""
        assert first_line, f"{name}: no docstring"
        if name.startswith("openmm_mlff.") and name != "openmm_mlff.testing":
            assert "->" in first_line, f"{name}: the docstring should open with its arrow, got {first_line!r}"


def tracked_files(repository: Path) -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=repository, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [p for p in (repository / name for name in listed.split("\0") if name) if p.is_file()]


# spelt in pieces, so that this file does not find itself
MACHINE = re.compile(rb"(?<![\w.:/-])/(?:" + b"|".join([b"work/", b"tmp/", b"root/", b"home/", b"Users/"]) + rb")\w")


def test_no_file_names_a_place_on_one_machine(repository: Path) -> None:
    found = []
    for path in tracked_files(repository):
        content = path.read_bytes()
        if b"\0" in content:
            continue
        found += [
            f"{path.relative_to(repository)}:{number}: {line.strip().decode(errors='replace')}"
            for number, line in enumerate(content.splitlines(), 1)
            if MACHINE.search(line)
        ]
    assert not found, "\n".join(found)


def test_the_machine_pattern_finds_what_it_should() -> None:
    assert MACHINE.search(b'open("/tmp' + b'/x")') and MACHINE.search(b"cd /work" + b"/main")
    assert not MACHINE.search(b"https://host.org/home" + b"/x") and not MACHINE.search(b"a.b/tmp" + b"/x")


def sources(repository: Path) -> list[Path]:
    return [p for root in ("openmm_mlff", "plugins") for p in sorted((repository / root).rglob("*.py"))]


def unsafe_loads(source: str) -> list[int]:
    """Lines that may execute what they read: torch.load without weights_only=True, allow_pickle=True, eval, ..."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        true = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
        if (
            (called == "torch.load" and "weights_only" not in true)
            or "allow_pickle" in true
            or called in {"pickle.load", "pickle.loads", "joblib.load", "dill.load", "dill.loads", "eval", "exec"}
        ):
            lines.append(node.lineno)
    return lines


#: calls that come after the names in the pickle were held against the caller's allow-list
AFTER_THE_ALLOW_LIST = {"openmm_mlff/forces/serialization.py": 1}


def test_nothing_is_unpickled_without_an_allow_list(repository: Path) -> None:
    found = {str(p.relative_to(repository)): unsafe_loads(p.read_text(encoding="utf-8")) for p in sources(repository)}
    assert {path: lines for path, lines in found.items() if len(lines) > AFTER_THE_ALLOW_LIST.get(path, 0)} == {}


def test_unsafe_loads_are_recognised() -> None:
    source = "torch.load(p)\ntorch.load(p, weights_only=True)\nnp.load(p, allow_pickle=True)\npickle.loads(b)\n"
    assert unsafe_loads(source) == [1, 3, 4]


def test_no_source_file_is_too_long_to_read(repository: Path) -> None:
    lines = {str(p.relative_to(repository)): p.read_text(encoding="utf-8").count("\n") for p in sources(repository)}
    assert {path: n for path, n in lines.items() if n > 480} == {}


def test_missing_shared_data_skips_here_and_fails_in_ci(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no 'nothing.npz' in the shared data; OPENMM_MLFF_SHARED"):
        shared / "nothing.npz"
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"no 'nothing.npz'"):
        shared / "nothing.npz"


def test_tests_run_on_few_threads() -> None:
    import torch

    assert torch.get_num_threads() <= 2
