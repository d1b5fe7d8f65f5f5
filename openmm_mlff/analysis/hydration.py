"""energy differences along the way from vacuum to water -> hydration free energy, its diagnostics and pictures.

The free energy of a molecule in water minus that in vacuum is -kT ln(Z_water / Z_vacuum), both with an implicit solvent
or none: U_c = (1 - c) U_vacuum + c U_water is sampled at couplings c from 0 to 1, and all that is needed of a frame is
dU = U_water - U_vacuum. With the two ends alone it is Bennett's estimate, with windows between them that of MBAR.
Energies are in eV here and in kcal/mol in pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis import free_energy
from openmm_mlff.analysis.free_energy import LEAST_OVERLAP
from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure
from openmm_mlff.units import EV_PER_KCAL_PER_MOL, KJ_PER_MOL_PER_EV

#: frames per state from which error bars mean something.
LEAST_FRAMES = 10


@dataclass(frozen=True)
class Hydration:
    """What was found for one molecule.

    Attributes:
        couplings: of the states. differences: of each state one array of dU per run, eV.
        value, error: hydration free energy and its standard error, eV.
        overlap: matrix of the states, ``(K, K)``.
        effective: N_eff / N of the vacuum frames for averages in water, and of the water frames for those in vacuum.
        one_sided: (value, error) in eV by Zwanzig's formula from the vacuum frames, and from the water frames.
        inefficiency: correlated frames per independent one, by state.
        convergence: see `free_energy.convergence`; values and errors in eV.
    """

    couplings: tuple[float, ...]
    differences: tuple[tuple[np.ndarray, ...], ...]
    value: float
    error: float
    overlap: np.ndarray
    effective: tuple[float, float]
    one_sided: tuple[tuple[float, float], tuple[float, float]]
    inefficiency: tuple[float, ...]
    convergence: dict[str, np.ndarray]

    @property
    def frames(self) -> list[int]:
        """Frames of each state."""
        return [sum(len(run) for run in runs) for runs in self.differences]

    @property
    def neighbour_overlap(self) -> float:
        """The least overlap between states that follow one another."""
        k = np.arange(len(self.couplings) - 1)
        return float(min(self.overlap[k, k + 1].min(), self.overlap[k + 1, k].min()))

    def summary(self) -> dict[str, Any]:
        """Plain numbers, in kcal/mol and kJ/mol."""
        kcal = 1.0 / EV_PER_KCAL_PER_MOL
        return {
            "free_energy_kcal_mol": self.value * kcal,
            "error_kcal_mol": self.error * kcal,
            "free_energy_kJ_mol": self.value * KJ_PER_MOL_PER_EV,
            "error_kJ_mol": self.error * KJ_PER_MOL_PER_EV,
            "estimator": "BAR" if len(self.couplings) == 2 else "MBAR",
            "couplings": list(self.couplings),
            "frames": self.frames,
            "statistical_inefficiency": [round(g, 3) for g in self.inefficiency],
            "overlap": self.neighbour_overlap,
            "overlap_matrix": [[round(float(x), 5) for x in row] for row in self.overlap],
            "effective_vacuum": self.effective[0],
            "effective_water": self.effective[1],
            "zwanzig_kcal_mol": {
                name: {"value": v * kcal, "error": e * kcal}
                for name, (v, e) in zip(("from_vacuum", "from_water"), self.one_sided, strict=True)
            },
            "convergence_kcal_mol": {
                "fraction": self.convergence["fraction"].tolist(),
                **{
                    name: [[None if np.isnan(x) else float(x) * kcal for x in row] for row in self.convergence[name]]
                    for name in ("from_start", "from_end")
                },
            },
        }


def hydration(
    differences: Sequence[Sequence[np.ndarray]],
    couplings: Sequence[float],
    temperature: float,
    least_overlap: float | None = LEAST_OVERLAP,
    points: int = 10,
) -> Hydration:
    """Hydration free energy from frames of the states, which begin with vacuum (0) and end with water (1).

    Args:
        differences: for each state the runs' dU = U_water - U_vacuum, ``(n,)`` eV each, in order of time.
        least_overlap: see `free_energy.bar`. points: of the convergence.

    Raises `InsufficientOverlap`, naming the couplings of the two states, and `ValueError` for fewer than
    `LEAST_FRAMES` frames of a state.
    """
    if couplings[0] != 0 or couplings[-1] != 1 or len(couplings) != len(differences):
        raise ValueError(
            f"couplings: expected {len(differences)} numbers, the first 0 and the last 1, got {list(couplings)}"
        )
    names = [_name(c) for c in couplings]
    for name, runs in zip(names, differences, strict=True):
        if sum(len(run) for run in runs) < LEAST_FRAMES:
            n = sum(len(run) for run in runs)
            raise ValueError(f"frames: expected at least {LEAST_FRAMES} of the ensemble {name!r}, got {n}")
    thermal = free_energy.thermal_energy(temperature)
    reduced = [[np.asarray(run, dtype=np.float64) / thermal for run in runs] for runs in differences]
    c = np.asarray(couplings, dtype=np.float64)

    def estimate(*states: Sequence[np.ndarray], least: float | None = None) -> tuple[Any, ...]:
        if len(states) == 2:
            found = free_energy.bar(states[0], [-run for run in states[1]], least, (names[0], names[1]))
            return found.delta, found.error, found.overlap, found.inefficiency
        windows = free_energy.mbar([[c[:, None] * run for run in state] for state in states], least, names)
        return windows.delta[-1], windows.error[-1], windows.overlap, windows.inefficiency

    value, error, overlap, inefficiency = estimate(*reduced, least=least_overlap)
    table = free_energy.convergence(lambda *states: estimate(*states)[:2], *reduced, points=points)
    sides = [free_energy.zwanzig(reduced[0]), free_energy.zwanzig([-run for run in reduced[-1]], reverse=True)]
    counts = [sum(len(run) for run in runs) for runs in (reduced[0], reduced[-1])]
    return Hydration(
        couplings=tuple(float(x) for x in couplings),
        differences=tuple(tuple(np.asarray(run) for run in runs) for runs in differences),
        value=float(value) * thermal,
        error=float(error) * thermal,
        overlap=overlap,
        effective=(
            free_energy.effective_samples(reduced[0]) / counts[0],
            free_energy.effective_samples([-run for run in reduced[-1]]) / counts[1],
        ),
        one_sided=(sides[0].times(thermal), sides[1].times(thermal)),
        inefficiency=inefficiency,
        convergence={"fraction": table["fraction"], **{n: table[n] * thermal for n in ("from_start", "from_end")}},
    )


def _name(coupling: float) -> str:
    return {0.0: "vacuum", 1.0: "water"}.get(float(coupling), f"coupling {coupling:.3g}")


# -- pictures ----------------------------------------------------------------------------------------------------


def plot_hydration(
    found: Hydration, path: str | Path, length: float, title: str = "", experiment: float | None = None
) -> Path:
    """Convergence with time, the distributions of dU, and for windows the overlap matrix (PNG).

    Args:
        length: of the runs, ps. experiment: kcal/mol, in the title, and a line where it lies near.
    """
    plt = pyplot()
    windows = len(found.couplings) > 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 3 if windows else 2, figsize=(10.2 if windows else 7.4, 3.2), layout="constrained"
        )
        _draw_convergence(axes[0], found, length, experiment)
        _draw_differences(plt, axes[1], found)
        if windows:
            _draw_overlap(axes[2], found)
        if title:
            figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def _draw_convergence(axis: Any, found: Hydration, length: float, experiment: float | None) -> None:
    time = found.convergence["fraction"] * length
    parts = (("from_start", "first part of the run", BLUE), ("from_end", "last part", ORANGE))
    for name, label, colour in parts:
        value, error = found.convergence[name].T / EV_PER_KCAL_PER_MOL
        axis.fill_between(time, value - error, value + error, color=colour, alpha=0.2, linewidth=0)
        axis.plot(time, value, color=colour, marker="o", markersize=3, label=label)
    value, error = found.value / EV_PER_KCAL_PER_MOL, found.error / EV_PER_KCAL_PER_MOL
    title = f"{value:.2f} ± {error:.2f} kcal/mol"
    if experiment is not None:
        title += f" (experiment {experiment:.2f})"
        low, high = axis.get_ylim()
        if 2 * low - high < experiment < 2 * high - low:  # a line far away would flatten the curves
            axis.axhline(experiment, color=GREY, linestyle="--", linewidth=1, label="experiment")
    axis.set_title(title)
    axis.set_xlabel("time per state (ps)")
    axis.set_ylabel("hydration free energy (kcal/mol)")
    axis.set_xlim(0, length * 1.02)
    axis.legend(loc="best", fontsize=8)


def _draw_differences(plt: Any, axis: Any, found: Hydration) -> None:
    """Distributions of dU; Bennett's estimate lies where those of the ends cross."""
    states = [np.concatenate(runs) / EV_PER_KCAL_PER_MOL for runs in found.differences]
    bins = np.linspace(min(x.min() for x in states), max(x.max() for x in states) + 1e-9, 41)
    colours = [BLUE, ORANGE] if len(states) == 2 else plt.get_cmap("viridis")(np.linspace(0, 0.9, len(states)))
    for x, c, colour in zip(states, found.couplings, colours, strict=True):
        if c in (0, 1):
            axis.hist(x, bins=bins, density=True, histtype="stepfilled", color=colour, alpha=0.25)
        axis.hist(x, bins=bins, density=True, histtype="step", color=colour, label=_name(c))
    value = found.value / EV_PER_KCAL_PER_MOL
    axis.axvline(value, color=GREY, linestyle=":", linewidth=1)
    vacuum, water = found.effective
    axis.set_title(f"$N_{{eff}}/N$: {vacuum:.2f} (vacuum), {water:.2f} (water)")
    axis.set_xlabel("$U_{water} - U_{vacuum}$ (kcal/mol)")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.legend(loc="best", fontsize=8)


def _draw_overlap(axis: Any, found: Hydration) -> None:
    axis.imshow(found.overlap, cmap="Blues", vmin=0, vmax=1)
    small = len(found.couplings) <= 9
    for (i, j), x in np.ndenumerate(found.overlap):
        if small and x >= 0.005:
            axis.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=7, color="white" if x > 0.5 else "black")
    labels = [f"{c:.2g}" for c in found.couplings]
    axis.set_xticks(range(len(labels)), labels)
    axis.set_yticks(range(len(labels)), labels)
    axis.spines[:].set_visible(False)
    axis.set_title("overlap matrix")
    axis.set_xlabel("coupling")
    axis.set_ylabel("coupling")


def plot_parity(values: np.ndarray, errors: np.ndarray, experiment: np.ndarray, path: str | Path) -> Path:
    """Computed against measured hydration free energies, ``(n,)`` kcal/mol each (PNG)."""
    plt = pyplot()
    deviation = values - experiment
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.0, 4.0), layout="constrained")
        low, high = min(values.min(), experiment.min()) - 1, max(values.max(), experiment.max()) + 1
        axis.fill_between([low, high], [low - 1, high - 1], [low + 1, high + 1], color=GREY, alpha=0.12, linewidth=0)
        axis.plot([low, high], [low, high], color=GREY, linewidth=0.8)
        axis.errorbar(experiment, values, errors, fmt="o", color=BLUE, markersize=3.5, elinewidth=0.8, alpha=0.8)
        axis.set_xlim(low, high)
        axis.set_ylim(low, high)
        axis.set_aspect("equal")
        axis.set_xlabel("experiment (kcal/mol)")
        axis.set_ylabel("hydration free energy (kcal/mol)")
        mae, rmse = np.abs(deviation).mean(), np.sqrt(np.square(deviation).mean())
        axis.set_title(f"{len(values)} molecules: MAE {mae:.2f}, RMSE {rmse:.2f} kcal/mol")
    return save_figure(figure, path)
