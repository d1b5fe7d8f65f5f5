"""What the front door promises: its lines run, its links lead somewhere, its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openmm_mlff import _plugins, cli

PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "conda-recipe/README.md", "models/README.md"),
    *("docs/embedding.md", "docs/ensembles.md", "docs/gdml.md", "docs/led.md", "docs/long_range.md"),
    *("docs/resolv.md", "docs/so3krates.md", "docs/spookynet_bio.md"),
)


def test_the_ten_lines_run(repository: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]) <= 10
    # OpenMM's minimiser crashes on OpenCL by POCL (also for a plain force field), which test machines have
    environment = os.environ | {"PYTHONPATH": "", "OPENMM_DEFAULT_PLATFORM": "CPU"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    energy = re.search(r"(-?\d+\.\d+) kJ/mol", done.stdout)
    # the sum of the bond energies of C6H12N2O2 (21 bonds of 300 to 750 kJ/mol) with the opposite sign
    assert energy is not None and -15000 < float(energy[1]) < -6000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(repository: Path, page: str) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    missing = [t for t in targets if not (repository / page).parent.joinpath(t).exists()]
    assert not missing


def test_the_table_of_commands_is_complete(repository: Path) -> None:
    listed = re.findall(
        r"^\| `openmm-mlff (\w+)` \|", (repository / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted([*cli.COMMANDS, *_plugins.registered(_plugins.COMMANDS)])


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_named_on_a_page_exist(repository: Path, page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "lint", "benchmark", "reproduce"} <= targets
    assert set(re.findall(r"`make ([a-z-]+)`", (repository / page).read_text(encoding="utf-8"))) <= targets


def test_files_named_by_the_makefile_and_its_scripts_exist(repository: Path) -> None:
    text = (repository / "Makefile").read_text(encoding="utf-8") + (repository / "benchmarks/reproduce.sh").read_text(
        encoding="utf-8"
    )
    named = set(re.findall(r"\b(?:benchmarks|examples)/[\w./-]+\w", text.replace("$recipes", "examples/recipes")))
    assert {"benchmarks/reproduce.sh", "examples/recipes/ala2_gfn2.toml"} <= named
    assert [name for name in sorted(named) if not (repository / name).exists()] == []
