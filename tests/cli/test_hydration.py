"""``openmm-mlff hydration`` from the outside, on a molecule whose exact answer is an integral: two atoms, two springs.

The model files are of GDML, which learns a spring from forces to 1e-5 eV.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_mlff.analysis.free_energy import thermal_energy
from openmm_mlff.cli import main
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.sampling import hydration
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

pytest.importorskip("pymbar", reason="needs pymbar (extra 'analysis')")
pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")

#: eV/angstrom^2, angstrom, eV of U(r) = k (r - r0)^2 / 2 + c between two nitrogen atoms
SPRINGS = {"vacuum": (20.0, 1.10, 0.0), "water": (14.0, 1.13, -0.2), "far": (20.0, 1.45, 0.0), "torn": (20.0, 3.0, 0.0)}
SHORT = ("--length", 1, "--interval", 0.05, "--equilibration", 0.2, "--no-progress")


def exact() -> float:
    """-kT ln(Z_water / Z_vacuum) in kcal/mol, with the volume element r^2 dr of two free atoms."""
    kT, r = thermal_energy(298.15), np.linspace(0.5, 1.8, 20_001)

    def free_energy(k: float, r0: float, c: float) -> float:
        return c - kT * float(np.log(np.trapezoid(r**2 * np.exp(-0.5 * k * (r - r0) ** 2 / kT), r)))

    return (free_energy(*SPRINGS["water"]) - free_energy(*SPRINGS["vacuum"])) / EV_PER_KCAL_PER_MOL


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from openmm_gdml.training import GDML

    folder, made = tmp_path_factory.mktemp("springs"), {}
    for name, (k, r0, c) in SPRINGS.items():
        frames = []
        for r in np.linspace(min(r0 - 0.3, 0.9), r0 + 0.3, 31):
            pull = np.array([[0, 0, k * (r - r0)], [0, 0, -k * (r - r0)]])
            positions = np.array([[0, 0, 0], [0, 0, r]])
            frames.append(Structure(np.array([7, 7]), positions, energy=0.5 * k * (r - r0) ** 2 + c, forces=pull))
        model = GDML(0.5, 1e-12, None).fit(frames)
        made[name] = save_potential(model, folder / f"{name}.safetensors")
    return made


def command(
    source: object,
    models: dict[str, Path],
    output: Path,
    *options: object,
    water: str = "water",
    pictures: bool = False,
) -> int:
    pair = ("--vacuum", models["vacuum"], "--water", models[water])
    quick = () if pictures else ("--no-pictures",)
    return main(["hydration", *(str(x) for x in (source, *pair, "--output", output, *SHORT, *quick, *options))])


def table(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("windows", [2, 3])
def test_the_free_energy_is_the_integral_and_nothing_is_done_twice(
    windows: int, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    options = ("--windows", windows, "--conformers", 4, "--name", "nitrogen", "--length", 4)
    assert command("N#N", models, output, *options, pictures=True) == 0
    report = json.loads((output / "results.json").read_text(encoding="utf-8"))
    (molecule,) = report["molecules"]
    assert molecule["status"] == "ok" and molecule["estimator"] == ("BAR" if windows == 2 else "MBAR")
    assert molecule["error_kcal_mol"] < 0.06
    assert abs(molecule["free_energy_kcal_mol"] - exact()) < 4 * molecule["error_kcal_mol"]
    assert molecule["frames"] == [320] * windows and len(molecule["overlap_matrix"]) == windows
    (row,) = table(output)
    assert float(row["free_energy_kcal_mol"]) == pytest.approx(molecule["free_energy_kcal_mol"], abs=1e-4)
    assert (output / "convergence" / "nitrogen.png").stat().st_size > 10_000
    # again: the samples are there, so that nothing is simulated
    monkeypatch.setattr(hydration, "sample_group", _refuse)
    before = (output / "results.csv").read_bytes()
    assert command("N#N", models, output, *options) == 0
    assert (output / "results.csv").read_bytes() == before


def _refuse(group: Any) -> dict[str, Any]:
    raise AssertionError(f"simulated again: {[s.name for s in group.solutes]}")


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert command("N#N", models, tmp_path / folder, "--seed", seed, "--length", 0.5) == 0
        found.append(table(tmp_path / folder)[0]["free_energy_kcal_mol"])
    assert found[0] == found[1] != found[2]


def test_a_run_that_stops_or_is_made_longer_is_the_run_that_went_through(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--checkpoint", 0.5, "--conformers", 2)
    whole, longer, stopped = (tmp_path / name for name in ("whole", "longer", "stopped"))
    assert command("N#N", models, whole, *options, "--length", 1.5) == 0
    assert command("N#N", models, longer, *options, "--length", 0.5) == 0
    assert table(longer) != table(whole)
    assert command("N#N", models, longer, *options, "--length", 1.5) == 0
    # less is asked for: what there is counts, and is said
    assert command("N#N", models, longer, *options, "--length", 0.5) == 0
    (molecule,) = json.loads((longer / "results.json").read_text(encoding="utf-8"))["molecules"]
    assert molecule["frames"] == [60, 60] and molecule["samples"]["water"]["planned"] == 30
    real, calls = hydration.sample_group, iter(range(100))

    def interrupted(group: Any) -> Any:
        if next(calls) == 4:  # in the second stretch in water
            raise KeyboardInterrupt
        return real(group)

    with monkeypatch.context() as patched:
        patched.setattr(hydration, "sample_group", interrupted)
        assert command("N#N", models, stopped, *options, "--length", 1.5) == 130
    assert command("N#N", models, stopped, *options, "--length", 1.5) == 0
    assert next(calls) == 5
    for folder in (longer, stopped):
        assert table(folder) == table(whole)
        one, other = (hydration.StateSamples.read(f / "samples/water/N_N.safetensors") for f in (whole, folder))
        assert one.header == other.header and one.header["planned"] == 30 and len(one.header["seeds"]) == 3
        for a, b in zip(one.runs, other.runs, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_campaign_goes_on_reports_what_failed_and_takes_new_molecules(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "table.csv", tmp_path / "campaign"
    rows = ["name,smiles,experiment", "first,N#N,-4.7", "ion,C[NH3+],", '"two, apart",N#N.N#N,', "oxygen,O=O,"]
    source.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert command(source, models, output) == 1
    found = {row["name"]: row for row in table(output)}
    assert found["first"]["status"] == "ok" and found["first"]["experiment_kcal_mol"] == "-4.7"
    assert all(found[name]["status"] == "refused" for name in ("ion", "two, apart", "oxygen"))
    assert "charge: expected a neutral molecule, got +1" in found["ion"]["message"]
    assert "2 fragments" in found["two, apart"]["message"]
    assert "elements: expected atoms among N" in found["oxygen"]["message"]
    assert all(found[name]["free_energy_kcal_mol"] == "" for name in ("ion", "two, apart", "oxygen"))
    assert "3 of 4 molecules have no result" in capsys.readouterr().err
    simulated: list[str] = []
    real = hydration.sample_group

    def counted(group: Any) -> Any:
        simulated.extend(solute.name for solute in group.solutes)
        return real(group)

    monkeypatch.setattr(hydration, "sample_group", counted)
    source.write_text("name,smiles,experiment\nfirst,N#N,-4.7\nsecond,N#N,-4.9\n", encoding="utf-8")
    assert command(source, models, output, pictures=True) == 0
    assert simulated == ["second", "second"]  # in vacuum and in water
    assert (output / "parity.png").stat().st_size > 5000


def test_other_settings_or_another_molecule_do_not_mix(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert command("N#N", models, output, "--name", "it") == 0
    assert command("N#N", models, output, "--name", "it", "--temperature", 310) == 1
    assert "sampling: " in capsys.readouterr().err
    assert command("N#N", models, output, "--name", "it", water="far") == 1
    assert "models: " in capsys.readouterr().err
    structure = tmp_path / "it.pdb"
    lines = [
        f"HETATM{i:5d}  N{i}  MOL A   1    {0:8.3f}{0:8.3f}{z:8.3f}  1.00  0.00           N"
        for i, z in ((1, 0), (2, 1.2))
    ]
    structure.write_text("\n".join([*lines, "END"]) + "\n", encoding="utf-8")
    assert command(structure, models, output) == 1
    assert "name: 'it' was another molecule, or another start structure" in capsys.readouterr().err


def test_no_overlap_is_an_error_with_numbers_and_windows_help(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("N#N", models, tmp_path / "two", water="far") == 1
    message = capsys.readouterr().err
    assert "no overlap" in message and "at least 0.03 between the ensembles 'vacuum' and 'water', got" in message
    (row,) = table(tmp_path / "two")
    assert row["status"] == "no overlap" and row["free_energy_kcal_mol"] == ""


def test_a_molecule_that_breaks_is_reported_and_has_no_number(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("N#N", models, tmp_path / "run", water="torn") == 1
    message = capsys.readouterr().err
    assert "broken: water: run 0 broke" in message and "bond between atom 0 (N) and atom 1 (N)" in message
    assert table(tmp_path / "run")[0]["status"] == "broken"
    # what is known stays known
    assert command("N#N", models, tmp_path / "run", water="torn") == 1
    assert "broken: water" in capsys.readouterr().err


def test_a_run_that_broke_and_began_anew_says_so(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("N#N", models, tmp_path / "run") == 0
    path = tmp_path / "run" / "samples" / "water" / "N_N.safetensors"
    samples = hydration.StateSamples.read(path)
    samples.header["failures"] = ["run 0 broke 1 time(s), first at step 7: the bond is broken"]
    samples.write(path)
    assert command("N#N", models, tmp_path / "run") == 0
    assert "restarted: water: run 0 broke 1 time(s), first at step 7" in capsys.readouterr().out
    (row,) = table(tmp_path / "run")
    assert row["status"] == "restarted" and "water: run 0 broke" in row["message"] and row["free_energy_kcal_mol"]


def test_a_missing_estimator_is_found_before_the_simulations(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ImportError("free energies need the package pymbar")

    monkeypatch.setattr(hydration, "pymbar_module", missing)
    monkeypatch.setattr(hydration, "sample_group", _refuse)
    assert command("N#N", models, tmp_path / "run") == 1
    assert "need the package pymbar" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("C[NH3+]", (), "charge: expected a neutral molecule, got +1"),
        ("N#N.N#N", (), "molecule: expected one molecule, got 2 fragments (N#N, N#N)"),
        ("O=O", (), "elements: expected atoms among N"),
        ("N#N", ("--windows", 1), "windows: expected a whole number >= 2"),
        ("N#N", ("--length", 0), "length: expected a positive number"),
        ("N#N", ("--processes", 0), "processes: expected at least 1"),
        ("N#N", ("--scheduler", "somewhere"), "scheduler: expected an address"),
        ("N#N", ("--model", "pair.safetensors"), "model: no file at pair.safetensors"),
        ("N#N", ("--vacuum", "v.safetensors"), "vacuum: no file at v.safetensors"),
        ("N#N", ("--water", "nosuchmodel"), "water: no potential is called 'nosuchmodel'"),
        ("missing.sdf", (), "missing.sdf: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(
    source: str,
    options: tuple[object, ...],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(source, models, tmp_path / "run", *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_refused_molecule_stays_free(models: dict[str, Path], tmp_path: Path) -> None:
    assert command("O=O", models, tmp_path / "run", "--temperature", 310) == 1
    assert command("N#N", models, tmp_path / "run", "--temperature", 290, "--length", 0.5) == 0


def test_an_impossible_folder_is_one_clear_line(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert command("N#N", models, output) == 1
        error = capsys.readouterr().err
        assert f"error: output: expected a folder to write into, got {output} (" in error and error.count("\n") == 1


def test_a_damaged_file_is_named_by_its_role(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "water" / models["vacuum"].name
    broken.parent.mkdir()
    broken.write_bytes(models["water"].read_bytes()[:-40])
    assert command("N#N", models | {"water": broken}, tmp_path / "run") == 1
    assert f"error: water: {broken.name} is damaged" in capsys.readouterr().err


def test_one_potential_is_no_pair(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hydration", "N#N", "--model", str(models["vacuum"]), "--output", str(tmp_path / "run")]) == 1
    assert (
        "model: expected a pair of potentials (vacuum and water), got one of family 'gdml'" in capsys.readouterr().err
    )
    assert main(["hydration", "N#N", "--water", str(models["vacuum"]), "--output", str(tmp_path / "run")]) == 1
    assert "or two (vacuum and water)" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_give_the_numbers_of_one_process(models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for folder, processes in (("one", 1), ("two", 2)):
        assert command("N#N", models, tmp_path / folder, "--processes", processes) == 0
        found.append(table(tmp_path / folder))
    assert found[0] == found[1]
