"""What the JSON files say of the figures in docs/so3krates.md."""

from __future__ import annotations

from collections.abc import Iterator

from .common import NUMBERS, Read, within


def figures(read: Read) -> Iterator[str]:
    stored = read("so3lr_reference")["stored"]

    def worst(kind: str, what: str) -> float:
        return max(group[what] for group in stored[kind].values())

    exact, native, single = "float64", "float64, native", ("float32", "float32, native")
    yield f"energies within {within(worst(exact, 'energy'))} eV, forces within {within(worst(exact, 'forces'))}"
    yield f"on {sum(group['structures'] for group in stored[exact].values())} stored structures"
    yield f"charges within {within(worst(exact, 'charges'))} e"
    yield f"native code within {within(worst(native, 'forces'))} eV/Å"
    unseen = read("so3lr_reference")["unseen"]["molecules"].values()
    yield f"to its own precision ({within(max(molecule['force_difference'] for molecule in unseen))} eV/Å)"
    assert len(unseen) == 24
    yield "Twelve further molecules, with two cutoffs each"
    energy, forces = (within(max(worst(kind, what) for kind in single)) for what in ("energy", "forces"))
    yield f"single precision {energy} eV and {forces} eV/Å"
    speed = read("so3lr_step")
    places = {"alanine dipeptide": "{} ms against {} at 22 atoms ({} times faster)",
              "water box 192, 6 A": "{} against {} in a box of 192 ({} times)",
              "water droplet 600": "{} against {} in a droplet of 600 ({} times)"}  # fmt: skip
    for name, sentence in places.items():
        found = speed["compared"][name]
        own, port = (found[way]["wall"]["median_ms"] for way in ("native", "port"))
        yield sentence.format(f"{own:.{0 if own > 10 else 1}f}", f"{port:.0f}", f"{found['ratio']['median']:.0f}")
    yield f"power {speed['exponent']['wall']:.2f} of the number of atoms"
    largest = speed["sizes"]["water box 10368"]
    yield (
        f"{largest['atoms']:,} atoms ({largest['wall']['median_ms']:.0f} ms,"
        f" {largest['peak_memory_MiB'] / 1024:.1f} GiB)"
    )
    small, box = speed["jax_ms_per_step"].values()
    yield f"took {small} and {box.replace('-', ' to ')} ms at 22 and 192 atoms"
    systems = read("so3lr_stability")["systems"]
    longest = max(s["largest_bond_over_its_mean"] for s in systems.values())
    shortest = min(s["smallest_bond_over_its_mean"] for s in systems.values())
    assert longest <= 1.13 and shortest >= 0.89 and not any(s["bonds_broken"] for s in systems.values())
    yield "13 % longer or 11 % shorter"
    short, long = systems["dipeptide"], systems["peptide"]
    yield f"{short['ps']:.0f} ps of Ace-Ala-NMe and {long['ps']:.0f} ps of Ace-Ala15-NMe ({long['atoms']} atoms)"
    helix = systems["peptide"]["helix_percent_by_fifths"]
    yield f"{min(helix):.0f} to {max(helix):.0f} % of its residues"
    minima = read("so3lr_minima")
    yield f"{minima['minima']} minima"
    yield f"{minima['minimisations']} minimisations, {minima['cpu_minutes']} minutes"
    yield f"{minima['distinct_by_torsions']['20']} of them differ by 20 degrees"
    yield f"{minima['cis_peptide_bonds']['0']} have trans peptide bonds only, and {minima['within_eV']['0.5']} lie"
    yield f"within 0.5 eV of the lowest, a chain of {NUMBERS[minima['lowest']['hydrogen_bonds']]}"
    assert minima["check"]["largest_move_degrees"] < 2 and minima["check"]["largest_fall_meV"] <= 0.03
    ethanol = read("so3krates_ethanol")
    models, recipe = ethanol["models"], ethanol["recipe"]
    yield f"the same {ethanol['frames']['train']} training frames"
    minutes = [models[name]["training_cpu_minutes"] for name in ("equivariant", "invariant")]
    yield (
        f"({NUMBERS[recipe['model']['num_layers']]} layers, {recipe['model']['num_features']} features,"
        f" {recipe['loop']['steps']:,} steps, {minutes[0]:.0f} minutes of one core, {minutes[1]:.0f} without degrees)"
    )
    yield f"Force MAE on {ethanol['frames']['test']} test frames"
    lengths = [models["equivariant"]["dynamics"][t]["length_ps"] for t in ("300", "500", "1000", "2000")]
    assert lengths[0] == lengths[1]
    yield "({:.0f} ps; {:.0f} and {:.0f} ps at 1000 and 2000 K)".format(*lengths[1:])
    rows = {"SO3krates, degrees 1, 2, 3": "equivariant", "the same without degrees": "invariant",
            "sGDML, σ = 15, 12 permutations": "sgdml"}  # fmt: skip
    for label, name in rows.items():
        survived = [models[name]["dynamics"][t]["survived"] for t in ("300", "500", "1000", "2000")]
        yield f"| {label} | {models[name]['forces_mae_kcal_mol_A']:.2f} | {' | '.join(map(str, survived))} |"
