"""two sets of torsions -> how far their free-energy landscapes are apart, with error bars.

The measures of coarse-grained models of peptides: mean square difference of the free energies (kT^2), Jensen-Shannon
and Kullback-Leibler divergence (nats), on a grid over two torsions. Error bars come from resampling whole blocks
(trajectories, or long pieces of one), because frames of one trajectory are correlated.

Angles in degrees in [-180, 180); free energies in kT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from openmm_mlff.analysis.observables import Estimate, ramachandran_histogram

#: bins per torsion.
BINS = 30
#: reference counts from which a bin enters the free-energy errors.
LEAST_COUNTS = 5.0
#: samples that an empty bin of the simulation is taken to hold.
EMPTY = 0.5


@dataclass(frozen=True)
class Histogram:
    """Probabilities on the grid, and how many independent weights they stand for.

    Attributes:
        probability: ``(bins, bins)``, first axis the first torsion; sums to one.
        samples: number of frames; with weights w their effective number (sum w)^2 / sum w^2 (Kish).
    """

    probability: np.ndarray
    samples: float

    @property
    def counts(self) -> np.ndarray:
        """Effective counts: what an unweighted run of `samples` frames would be expected to find."""
        return self.probability * self.samples


@dataclass(frozen=True)
class Sample:
    """Torsions of one block (a trajectory, or a piece of one) with the weights of its frames.

    Attributes:
        phi, psi: ``(n,)`` degrees. weights: ``(n,)``, or None for equal ones; on one scale for all blocks.
    """

    phi: np.ndarray
    psi: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = np.shape(self.phi)
        if len(n) != 1 or n[0] == 0 or np.shape(self.psi) != n:
            raise ValueError(
                f"phi, psi: expected the same positive number of samples, got {n} and {np.shape(self.psi)}"
            )
        if not (np.isfinite(self.phi).all() and np.isfinite(self.psi).all()):
            raise ValueError("phi, psi: expected finite angles (degrees), got NaN or infinity")
        if self.weights is not None:
            if np.shape(self.weights) != n:
                raise ValueError(f"weights: expected {n[0]}, one per sample, got shape {np.shape(self.weights)}")
            if not (np.isfinite(self.weights).all() and np.min(self.weights) >= 0 and np.sum(self.weights) > 0):
                raise ValueError("weights: expected finite numbers >= 0, at least one of them positive")

    def __len__(self) -> int:
        return len(self.phi)

    def pieces(self, n: int) -> list[Sample]:
        """The block cut into `n` pieces of neighbouring frames."""
        if not 1 <= n <= len(self):
            raise ValueError(f"n: expected from 1 to {len(self)} pieces, got {n}")
        cuts = np.array_split(np.arange(len(self)), n)
        return [Sample(self.phi[c], self.psi[c], None if self.weights is None else self.weights[c]) for c in cuts]


@dataclass(frozen=True)
class Difference:
    """How far a landscape is from the reference.

    Attributes:
        mse_weighted: sum p (dF)^2, p the reference probability in the bins compared; kT^2.
        mse: mean of (dF)^2 over these bins; kT^2. Rarely visited bins and the rule for empty ones dominate it.
        js: Jensen-Shannon divergence over all bins, nats. kl: Kullback-Leibler divergence of the reference from the
            other, in the bins compared, nats.
        bins: how many were compared.
    """

    mse_weighted: float
    mse: float
    js: float
    kl: float
    bins: int


class _Cells:
    """Grid sums of blocks, so that resampled histograms need no second look at the frames."""

    def __init__(self, samples: Sequence[Sample], bins: int) -> None:
        if len(samples) == 0:
            raise ValueError("samples: expected at least one block, got none")
        weights = [np.ones(len(s)) if s.weights is None else np.asarray(s.weights, dtype=float) for s in samples]
        totals = [float(w.sum()) for w in weights]
        self.sums = np.stack(
            [
                ramachandran_histogram(s.phi, s.psi, bins, w) * t
                for s, w, t in zip(samples, weights, totals, strict=True)
            ]
        )
        self.total = np.array(totals)
        self.squares = np.array([float((w**2).sum()) for w in weights])

    def histogram(self, multiplicity: np.ndarray | None = None) -> Histogram:
        m = np.ones(len(self.total)) if multiplicity is None else multiplicity
        total = float(m @ self.total)
        return Histogram(np.tensordot(m, self.sums, 1) / total, total**2 / float(m @ self.squares))


def histogram(samples: Sequence[Sample] | Sample, bins: int = BINS) -> Histogram:
    """The histogram of one or several blocks."""
    return _Cells([samples] if isinstance(samples, Sample) else samples, bins).histogram()


def difference(simulated: Histogram, reference: Histogram, least_counts: float = LEAST_COUNTS) -> Difference:
    """Compare two histograms.

    Free energies F = -ln p are compared in the bins where the reference has at least `least_counts` (effective)
    counts; bins that the simulation never entered count as holding half a sample; dF is shifted to zero mean, weighted
    by the reference probability.

    Raises `ValueError` for grids that differ, or a reference without such bins.
    """
    if simulated.probability.shape != reference.probability.shape:
        raise ValueError(
            f"simulated: expected the reference's grid {reference.probability.shape}, got {simulated.probability.shape}"
        )
    compared = reference.counts >= least_counts
    if not compared.any():
        raise ValueError(f"reference: expected bins with at least {least_counts} counts, found none")
    p = reference.probability[compared]
    q = simulated.probability[compared]
    q = np.where(q > 0, q, EMPTY / simulated.samples)
    p, q = p / p.sum(), q / q.sum()
    d = np.log(p) - np.log(q)
    d -= p @ d
    return Difference(
        mse_weighted=float(p @ d**2),
        mse=float(np.mean(d**2)),
        js=_jensen_shannon(simulated.probability, reference.probability),
        kl=float(p @ (np.log(p) - np.log(q))),
        bins=int(compared.sum()),
    )


def _jensen_shannon(a: np.ndarray, b: np.ndarray) -> float:
    middle = 0.5 * (a + b)

    def relative_entropy(x: np.ndarray) -> float:
        there = x > 0
        return float(np.sum(x[there] * np.log(x[there] / middle[there])))

    return 0.5 * (relative_entropy(a) + relative_entropy(b))


@dataclass(frozen=True)
class Comparison:
    """A difference, and 95 % bootstrap intervals ``(low, high)`` of each of its measures."""

    value: Difference
    intervals: dict[str, tuple[float, float]]


def compare(
    simulated: Sequence[Sample],
    reference: Sequence[Sample],
    *,
    bins: int = BINS,
    least_counts: float = LEAST_COUNTS,
    resamples: int = 500,
    seed: int = 0,
) -> Comparison:
    """`difference` of two sets of blocks, with intervals from resampling blocks of both.

    Resampling adds as much noise as the data have, and squared differences grow with noise; the intervals are moved
    down by this mean excess, so that they lie about the value. The noise in the value itself stays: the floor of
    `split_half` belongs beside it.
    """
    a, b = _Cells(simulated, bins), _Cells(reference, bins)
    value = difference(a.histogram(), b.histogram(), least_counts)
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {f.name: [] for f in fields(Difference) if f.name != "bins"}
    for _ in range(resamples):
        drawn = a.histogram(_resampled(rng, len(simulated))), b.histogram(_resampled(rng, len(reference)))
        d = difference(*drawn, least_counts)
        for name, values in found.items():
            values.append(getattr(d, name))
    intervals = {}
    for name, values in found.items():
        excess = max(0.0, float(np.mean(values)) - getattr(value, name))
        low, high = _interval(values)
        intervals[name] = (max(0.0, low - excess), high - excess)
    return Comparison(value, intervals)


def _resampled(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.multinomial(n, np.full(n, 1.0 / n)).astype(float)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def split_half(
    blocks: Sequence[Sample], *, bins: int = BINS, least_counts: float = LEAST_COUNTS, splits: int = 50, seed: int = 0
) -> Comparison:
    """The floor: one random half of the blocks against the other, averaged over `splits` ways to halve them.

    The intervals are those of a single split. Raises `ValueError` for fewer than two blocks.
    """
    if len(blocks) < 2:
        raise ValueError(f"blocks: expected at least two, got {len(blocks)}")
    cells = _Cells(blocks, bins)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        first = np.zeros(len(blocks))
        first[rng.permutation(len(blocks))[: len(blocks) // 2]] = 1.0
        found.append(difference(cells.histogram(first), cells.histogram(1.0 - first), least_counts))
    names = [f.name for f in fields(Difference) if f.name != "bins"]
    columns = {name: [getattr(d, name) for d in found] for name in names}
    mean = {name: float(np.mean(values)) for name, values in columns.items()}
    value = Difference(**mean, bins=int(np.mean([d.bins for d in found])))
    return Comparison(value, {name: _interval(values) for name, values in columns.items()})


def population(blocks: Sequence[Sample], region: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
    """Share of the (weighted) frames in a region, with the jackknife error over blocks.

    Args:
        region: ``(phi, psi) -> bool`` per frame, for example ``lambda phi, psi: phi > 0``.
    """
    inside, total = [], []
    for block in blocks:
        w = np.ones(len(block)) if block.weights is None else np.asarray(block.weights, dtype=float)
        inside.append(float(w[region(block.phi, block.psi)].sum()))
        total.append(float(w.sum()))
    x, t = np.array(inside), np.array(total)
    value, n = float(x.sum() / t.sum()), len(blocks)
    if n < 2:
        return Estimate(value, float("nan"), float(n))
    left_out = (x.sum() - x) / (t.sum() - t)
    return Estimate(value, float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))), float(n))


def chiral_volume(positions: np.ndarray, atoms: Sequence[int]) -> np.ndarray:
    """Handedness of a centre with three neighbours: (a-c) . ((b-c) x (d-c)) with unit vectors.

    Args:
        positions: ``(..., n_atoms, 3)``. atoms: centre c and neighbours a, b, d. For an L amino acid the order CA, N,
            C, CB gives a positive number, for its mirror image a negative one.

    Returns ``(...)`` between -1 and 1; zero where the four lie in a plane.
    """
    c, a, b, d = (np.asarray(positions)[..., i, :] for i in atoms)
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (a - c, b - c, d - c)]
    return np.sum(unit[0] * np.cross(unit[1], unit[2]), axis=-1)


def decorrelation_time(runs: Sequence[np.ndarray], interval: float) -> float:
    """Twice the integrated autocorrelation time of angles: how long a run takes for one independent sample.

    The autocorrelation of exp(i angle) about its mean over all runs, averaged over the runs and summed to its first
    zero; with a common mean, slow exchange between basins counts even if single runs stay in one.

    Args:
        runs: ``(n_frames,)`` degrees each. interval: time between frames, in the unit of the result.
    """
    if not runs or any(np.ndim(r) != 1 or len(r) < 2 for r in runs):
        raise ValueError("runs: expected one-dimensional series of at least two frames")
    points = [np.exp(1j * np.radians(r)) for r in runs]
    mean = np.concatenate(points).mean()
    longest = min(len(p) for p in points)
    correlation, pairs = np.zeros(longest), np.zeros(longest)
    for p in points:
        x, n = p - mean, len(p)
        spectrum = np.abs(np.fft.fft(x, 2 ** int(np.ceil(np.log2(2 * n))))) ** 2
        correlation += np.fft.ifft(spectrum).real[:longest]
        pairs += n - np.arange(longest)
    correlation /= pairs
    if correlation[0] < 1e-20:  # unit vectors that differ by rounding only
        return interval
    correlation /= correlation[0]
    below = np.flatnonzero(correlation <= 0)
    last = int(below[0]) if len(below) else longest
    return interval * max(1.0, float(1.0 + 2.0 * correlation[1:last].sum()))
