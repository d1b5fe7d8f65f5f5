"""Examples 08 and 09 at full length with the ensemble spookynet-gfn2-bio, and what comes out.

    python benchmarks/spookynet_bio_examples.py [--parts zwitterion induced new_molecule] [--processes 4]

* zwitterion: glycine in TIP3P, zwitterion against neutral molecule, 24 umbrella windows of 20 ps.
* induced: the same, with induced dipoles on glycine.
* new_molecule: zidovudine, 200 labels by GFN2-xTB and further training of both members. The seconds count when it ran
  in one go, with nothing else on the machine.

Both go on in their folders where they were stopped; parts that are left out keep their results for the same model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import HERE, machine, write

from openmm_mlff.data.files import sha256_of

NAME = "spookynet_bio_examples"
EXAMPLES = HERE.parent / "examples"
FOLDER = HERE.parent / ".work" / "bio_examples"
#: script and options, its file of results, the picture that is kept
PARTS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "zwitterion": (("08_zwitterion_in_water.py",), "results.json", None),
    "induced": (("08_zwitterion_in_water.py", "--induced"), "results.json", "profile.png"),
    "new_molecule": (("09_active_learning.py",), "report.json", "active_learning.png"),
}


def run(part: str, model: Path, folder: Path, processes: int) -> dict[str, Any]:
    """Results of an example; pictures are kept beside this script."""
    (script, *options), results, picture = PARTS[part]
    command = [sys.executable, str(EXAMPLES / script), *options, "--model", str(model), "--output", str(folder)]
    subprocess.run([*command, "--processes", str(processes)], check=True)
    if picture:
        shutil.copy(folder / picture, HERE / f"spookynet_bio_{part}.png")
    found: dict[str, Any] = json.loads((folder / results).read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "spookynet-gfn2-bio.safetensors")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    digest, path = sha256_of(args.model), HERE / f"{NAME}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("sha256") != digest:
        content = {"model": args.model.name, "sha256": digest, "machine": {}, "parts": {}}
    for part in args.parts:
        content["machine"][part] = machine() | {"processes": args.processes}
        content["parts"][part] = run(part, args.model, args.folder / f"{part}_{digest[:8]}", args.processes)
        write(NAME, content)


if __name__ == "__main__":
    main()
