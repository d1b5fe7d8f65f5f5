"""The example with a descriptor of one's own, as it stands, with small settings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_own_descriptor(repository: Path) -> None:
    script = str(repository / "examples" / "10_own_descriptor.py")
    done = subprocess.run(
        [sys.executable, script, "--train", "80", "--steps", "400"],
        capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = {m[1]: float(m[2]) for m in re.finditer(r"^  (\w+) +sigma.* error ([\d.]+) eV", done.stdout, re.MULTILINE)}
    # typical forces of this molecule at 400 K are 1 eV/angstrom
    assert set(errors) == {"inverse_distances", "decaying_distances"} and max(errors.values()) < 0.3
    rows = [line.split() for line in done.stdout.splitlines()[-8:]]
    assert [int(row[0]) for row in rows] == list(range(50, 450, 50))
    # the model keeps to the reference along its own trajectory, kJ/mol
    assert all(abs(float(row[2]) - float(row[3])) < 15 and 50 < float(row[1]) < 600 for row in rows)
