"""a model potential in two dimensions -> an OpenMM System of many walkers -> trajectories and first-passage times.

    potential = MuellerBrown()
    frames = run_walkers(potential, n_walkers=32, n_frames=12001, spacing=0.5, settings=WalkerSettings(seed=1))
    watched = watch_cores(potential, ELLIPSES, n_walkers=1000, duration=500.0, settings=WalkerSettings(seed=2))

The coordinates x and y are those of the potential; OpenMM takes them for nanometres, the energy for kJ/mol, the mass
for amu and the time for ps, so that kT = 15 is 1804.09 K. The Reference platform is the fastest for such particles: one
thread advances 9 million of them by a step per second, the CPU platform two thirds of that.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import openmm

from openmm_mlff.analysis.distributions import jackknife_ratio
from openmm_mlff.analysis.observables import Estimate
from openmm_mlff.analysis.passages import Core, Ellipse, FirstPassages, PassageWatch
from openmm_mlff.data.files import write_atomically
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

#: the thermal energy of the benchmark, and the temperature that OpenMM needs for it.
KT = 15.0
TEMPERATURE = KT / BOLTZMANN_KJ_PER_MOL
#: frames in one file of a resumable run.
CHUNK = 500
#: the two core sets of the benchmark: the lower right state (0) and the upper left one (1).
ELLIPSES = (
    Ellipse("0", centre=(0.45, 0.05), semi_axes=(0.35, 0.15)),
    Ellipse("1", centre=(-0.57, 1.45), semi_axes=(0.15, 0.30), angle=-45.0),
)


@dataclass(frozen=True)
class StationaryPoint:
    """A minimum or a saddle: where, how high, and how curved.

    Attributes:
        name: "A", "B", "C" for minima, "AC", "CB" for saddles. xy: ``(2,)``. energy: kJ/mol.
        eigenvalues: of the Hessian, ``(2,)``, ascending, kJ/mol/nm^2.
    """

    name: str
    xy: np.ndarray
    energy: float
    eigenvalues: np.ndarray


@dataclass(frozen=True)
class MuellerBrown:
    """The Mueller-Brown potential: V = sum_i A_i exp(a_i dx_i^2 + b_i dx_i dy_i + c_i dy_i^2), unscaled.

    Source: K. Mueller, L. D. Brown, Theor. Chim. Acta 1979, 53, 75, section 4.

    Attributes:
        height, a, b, c: A_i, a_i, b_i, c_i. x0, y0: the centres, dx_i = x - x0_i, dy_i = y - y0_i.
    """

    height: tuple[float, ...] = (-200.0, -100.0, -170.0, 15.0)
    a: tuple[float, ...] = (-1.0, -1.0, -6.5, 0.7)
    b: tuple[float, ...] = (0.0, 0.0, 11.0, 0.6)
    c: tuple[float, ...] = (-10.0, -10.0, -6.5, 0.7)
    x0: tuple[float, ...] = (1.0, 0.0, -0.5, -1.0)
    y0: tuple[float, ...] = (0.0, 0.5, 1.5, 1.0)

    #: near which the stationary points are looked for
    GUESSES = (
        ("A", (-0.558, 1.442)),
        ("B", (0.623, 0.028)),
        ("C", (-0.050, 0.467)),
        ("AC", (-0.822, 0.624)),
        ("CB", (0.212, 0.293)),
    )
    #: holds all but 1e-9 of the Boltzmann probability at kT = 15
    BOX = ((-3.5, 1.6), (-1.5, 3.2))

    def energy(self, xy: np.ndarray) -> np.ndarray:
        """V, ``(...)`` kJ/mol, at points ``(..., 2)``."""
        return self._terms(xy)[0].sum(axis=-1)

    def gradient(self, xy: np.ndarray) -> np.ndarray:
        """dV/d(x, y), ``(..., 2)`` kJ/mol/nm, at points ``(..., 2)``."""
        term, slope = self._terms(xy)
        return np.einsum("...i,...ik->...k", term, slope)

    def hessian(self, xy: np.ndarray) -> np.ndarray:
        """Second derivatives, ``(..., 2, 2)`` kJ/mol/nm^2, at points ``(..., 2)``."""
        term, slope = self._terms(xy)
        a, b, c = np.array(self.a), np.array(self.b), np.array(self.c)
        curvature = np.stack([np.stack([2.0 * a, b], axis=-1), np.stack([b, 2.0 * c], axis=-1)], axis=-1)
        return np.einsum("...i,...ijk->...jk", term, slope[..., :, None] * slope[..., None, :] + curvature)

    def _terms(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The four terms ``(..., 4)``, and the gradients of their exponents ``(..., 4, 2)``."""
        points = np.asarray(xy, dtype=np.float64)
        if points.shape[-1:] != (2,):
            raise ValueError(f"xy: expected points of shape (..., 2), got {points.shape}")
        a, b, c = np.array(self.a), np.array(self.b), np.array(self.c)
        dx, dy = points[..., :1] - np.array(self.x0), points[..., 1:] - np.array(self.y0)
        term = np.array(self.height) * np.exp(a * dx**2 + b * dx * dy + c * dy**2)
        return term, np.stack([2.0 * a * dx + b * dy, b * dx + 2.0 * c * dy], axis=-1)

    def stationary_points(self, tolerance: float = 1e-10) -> dict[str, StationaryPoint]:
        """The three minima and the two saddles, by Newton's method from the literature's figures.

        Raises `RuntimeError` if a gradient does not fall below `tolerance` (kJ/mol/nm).
        """
        found = {}
        for name, guess in self.GUESSES:
            xy = np.array(guess)
            for _ in range(50):
                gradient = self.gradient(xy)
                if np.linalg.norm(gradient) < tolerance:
                    break
                xy = xy - np.linalg.solve(self.hessian(xy), gradient)
            else:
                raise RuntimeError(f"stationary_points: Newton's method from {guess} did not converge")
            found[name] = StationaryPoint(name, xy, float(self.energy(xy)), np.linalg.eigvalsh(self.hessian(xy)))
        return found

    def boltzmann(self, kt: float = KT, bins: int = 1000) -> tuple[np.ndarray, np.ndarray]:
        """The Boltzmann distribution on a grid over `BOX`: centres ``(bins, bins, 2)`` and probabilities (sum one)."""
        x, y = (low + (high - low) * (np.arange(bins) + 0.5) / bins for low, high in self.BOX)
        points = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1)
        energy = self.energy(points)
        weight = np.exp(-(energy - energy.min()) / kt)
        return points, weight / weight.sum()

    def sample(self, n: int, random: np.random.Generator, kt: float = KT, bins: int = 1000) -> np.ndarray:
        """Independent points ``(n, 2)`` of the Boltzmann distribution, to the width of a grid cell."""
        points, probability = self.boltzmann(kt, bins)
        cell = random.choice(probability.size, size=n, p=probability.ravel())
        width = np.array([(high - low) / bins for low, high in self.BOX])
        return points.reshape(-1, 2)[cell] + width * random.uniform(-0.5, 0.5, size=(n, 2))

    # -- in OpenMM -------------------------------------------------------------------------------------------------

    def force(self, n_walkers: int, kz: float = 500.0) -> openmm.CustomExternalForce:
        """V(x, y) + kz z^2 on particles 0 to `n_walkers` - 1; kz in kJ/mol/nm^2 keeps them in the plane."""
        if n_walkers < 1:
            raise ValueError(f"n_walkers: expected at least 1, got {n_walkers}")
        terms = []
        for height, a, b, c, x0, y0 in zip(self.height, self.a, self.b, self.c, self.x0, self.y0, strict=True):
            dx, dy = f"(x-({x0!r}))", f"(y-({y0!r}))"
            mixed = f"+({b!r})*{dx}*{dy}" if b else ""
            terms.append(f"({height!r})*exp(({a!r})*{dx}^2{mixed}+({c!r})*{dy}^2)")
        force = openmm.CustomExternalForce(f"{' + '.join(terms)} + ({kz!r})*z^2")
        force.setName("MuellerBrown")
        for i in range(n_walkers):
            force.addParticle(i)
        return force

    def system(self, n_walkers: int, mass: float = 1.0) -> openmm.System:
        """A System of walkers that do not see one another; mass in amu."""
        if not mass > 0:
            raise ValueError(f"mass: expected a positive number (amu), got {mass!r}")
        system = openmm.System()
        for _ in range(n_walkers):
            system.addParticle(mass)
        system.addForce(self.force(n_walkers))
        return system


@dataclass(frozen=True)
class WalkerSettings:
    """How walkers are run.

    Attributes:
        timestep: ps. temperature: K. friction: 1/ps. mass: amu. discard: time before the first frame, ps.
        seed: of the starting points, velocities and the thermostat.

    Raises `ValueError` naming the field for numbers out of range.
    """

    seed: int
    timestep: float = 0.002
    temperature: float = TEMPERATURE
    friction: float = 1.0
    mass: float = 1.0
    discard: float = 100.0

    def __post_init__(self) -> None:
        for name in ("timestep", "temperature", "friction", "mass"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not self.discard >= 0:
            raise ValueError(f"discard: expected a time >= 0 (ps), got {self.discard!r}")

    def steps(self, name: str, time: float) -> int:
        """A time as a number of steps; raises `ValueError` naming the argument unless it is a whole one."""
        steps = round(time / self.timestep)
        if abs(steps * self.timestep - time) > 1e-6 * self.timestep * max(steps, 1):
            raise ValueError(f"{name}: expected a multiple of the time step {self.timestep} ps, got {time} ps")
        return steps

    def context(self, potential: MuellerBrown, n_walkers: int) -> openmm.Context:
        """Walkers at points of the Boltzmann distribution with velocities of Maxwell's, before `discard`."""
        random = np.random.default_rng(self.seed)
        kt = BOLTZMANN_KJ_PER_MOL * self.temperature
        integrator = openmm.LangevinMiddleIntegrator(self.temperature, self.friction, self.timestep)
        integrator.setRandomNumberSeed(int(random.integers(1, 2**31)))
        platform = openmm.Platform.getPlatform("Reference")
        context = openmm.Context(potential.system(n_walkers, self.mass), integrator, platform)
        starts = potential.sample(n_walkers, random, kt)
        context.setPositions(np.concatenate([starts, np.zeros((n_walkers, 1))], axis=1))
        context.setVelocities(np.sqrt(kt / self.mass) * random.standard_normal((n_walkers, 3)))
        return context


def run_walkers(
    potential: MuellerBrown,
    *,
    n_walkers: int,
    n_frames: int,
    spacing: float,
    settings: WalkerSettings,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Langevin dynamics of independent walkers; returns frames ``(n_walkers, n_frames, 2)``.

    Args:
        spacing: time between frames, ps; a multiple of the time step.
        folder: where chunks of frames and the state are kept; the same call goes on where an earlier one stopped, and
            gives the same frames as one that was never stopped.
        progress: called with the frames done and the frames wanted.

    Raises `ValueError` naming an argument out of range, or a `folder` that holds a run with other settings, and
    `FloatingPointError` if a walker leaves the finite numbers (the chunks before stay in `folder`).
    """
    for name, value in (("n_walkers", n_walkers), ("n_frames", n_frames)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    stride = settings.steps("spacing", spacing)
    if stride < 1:
        raise ValueError(f"spacing: expected at least one time step of {settings.timestep} ps, got {spacing} ps")
    context = settings.context(potential, n_walkers)
    steps = context.getIntegrator()
    plan = {"n_walkers": n_walkers, "spacing": spacing, **asdict(settings), "potential": asdict(potential)}
    chunks, saved = _chunks(Path(folder), plan) if folder is not None else ([], None)
    if saved is None:
        steps.step(settings.steps("discard", settings.discard))
    else:
        context.loadCheckpoint(saved)
    while (done := sum(chunk.shape[1] for chunk in chunks)) < n_frames:
        chunk = np.empty((n_walkers, min(CHUNK, n_frames - done), 2))
        for k in range(chunk.shape[1]):
            if done + k > 0:
                steps.step(stride)
            chunk[:, k] = _positions(context)
        if not np.isfinite(chunk).all():
            raise FloatingPointError(f"walkers: a position became NaN or infinite before frame {done + chunk.shape[1]}")
        if folder is not None:
            _write_chunk(Path(folder) / f"frames-{len(chunks):05d}.npz", chunk, context)
        chunks.append(chunk)
        if progress is not None:
            progress(done + chunk.shape[1], n_frames)
    return np.concatenate(chunks, axis=1)[:, :n_frames]


def _positions(context: openmm.Context) -> np.ndarray:
    return context.getState(positions=True).getPositions(asNumpy=True)._value[:, :2]


def _write_chunk(path: Path, frames: np.ndarray, context: openmm.Context) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, frames=frames, checkpoint=np.frombuffer(context.createCheckpoint(), dtype=np.uint8))
    write_atomically(path, buffer.getvalue())


def _chunks(folder: Path, plan: dict[str, object]) -> tuple[list[np.ndarray], bytes | None]:
    """The frames kept in `folder` and the state after them; writes the plan of a new run."""
    card = folder / "walkers.json"
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    if not card.exists():
        write_atomically(card, text.encode())
        return [], None
    if card.read_text(encoding="utf-8") != text:
        raise ValueError(f"folder: {folder.name} holds a run of walkers with other settings; expected an empty folder")
    chunks, saved = [], None
    for path in sorted(folder.glob("frames-*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            chunks.append(stored["frames"])
            saved = stored["checkpoint"].tobytes()
    return chunks, saved


@dataclass(frozen=True)
class Watched:
    """What `watch_cores` saw: passages by the names ``(start, end)``, and the mean potential energy, kJ/mol."""

    passages: dict[tuple[str, str], FirstPassages]
    energy: Estimate


def watch_cores(
    potential: MuellerBrown,
    cores: Sequence[Core],
    *,
    n_walkers: int,
    duration: float,
    settings: WalkerSettings,
    every: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Watched:
    """First passages between core sets, looked for after every `every` time steps while the walkers run.

    Args:
        duration: watched time of each walker after ``settings.discard``, ps. Walkers are followed from their start, so
            that nearly all of them come from a known core when counting begins.
        progress: called with the steps done and the steps wanted, now and then.

    The energy is that of looks about 0.5 ps apart, its error from the spread over walkers. Raises `ValueError` naming
    an argument out of range, and `FloatingPointError` if a walker leaves the finite numbers.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1 step, got {every}")
    before = settings.steps("discard", settings.discard) // every
    total = before + settings.steps("duration", duration) // every
    if total <= before:
        raise ValueError(f"duration: expected at least {every} time steps of {settings.timestep} ps, got {duration} ps")
    context = settings.context(potential, n_walkers)
    integrator = context.getIntegrator()
    watch = PassageWatch(cores, n_walkers)
    interval = every * settings.timestep
    sums, looks = np.zeros(n_walkers), 0
    stride = max(1, round(0.5 / interval))
    for k in range(total):
        if k == before:
            watch.forget()
        integrator.step(every)
        xy = _positions(context)
        watch.update(xy, (k + 1) * interval)
        if k >= before and (k - before) % stride == 0:
            energy = potential.energy(xy)
            if not np.isfinite(energy).all():
                raise FloatingPointError(f"walkers: a position became NaN or infinite before {(k + 1) * interval} ps")
            sums, looks = sums + energy, looks + 1
            if progress is not None:
                progress((k + 1) * every, total * every)
    return Watched(watch.passages(), jackknife_ratio(sums, np.full(n_walkers, float(looks))))
