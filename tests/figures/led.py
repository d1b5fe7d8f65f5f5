"""What the JSON files say of the figures in docs/led.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from .common import NUMBERS, Read, signed, significant, value


def figures(read: Read) -> Iterator[str]:
    return chain(mueller_brown(read), alanine(read), alternation(read), water(read), trpcage(read), speed(read))


def mueller_brown(read: Read) -> Iterator[str]:
    found, data = read("led_mueller_brown"), read("led_mueller_brown_md")["frames"]["train"]
    md, rows = found["md_test"], found["rows"]
    length = data["time"] / data["trajectories"]
    tests = sum(passage["time_at_risk"] for passage in md["passages"].values()) / length
    yield f"trained on {data['trajectories']} trajectories of {length:.0f} time units"
    yield f"compared with {tests:.0f} others"
    yield f"{NUMBERS[len(rows['linear-Gaussian']['seeds'])]} seeds, mean ± standard deviation"
    up, down = (md["passages"][name]["sem"] for name in ("upper to lower", "lower to upper"))
    yield (
        f"| MD | {md['upper_to_lower']:.0f} ± {up:.0f} | {md['lower_to_upper']:.1f} ± {down:.1f} |"
        f" {md['timescales']['20']:.1f} ± {md['timescale_errors']['20']:.1f} | {md['upper']:.3f}, {md['lower']:.3f} | |"
    )
    labels = {"Markov state model": "Markov state model, 400 states"}
    for name in (n for n in rows if not n.endswith(": decoder")):
        over = rows[name]["over_seeds"]
        times = ((over["upper_to_lower"], 0), (over["lower_to_upper"], 1), (over["timescale_20"], 1))
        cells = " | ".join(f"{x['mean']:.{digits}f} ± {x['sd']:.{digits}f}" for x, digits in times)
        mean = {key: f"{over[key]['mean']:.3f}" for key in ("upper", "lower", "w1_x", "w1_y")}
        places = f"{mean['upper']}, {mean['lower']} | {mean['w1_x']}, {mean['w1_y']}"
        yield f"| {labels.get(name, name)} | {cells} | {places} |"
    decoded = rows["published decoder and sizes: decoder"]["over_seeds"]
    up, down = (decoded[name]["mean"] for name in ("upper_to_lower", "lower_to_upper"))
    yield f"true latent states decoded with it give {up:.0f} and {down:.1f}"
    one = [seed["upper_to_lower"] for seed in rows["LED, 1 latent coordinate"]["seeds"]]
    across = sum(time < 0.2 * md["upper_to_lower"] for time in one)
    yield f"With one latent coordinate, {NUMBERS[across]} seed of {NUMBERS[len(one)]} puts it across the reaction path"


def alanine(read: Read) -> Iterator[str]:
    found, reference = read("led_ala2"), read("led_reference")
    parts = reference["amounts"]["ala2"]
    free, train = parts["free-train"]["ns"], parts["free-train"]["ns"] + parts["swarm-train"]["ns"]
    models, md = [m for m in found["models"] if m["name"] == "LED"], found["md"]
    yield f"{train:.0f} ns of training data ({free:.0f} ns from equilibrium,"
    yield f"{NUMBERS[found['settings']['config']['latent_dim']]} latent coordinates, {NUMBERS[len(models)]} seeds"

    def seeds(of: Any, digits: int) -> str:
        return ", ".join(f"{of(model):.{digits}f}" for model in models)

    yield f"| {value(md['alphaR'], 3)} | {seeds(lambda m: m['alphaR']['value'], 3)} |"
    for label, lag in (("slowest time scale at φ < 0, lag 5 ps [ps]", "5"), ("the same, lag 1 ps", "1")):
        times = seeds(lambda m, lag=lag: m["timescale_ps"][lag]["value"], 1)
        yield f"| {label} | {md['timescale_ps'][lag]['value']:.1f} | {times} |"
    yield f"(two sets of MD of the training length: {found['floor']['train']:.4f})"
    yield f"| {md['jensen_shannon']:.4f} | {seeds(lambda m: m['jensen_shannon'], 4)} |"
    for label, kind, digits in (
        ("time at φ > 0 [ns]", "residence", 1),
        ("time until an entry to φ > 0 [ns]", "entry", 0),
    ):
        nanoseconds = {key: x / 1000 for key, x in md["exchange_ps"][kind].items()}
        led = seeds(lambda m, kind=kind: m["exchange_ps"][kind]["value"] / 1000, digits)
        yield f"| {label} | {value(nanoseconds, digits)} | {led} |"
    shapes = [model["geometry"] for model in models]
    inverted, beyond = {s["inverted"] for s in shapes}, {s["bonds_beyond_6_sd"] for s in shapes}
    assert inverted == {0} and beyond == {0}
    own, angles = md["geometry"], ", ".join(f"{s['n_ca_cb_sd']:.2f}" for s in shapes)
    yield f"inverted CA in {shapes[0]['frames']:,} frames | {own['n_ca_cb_sd']:.2f}; {own['inverted']} | {angles}; 0 |"
    far = [s["bonds_beyond_4_sd"] * 1e5 for s in shapes]
    written = ", ".join(f"{x:.{0 if x > 10 else 1}f}e-5" for x in far)
    yield f"| {own['bonds_beyond_4_sd'] * 1e5:.1f}e-5; {own['bonds_beyond_6_sd']} | {written}; 0 |"
    assert max(far) <= 2e5 * own["bonds_beyond_4_sd"]
    plain = max((model["uncalibrated"] for model in models), key=lambda shape: shape["bonds_beyond_4_sd"])
    wide, often = plain["widest_bond_sd_over_training"] - 1.0, plain["bonds_beyond_4_sd"] / own["bonds_beyond_4_sd"]
    yield f"bonds of one seed were up to {wide:.0%} too wide".replace("%", " %")
    yield f"and {NUMBERS[round(often)]} times as many beyond 4 s.d. as in MD"
    entries = reference["alanine"]["exchange_ps_by_split"]["train"]["entry"]
    yield f"rest on {NUMBERS[entries['events']]} events in the training data"


def alternation(read: Read) -> Iterator[str]:
    found = read("led_alternation")["implicit"]
    md, rounds = found["rows"]["md"], {rho: found["rows"][f"rho_{rho}"] for rho in (1, 10, 100)}
    energies = found["md_energies"]
    cells = f"{value(md['alphaR'], 3)} | {value(md['timescale_ps']['5'], 1)} | | s.d. {energies['sd']:.0f} | | |"
    yield f"| MD | {cells}"
    for rho, run in rounds.items():
        whole, after, returns = run["whole"], run["energies"]["after_return"], run["returns"]
        gain = run["speed"]["measured"]
        maps = f"{whole['jensen_shannon_phi_negative']:.4f} ({whole['floor']:.4f})"
        accepted = f"{returns['accepted_first']} of {returns['returns']}"
        speedup = f"{gain:.{2 if gain < 2 else 1 if gain < 10 else 0}f} ({run['speed']['bound']})"
        yield (
            f"| rho {rho} | {value(whole['alphaR'], 3)} | {value(whole['timescale_ps']['5'], 1)} | {maps} |"
            f" {signed(after['mean_minus_md'][0], 1)} ± {after['error'][0]:.1f} | {accepted} | {speedup} |"
        )
    yield f"(rho 1: {value(rounds[1]['between_returns']['5'], 1)} ps)"
    assert all(run["returns"]["accepted_first"] == run["returns"]["returns"] for run in rounds.values())
    yield f"{NUMBERS[sum(run['returns']['doubt_switches'] for run in rounds.values())]} latent blocks were doubted"

    def mean(stage: str) -> float:
        stages = [run["energies"][stage] for run in rounds.values()]
        return sum(s["n"] * s["mean"] for s in stages) / sum(s["n"] for s in stages)

    yield f"Decoded frames lie at {signed(mean('decoded'))}"
    yield f"minimised ones at {signed(mean('minimized'), 1)}"
    yield f"(MD minimised alike: {signed(found['md_minimized']['mean'], 1)})"
    yield f"frames of MD after a return at {signed(mean('first_frame'))} kJ/mol (MD: {signed(energies['mean'], 1)})"


def water(read: Read) -> Iterator[str]:
    found = read("led_alternation")["explicit"]
    data, settings, rows = found["model"]["ns_in_water"], found["settings"], found["rows"]
    test = found["alphaR"]["md, test"]["frames"] / 1000
    yield f"{data['train']:.0f} ns of training, {data['valid']:.1f} ns of validation and {test:.1f} ns of test data"
    yield f"{NUMBERS[len(found['speed'])]} walkers, {settings['rounds']} rounds each, rho {settings['rho']}."
    labels = {"MD, training runs": "md_training", "MD, held-back runs": "md_held_back", "LED alone": "led_alone",
              "alternation, all frames": "whole"}  # fmt: skip
    for label, name in labels.items():
        row = rows[name]
        maps = f"{row['jensen_shannon_phi_negative']:.2f} ({row['floor']:.2f}) " if name != "md_held_back" else ""
        times = value(row["timescale_ps"]["5"], 0)
        yield f"| {label} ({row['ns']:g} ns) | {value(row['alphaR'], 2)} | {times} | {maps}|"
    returns, energies = found["returns"], found["energies"]
    first, retried = returns["accepted_first"], returns["accepted_after_retries"]
    yield f"Of {returns['returns']} latent blocks {returns['doubt_switches']} ended early in doubt"
    yield f"of the returns {first + retried} were accepted ({first} at the first try)"
    yield f"with {min(returns['waters_moved'])} to {max(returns['waters_moved'])} waters moved"
    assert not any(returns[name] for name in ("fallbacks", "stayed", "refused"))
    md, after = found["md_energies"], energies["after_return"]
    yield f"Frames of MD after returns have {signed(energies['all_frames']['mean']).replace(',', '')} kJ/mol"
    yield f"(MD: {signed(md['mean']).replace(',', '')} ± {md['error']:.0f})"
    yield f"the first of them {after['mean_minus_md'][0]:.0f} ± {after['error'][0]:.0f} more"
    gains = " and ".join(f"{walker['measured']:.1f}" for walker in found["speed"])
    yield f"The speed-up is {gains} of at most {found['speed'][0]['bound']}"


def trpcage(read: Read) -> Iterator[str]:
    found = read("led_trpcage")
    ns, models, verdict = found["ns"], [m for m in found["models"] if m["name"] == "LED"], found["verdict"]
    length = models[0]["data"][0] * found["interval_ps"]
    yield f"{sum(ns.values()):.1f} ns of MD in all, {sum(ns.values()) * 1000 / length:.0f} runs of {length:.0f} ps"
    train, valid, test = (word(round(ns[split] * 1000 / length)) for split in ("train", "valid", "test"))
    yield f"{train} train ({ns['train']:.1f} ns), {valid} validate and {test} test ({ns['test']:.1f} ns)"
    choice = found["choice"]
    yield (
        f"Of {NUMBERS[len(choice['decoders'])]} encoders and {NUMBERS[len(choice['propagators'])]} propagators"
        f" these were chosen by cross-validation over the first {choice['picoseconds_of_each_replica']:.0f} ps"
    )

    def row(divergence: dict[str, float]) -> str:
        names = ("RMSD of CA", "RMSD of heavy atoms", "radius of gyration", "end to end", "TICA 1", "TICA 2")
        return " | ".join(f"{divergence[name]:.3f}" for name in names)

    slow = {m["name"]: m["timescale_ps"]["value"] for m in found["models"]}
    seeds = [m["timescale_ps"]["value"] for m in models]
    yield f"| LED | {row(verdict['LED']['divergence'])} | {', '.join(f'{x:.0f}' for x in seeds)} |"
    markov = "Markov state model (decodes training frames)"
    yield f"| {markov} | {row(verdict['MSM']['divergence'])} | {slow['MSM']:.0f} |"
    yield f"| linear-Gaussian | {row(verdict['linear-Gaussian']['divergence'])} | {slow['linear-Gaussian']:.0f} |"
    training = found["training_data"]
    own = training["timescale_ps"]["value"]
    yield f"| the training runs themselves | {row(training['divergence'])} | {own:.0f} |"
    floor = {name: 2 * x["train"] for name, x in found["floor"].items()}
    yield f"| twice the floor | {row(floor)} | |"
    assert all(verdict["LED"]["within_twice_the_floor"].values())
    yield "All six distributions are within twice the floor"
    nearer = sum(x < verdict["LED"]["divergence"][name] for name, x in verdict["MSM"]["divergence"].items())
    yield f"the Markov state model is nearer in {NUMBERS[nearer]} of the {NUMBERS[len(floor)]} distributions"
    yield from long_runs(read("led_trpcage_long_runs"))
    yield from other_splits(found["other_splits"]["over_twice_the_floor"], splits_that_meet_all(found))
    inside = [in_interval(row["timescale_ps"]["value"], row["md_timescale_ps"])
              for row in found["other_splits"]["models"]]  # fmt: skip
    yield f"The slow time is inside the interval of the test runs in {NUMBERS[sum(inside)]}"
    yield from slow_times(found, seeds, [slow["MSM"], slow["linear-Gaussian"]])
    mapped = found["back_mapping"]
    yield f"{mapped['fates']['sound']} of {mapped['frames']} decoded frames stayed sound through minimisation"
    yield f"and {mapped['followed_ps']:.0f} ps of MD"
    yield f"{mapped['clashing_when_decoded']} of them after overlaps"
    assert {name: n for name, n in mapped["fates"].items() if name != "sound"} == {"inverted when minimized": 1}
    yield "one came out inverted"
    decoder = {c["name"]: c for c in choice["decoders"]}
    wide, narrow = (mean_of_folds(decoder[name]) for name in ("distances", "distances, narrow"))
    yield f"decoded: {wide:.3f} nats from held-back frames with a width of 0.2, {narrow:.3f} with 0.05"
    assert choice["decoder"] == "distances, narrow"
    cartesian = next(c for c in choice["decoders"] if c["name"].startswith("Cartesian"))
    decoded, latent = (cartesian[f"{which}timescale_ps"] for which in ("", "latent_"))
    yield f"Cartesian ones did not ({decoded:.0f} against {latent:.0f} ps, Trp-cage)"


def long_runs(found: dict[str, Any]) -> Iterator[str]:
    """What `led_trpcage.py` found with few long runs."""
    led, runs = found["verdict"]["LED"], sum(found["runs"].values())
    assert [name for name, met in led["within_twice_the_floor"].items() if not met] == ["radius of gyration", "TICA 2"]
    missed, bounds = zip(
        *((led["divergence"][name], 2 * found["floor"][name]["train"]) for name in ("radius of gyration", "TICA 2")),
        strict=True,
    )
    yield f"As much MD in {runs} runs of {found['picoseconds_of_each']:.0f} ps"
    yield f"({' and '.join(f'{x:.3f}' for x in missed)} nats, the bounds {' and '.join(f'{x:.3f}' for x in bounds)})"
    own = found["training_data"]["divergence"]["radius of gyration"]
    yield f"the radius of gyration of the training runs themselves was {own:.3f} from that of the test runs"


def word(n: int) -> str:
    """A small number in letters."""
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def mean_of_folds(candidate: dict[str, Any]) -> float:
    """Divergence of the distance from end to end of decoded true latent states."""
    found = [fold["decoder"]["end to end"] for fold in candidate["folds"]]
    return sum(found) / len(found)


def splits_that_meet_all(found: dict[str, Any]) -> list[bool]:
    """Of the other ways to share out Trp-cage's runs, whether all divergences are within twice the floor."""
    over = found["other_splits"]["over_twice_the_floor"]["divergence"]
    return [max(split) <= 1.0 for split in zip(*over.values(), strict=True)]


def other_splits(over: dict[str, dict[str, list[float]]], met: list[bool]) -> Iterator[str]:
    yield f"With all 64 shared out anew in {NUMBERS[len(met)]} ways"
    own = [max(split) <= 1.0 for split in zip(*over["training_divergence"].values(), strict=True)]
    yield f"LED is within all six bounds in {NUMBERS[sum(met)]}, the training runs in {NUMBERS[sum(own)]}"
    means = ([f"{sum(x) / len(x):.2f}" for x in over[kind].values()] for kind in ("divergence", "training_divergence"))
    led, training = (f"{', '.join(mean[:-1])} and {mean[-1]}" for mean in means)
    yield f"the means are {led}, those of the training runs {training}"


def in_interval(value: float, of: dict[str, float]) -> bool:
    return of["low"] < value < of["high"]


def slow_times(found: dict[str, Any], seeds: list[float], baselines: list[float]) -> Iterator[str]:
    times = found["md_timescale_ps"]
    parts = test, train, every = times["test"], times["train"], times["all"]
    yield (
        f"{test['value']:.0f} ps in the test runs (95 % interval {test['low']:.0f} to {test['high']:.0f}),"
        f" {train['value']:.0f} ps in the training runs ({train['low']:.0f} to {train['high']:.0f}),"
        f" {every['value']:.0f} ps in all 64 runs ({every['low']:.0f} to {every['high']:.0f})"
    )
    # "LED lies inside all three intervals. Both baselines are too fast for all of them"
    assert all(in_interval(time, x) for time in seeds for x in parts)
    assert all(time < x["low"] for time in baselines for x in parts)


def speed(read: Read) -> Iterator[str]:
    found = read("led_speedup")
    rows, costs = found["rows"], found["costs"]
    native, slow, water = "MD, native OBC2", "MD, CustomGBForce, CPU", "MD, TIP3P"
    rates = {name: row["ps_per_cpu_s"] for name, row in rows.items()}
    yield f"A latent step takes about {1e3 / rates['LED, 1 walker']:.2f} ms"
    yield f"a step of a thousand walkers about {1e6 / rates['LED, 1000 walkers']:.1f} ms"
    yield f"TIP3P | {rates[native]:.0f}; {rates[slow]:.1f}; {rates[water]:.1f} | | |"
    for label, name in (("one walker", "LED, 1 walker"), ("1,000 walkers", "LED, 1000 walkers")):
        pair = (rows[name], rows[f"{name}, decoded"])
        cells = ["; ".join(significant(row["ps_per_cpu_s"]) for row in pair)]
        cells += ["; ".join(significant(row["over"][md]) for row in pair) for md in (native, water)]
        yield f"| {label}; with every frame decoded | {' | '.join(cells)} |"
    alternating = [rows[f"LED alternating, rho {rho}"] for rho in (1, 10, 100)]
    gains = [row["over"][native] for row in alternating]
    written = "; ".join(f"{x:.{0 if x > 10 else 1}f}" for x in gains)
    yield f"| {'; '.join(significant(row['ps_per_cpu_s']) for row in alternating)} | {written} | |"
    yield f"Against `CustomGBForce` the factors are {rows[native]['over'][slow]:.0f} times larger"
    yield f"cost {significant(costs['data_cpu_s'])} and {significant(costs['training_wall_s'])} s"
    after = costs["pays_after_ns"]["LED, 1 walker"]
    data = sum(part["ns"] for name, part in read("led_reference")["amounts"]["ala2"].items() if "test" not in name)
    yield f"LED pays after {significant(after, 1)} ns, while its own data are {data:.0f} ns long"
