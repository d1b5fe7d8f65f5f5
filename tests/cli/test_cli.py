"""The command line itself: exit statuses, one-line errors, commands of plugins."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import pytest

import openmm_mlff
from openmm_mlff import _plugins, cli


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Register a function as the plugin command ``probe`` with one option ``--n``."""

    def register(func: Callable) -> None:
        def add_parser(subparsers: argparse._SubParsersAction) -> None:
            parser = subparsers.add_parser("probe", help="a test")
            parser.add_argument("--n", type=int, default=0)
            parser.set_defaults(func=func)

        original = _plugins.load
        monkeypatch.setattr(_plugins, "registered", lambda group: {"probe": None} if group == _plugins.COMMANDS else {})
        monkeypatch.setattr(_plugins, "load", lambda g, n: add_parser if n == "probe" else original(g, n))

    return register


def test_a_command_gets_its_arguments_and_its_status_is_returned(command: Callable) -> None:
    seen = []

    def func(args: argparse.Namespace) -> int:
        seen.append(args.n)
        return 3

    command(func)
    assert cli.main(["probe", "--n", "7"]) == 3
    command(lambda args: None)
    assert cli.main(["probe"]) == 0
    assert seen == [7]


@pytest.mark.parametrize(
    "error", [ValueError("n: expected\n  at least 1"), FileNotFoundError("n: no file"), OSError("disk full")]
)
def test_expected_errors_are_one_line(command: Callable, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def func(args: argparse.Namespace) -> None:
        raise error

    command(func)
    assert cli.main(["probe"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"openmm-mlff probe: error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("argv", [["--debug", "probe"], ["probe", "--debug"], ["--debug", "probe", "--n", "1"]])
def test_debug_shows_the_traceback(command: Callable, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    def func(args: argparse.Namespace) -> None:
        raise ValueError("n: expected at least 1")

    command(func)
    assert cli.main(argv) == 1
    assert 'raise ValueError("n: expected at least 1")' in capsys.readouterr().err


def test_defects_are_not_hidden(command: Callable) -> None:
    def func(args: argparse.Namespace) -> None:
        raise TypeError("a defect of the program")

    command(func)
    with pytest.raises(TypeError, match="defect"):
        cli.main(["probe"])


def test_interruption_is_130(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    def func(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    command(func)
    assert cli.main(["probe"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["simulat"])
    assert stop.value.code == 2
    assert "simulate" in capsys.readouterr().err


def test_no_command_prints_the_help_with_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    output = capsys.readouterr().out
    # argparse puts the help of a long name below it
    assert set(cli.COMMANDS) <= {line.split()[0] for line in output.splitlines() if line.startswith("    ")}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: openmm-mlff {name}" in capsys.readouterr().out


def test_version_and_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "openmm_mlff", "--version"], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert done.stdout.split() == ["openmm-mlff", openmm_mlff.__version__]


def test_a_closed_pipe_ends_quietly() -> None:
    code = "import sys, time; from openmm_mlff.cli import main; time.sleep(0.5); sys.exit(main([]))"
    pipeline = f'"{sys.executable}" -c "{code}" | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert (done.stdout.split(), done.stderr) == (["1"], "")
