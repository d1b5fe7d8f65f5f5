"""What the JSON files say of the figures in docs/spookynet_bio.md."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from .common import Read, signed


def figures(read: Read) -> Iterator[str]:
    data, bio, calibration = (read(n) for n in ("bio_dataset", "spookynet_bio", "spookynet_bio_calibration"))
    yield f"{data['structures']:,} structures of {data['groups']:,} molecules and complexes"
    yield "({train:,} train, {valid:,} valid, {test:,} test;".format(**data["splits"])

    def cell(row: dict[str, Any], quantity: str, digits: int) -> str:
        error = row.get(f"{quantity}_error")
        return f"{row[quantity]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    for row in [r for table in bio["classes"]["tables"].values() for r in table]:
        own, published = row["ensemble"], row["published"]
        forces = f"{row['structures']} | {cell(own, 'forces_mae', 0)} | {cell(published, 'forces_mae', 0)}"
        yield f"| {forces} | {cell(own, 'energy_mae', 1)} | {cell(published, 'energy_mae', 0)} |"
    yield "({} of {})".format(*bio["classes"]["half"]["ensemble"])
    whole = bio["classes"]["tables"]["all"][0]["ensemble"]
    yield f"Errors of {whole['forces_mae']:.0f} meV/Å and {whole['energy_mae']:.0f} meV/atom"
    errors = bio["classes"]["relative"]["mean_absolute"]
    for label, words in (("zwitterion", "mean error"), ("charged peptide", "relative to neutral ones")):
        count = sum(r["class"] == label for r in bio["classes"]["relative"]["rows"])
        yield f"{words} {errors[label]['ensemble']:.2f} eV over {count}"
        largest = max(abs(r["ensemble"]) for r in bio["classes"]["relative"]["rows"] if r["class"] == label)
        yield f"largest {largest:.2f} (published: {errors[label]['published']:.1f})"
    spins = {r["name"]: abs(r["ensemble"] - r["GFN2-xTB"]) for r in bio["splittings"]["rows"]}
    unseen = ("butadiene", "CHF", "phenylnitrene")
    trained = [error for name, error in spins.items() if name not in unseen]
    near = sum(error <= 0.1 for error in trained)
    yield f"of {len(trained)} singlet-triplet splittings of molecules that were trained on, {near}"
    yield "butadiene {:.2f}, CHF {:.2f}, phenylnitrene {:.1f} eV".format(*(spins[name] for name in unseen))
    right = {model: sum((row[model] < 0) == (row["ground_by_experiment"] == 3) for row in bio["splittings"]["rows"])
             for model in ("ensemble", "published")}  # fmt: skip
    yield f"in {right['ensemble']} of {len(spins)} cases (published: {right['published']} of {len(spins)})"
    scans = {name: scan["rmse"]["ensemble"] for name, scan in bio["carbenes"]["scans"].items()}
    yield "{CH2:.2f} (CH2), {CF2:.2f} (CF2), {CCl2:.2f} (CCl2) and {CHF:.2f} eV (CHF".format(**scans)
    far = bio["far_waters"]["rows"]
    yield f"GFN2-xTB: at most {ceil(max(1e3 * abs(row['GFN2-xTB']) for row in far))} meV"
    for solute in {row["solute"] for row in far}:
        values = [1e3 * row["ensemble"] for row in far if row["solute"] == solute]
        published = [1e3 * row["published"] for row in far if row["solute"] == solute][-1]
        yield f"| {solute} | {' | '.join(signed(x, 1) for x in values)} | {signed(published).replace(',', '')} |"
    yield from transfers(bio["transfers"]["kinds"])
    yield from rounds_of(read("spookynet_active_learning"))
    yield from dynamics(read("spookynet_bio_dynamics"))
    yield from guard(read("spookynet_bio_guard"))
    examples = read("spookynet_bio_examples")["parts"]
    yield from glycine(examples["zwitterion"], examples["induced"])
    yield from new_molecule(examples["new_molecule"])
    forces = calibration["forces"]["rows"][0]
    yield f"the rank correlation is {forces['spearman']:.2f}"
    yield f"{100 * calibration['frames']['rows'][0]['flagged']:.0f} % are noticed"
    factors = calibration["factors"]
    yield f"Spreads times {factors['force_factor']:.1f} (forces) and {factors['energy_factor']:.1f} (energies)"
    yield f"{calibration['factors']['force_limit']:.1f} eV/Å, is the largest uncertainty"
    curve = read("spookynet_learning_curve")["parts"]
    yield "from {:,}, {:,} and {:,} structures".format(*(part["structures"] for part in curve))
    parts = [part["test"] for part in curve]
    yield "forces {:.0f}, {:.0f}, {:.0f} meV/Å".format(*(part["forces_mae"] for part in parts))
    yield "energies {:.0f}, {:.0f}, {:.0f} meV/atom".format(*(part["energy_mae"] for part in parts))


def transfers(kinds: dict[str, Any]) -> Iterator[str]:
    free, bridges, solvated = (kinds[n] for n in ("zwitterions", "salt bridges", "zwitterions with nine waters"))
    own, published = ([row[m]["moved_too"] for row in (free, bridges)] for m in ("ensemble", "published"))
    yield f"{own[0]} of {free['moved_by_gfn2']} zwitterions and {own[1]} of {bridges['moved_by_gfn2']} salt bridges"
    yield f"(published: {published[0]} and {published[1]})"
    assert solvated["moved_by_gfn2"] == 0
    left = solvated["ensemble"]["left_too"], solvated["published"]["left_too"]
    yield f"keeps all of {solvated['left_by_gfn2']} zwitterions, the ensemble {left[0]} (published: {left[1]})"


def rounds_of(learning: dict[str, Any]) -> Iterator[str]:
    rounds, settings, kept = learning["rounds"], learning["settings"], learning["kept"]
    yield f"these come {sum(r['selected']['kept'] for r in rounds):,} structures"
    yield f"from {settings['starts']} frames of the training set, labels for the {settings['structures']} frames"
    yield f"{learning['training']['steps']:,} steps"
    yield f"| 0 | | | | {learning['start']['valid']['force_mae']:.1f} |"
    for r in rounds:
        before, after = r["before"], r["after"]
        held = f"{before['held']['force_mae']:.1f} → {after['held-' + str(r['round'])]['force_mae']:.1f}"
        chosen = f"{before['selected']['force_mae']:.1f} | {before['any']['force_mae']:.1f}"
        yield f"| {r['round']} | {chosen} | {held} | {after['valid']['force_mae']:.1f} |"
    steps = [step for r in rounds for step in r["steps_kept"]]
    yield f"after {min(steps):,} to {max(steps):,} of its {learning['training']['steps']:,} steps"
    start, end = kept["start"], kept["end"]
    yield f"on the {start['frames']:,} added frames"
    yield f"falls from {start['force_mae']:.1f} to {end['force_mae']:.1f}"


def dynamics(found: dict[str, Any]) -> Iterator[str]:
    peptide, induced, bridge, sodium = (found[name] for name in ("zwitterion", "induced", "bridge", "sodium"))
    for section in (peptide, induced, bridge, sodium):
        run = section["model"]
        assert run["ps"] == 200 and run["ended_early"] is None and not run["hydrogen_lost"]
        assert run.get("bonds_of_carbon", {"broken": 0})["broken"] == 0
        assert run["uncertainty"]["events_beyond_limit"] == 0

    def value(figure: dict[str, float]) -> str:
        return f"{figure['value']:.2f} ± {figure['error']:.2f}"

    protons = induced["model"]["protons"]
    assert protons["hydrogens_that_changed_atom"] == 0 and protons["share_of_frames"]["transferred"] == 0
    waters = [value(s["waters_within"]) for s in induced["model"]["shells"].values()]
    yield (
        f"one is shared in {100 * protons['share_of_frames']['shared']:.1f} % of the frames, {waters[0]} waters stand"
        f" about the ammonium and {waters[1]} about each oxygen of the carboxylate"
    )
    force = 1e3 * induced["against_gfn2_on_frames_of_the_run"]["force_mae_eV_A"]
    yield f"(Forces on its frames are off by {force:.0f} meV/Å from GFN2-xTB's.)"
    vacuum = found["mechanical"]["gfn2"]
    assert vacuum["protons"]["hydrogens_that_changed_atom"] == 1 and vacuum["ps"] <= 2
    own, teacher = peptide["model_until_a_proton_moves"], peptide["gfn2"]
    yield f"keeps its charges for {own['ps']:.0f} ps"
    waters = [[value(s["waters_within"]) for s in run["shells"].values()] for run in (own, teacher)]
    yield f"{waters[0][0]} waters stand about the ammonium and {waters[0][1]} about each oxygen of the carboxylate"
    yield f"{teacher['ps']:.0f} ps, {waters[1][0]} and {waters[1][1]}"
    extended = [value(run["ramachandran"]["beta and PPII"]) for run in (own, teacher)]
    yield f"the shares of β and PPII are {extended[0]} and {extended[1]}"
    errors = peptide["against_gfn2_on_frames_of_the_run"]["energy_error_by_protons"]
    yield f"by {errors['transferred']['value'] - errors['as built']['value']:.2f} eV more than the model's"
    yield f"in {100 * bridge['model']['protons']['share_of_frames_as_ion_pair']:.0f} % of the frames"
    yield f"off by {1e3 * bridge['against_gfn2_on_frames_of_the_run']['force_mae_eV_A']:.0f} meV/Å"
    yield f"by GFN2-xTB, {bridge['gfn2']['ps']:g} ps"
    shell, other = (sodium[by]["shells"]["water O about Na"] for by in ("model", "gfn2"))
    yield f"{value(shell['waters_within'])} waters in its first shell, {shell['first_peak_A']:.2f} Å away"
    yield f"{sodium['gfn2']['ps']:g} ps, {value(other['waters_within'])} and {other['first_peak_A']:.2f} Å"
    force = 1e3 * sodium["against_gfn2_on_frames_of_the_run"]["force_mae_eV_A"]
    yield f"forces are off by {force:.0f} meV/Å"
    drifts = {
        name: [abs(r["drift_meV_per_atom_per_ps"]) for r in part["runs"]] for name, part in found["drift"].items()
    }
    assert max(map(max, drifts.values())) < 0.02
    yield f"capped alanine at most {max(drifts['peptide']):.4f}"
    yield f"the droplet {max(drifts['sodium']):.4f} meV/atom/ps"


def glycine(found: dict[str, Any], induced: dict[str, Any]) -> Iterator[str]:
    assert induced["induced"] and not found["induced"]
    yield f"{found['windows']} umbrella windows of {found['ps']:.0f} ps"
    names = {"charges of the model alone": found, "with induced dipoles (`--induced`)": induced}
    free = {name: part["in water"]["neutral less zwitterion"] for name, part in names.items()}
    for name, part in names.items():
        value, error = free[name]
        barrier = "{:.1f} ± {:.1f}".format(*part["in water"]["barrier from zwitterion"])
        yield f"| {name} | {signed(value, 1)} ± {error:.1f} | {barrier} |"
    values = [value for value, _ in free.values()]
    teacher = values[1] + induced["compared"]["energies of GFN2-xTB, first order"]
    assert teacher > 0
    yield f"| the same, energies of GFN2-xTB to first order | +{teacher:.1f} | |"
    minima = {name.removesuffix(", ALPB"): x for name, x in induced["compared"].items() if name.endswith("ALPB")}
    implicit = min(x for name, x in minima.items() if name.startswith("neutral")) - minima["zwitterion"]
    yield f"| GFN2-xTB in implicit water (ALPB), minima | {signed(implicit, 1)} | |"
    yield f"are worth {values[1] - values[0]:.0f} kcal/mol"


def new_molecule(found: dict[str, Any]) -> Iterator[str]:
    yield f"it takes {found['seconds'] / 60:.1f} minutes on four cores"
    exploring, labels = found["exploring"], found["labels"]
    yield f"disagree by {exploring['new']:.2f} eV/Å (known molecules: {exploring['rehearsed']:.2f})"
    yield f"{labels['new']} frames get labels"
    names = {"new": "zidovudine", "rehearsed": f"molecules in the rehearsal, {labels['rehearsed']} labels",
             "known": "other known molecules"}  # fmt: skip
    for key, label in names.items():
        pair = [found[f"{key} {when}"] for when in ("before", "after")]
        forces, energy, spread = (
            " → ".join(f"{row[quantity]:.{digits}f}" for row in pair)
            for quantity, digits in (("forces", 0), ("energy", 1), ("disagreement", 2))
        )
        yield f"| {label} | {forces} | {energy} | {spread} |"


def guard(found: dict[str, Any]) -> Iterator[str]:
    own, file = found["summary_with_own_limits"], found["summary"]
    driven = ("hot", "pulled")
    total = sum(file[part]["runs"] for part in driven)
    yield f"{sum(file[part]['stopped'] for part in driven)} of {total} runs that were driven out"
    limits = [molecule["own_limit_eV_A"] for molecule in found["molecules"].values()]
    yield f"{min(limits):.1f} to {max(limits):.1f} eV/Å"
    yield f"stop {own['hot']['stopped']} of {own['hot']['runs']} runs at 2000 K"
    yield f"{own['pulled']['stopped']} of {own['pulled']['runs']} pulled bonds"
    before, reached = (sum(own[part][name] for part in driven) for name in ("nonsense_and_stopped_before", "nonsense"))
    yield f"{before} of the {reached} that reach errors of 50 meV per atom"
    assert own["calm"]["stopped"] == 0 and own["calm"]["runs"] == 2
    yield f"only {sum(own[part]['wrong_and_stopped_before'] for part in driven)} of the {total} runs are stopped before"
