"""command line -> the rest of the house.

``openmm-mlff COMMAND``: every command is a module with ``add_parser(subparsers)``, which adds one parser and sets its
default ``func`` to a function ``(args) -> int | None``. Heavy imports live inside that function, so that ``--help`` is
quick. Plugins add commands through the entry-point group ``openmm_mlff.commands`` (name -> ``add_parser``).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from openmm_mlff import __version__, _plugins

#: commands of the core, in the order in which the help shows them.
COMMANDS = ("simulate", "demo", "dataset", "train", "evaluate", "calibrate", "hydration", "models", "convert")

#: errors that bad input or the world outside causes: one line, no traceback.
EXPECTED = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` defaults to ``sys.argv[1:]``.

    Returns the exit status: 0 done, 1 failed with a message on standard error, 2 (by `SystemExit`) wrong usage,
    130 interrupted. ``--debug`` lets the traceback of an expected error through.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        status = 0
        if hasattr(args, "func"):
            status = int(args.func(args) or 0)
        else:
            print(parser.format_help(), end="")
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("openmm-mlff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has gone; keep the interpreter from complaining while it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        if args.debug:
            traceback.print_exception(error)
        else:
            print(f"openmm-mlff {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands that can be found; a broken plugin is named on standard error and left out."""
    parser = argparse.ArgumentParser(
        prog="openmm-mlff",
        description="Machine-learned force fields in OpenMM: simulate, label, train, evaluate.",
    )
    parser.add_argument("--version", action="version", version=f"openmm-mlff {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = f"{__name__}.{name}"
        try:
            add_parser = importlib.import_module(module).add_parser
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            continue
        add_parser(subparsers)
    for name in sorted(_plugins.registered(_plugins.COMMANDS)):
        _add_plugin_command(name, subparsers)
    for subparser in set(subparsers.choices.values()):
        if "--debug" not in subparser.format_usage():
            # SUPPRESS: not given here must not undo what was given before the command
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_plugin_command(name: str, subparsers: argparse._SubParsersAction) -> None:
    try:
        if name in subparsers.choices:
            raise ValueError("a command of that name exists already")
        add_parser: Callable[[argparse._SubParsersAction], None] = _plugins.load(_plugins.COMMANDS, name)
        add_parser(subparsers)
    except Exception as error:
        print(f"openmm-mlff: warning: plugin command {name!r} left out: {_one_line(error)}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
