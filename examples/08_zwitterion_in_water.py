"""Glycine in water: how much lower than the neutral molecule is the zwitterion, and what does water do to it?

    python examples/08_zwitterion_in_water.py --ps 20 --processes 4 [--induced]
    python examples/08_zwitterion_in_water.py --quick

Glycine is the ML region, the water TIP3P, with electrostatic embedding: the model's charges, which change as the proton
moves, feel those of the water. Umbrella windows lead the proton from the nitrogen to an oxygen (d(N-H) - d(O-H)) and
then turn the hydroxyl group away from the nitrogen, without which the neutral molecule is not at rest: that turn limits
the reaction in water (Chem. Phys. Lett. 321, 433 (2000)). MBAR makes a profile and a free-energy difference of all
windows, with error bars. Three protons and two oxygens make six neutral molecules, of which one is sampled; of the
zwitterion that sixth counts in which the same proton and oxygen are nearest to each other. The model's charges are
those of the isolated molecule, however it is bent: water does not polarise them, beyond what it does to the geometry,
unless --induced gives the atoms induced dipoles. GFN2-xTB, which taught the model, has the zwitterion too high even in
implicit water, where experiment has it about 7 kcal/mol below the neutral molecule: what comes out, and why, is in
docs/spookynet_bio.md.

In vacuum there is no zwitterion: the example lets one go, with the model and, where tblite is installed, with GFN2-xTB.
With tblite it also says what GFN2-xTB would change in the energies of the sampled frames, and compares with GFN2-xTB in
the implicit water ALPB.

Every window is kept as it goes, so a run that was stopped goes on, and one with more --ps too. 20 ps in each of 24
windows take about half an hour of one core (--processes shares them); --quick shows the machinery in seconds, and its
numbers mean nothing. Needs pymbar (`pip install "openmm-mlff[analysis]"`), and tblite (`pip install
"openmm-mlff[label]"`) for the comparisons.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from openmm import CustomBondForce, System, Vec3, unit
from openmm.app import PME, Element, ForceField, Modeller, PDBFile, Topology
from openmmml import MLPotential
from scipy.optimize import minimize

from openmm_mlff.analysis.free_energy import LEAST_OVERLAP, InsufficientOverlap
from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.analysis.plots import BLUE, GREY, STYLE, pyplot, save_figure
from openmm_mlff.analysis.umbrella import Bias, Reweighted
from openmm_mlff.data.reference import LabelError, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import find_family, load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.umbrella import UmbrellaSettings, WindowRun, sample_windows
from openmm_mlff.sampling.umbrella_bias import UmbrellaWindow, proton_transfer, torsion
from openmm_mlff.units import BOLTZMANN_EV

TEMPERATURE = 298.15  # K
KT = 0.0019872042586 * TEMPERATURE  # kcal/mol
EV = 23.060548  # kcal/mol
#: induced dipoles as in docs/embedding.md, where they were chosen with another model (SO3LR) in mind
INDUCTION: dict[str, Any] = {
    "dampingLength": 0.129,
    "polarizabilities": {"H": 0.310, "C": 1.092, "N": 0.666, "O": 0.610},
    "inductionDamping": 1.62,
}
NAMES = ("N", "CA", "C", "O1", "O2", "H1", "H2", "H3", "HA1", "HA2")
NUMBERS = np.array([7, 6, 6, 8, 8, 1, 1, 1, 1, 1])
BONDS = ((0, 1), (1, 2), (2, 3), (2, 4), (0, 5), (0, 6), (0, 7), (1, 8), (1, 9))
#: the zwitterion in implicit water (GFN2-xTB), angstrom
ZWITTERION = np.array(
    [[-1.326, 0.598, 0.222], [0.0, 0.0, 0.0], [1.046, 1.024, 0.592], [0.513, 2.047, 1.078], [2.242, 0.732, 0.522],
     [-1.03, 1.51, 0.704], [-1.916, 0.049, 0.849], [-1.825, 0.806, -0.644], [0.231, -0.139, -1.053],
     [0.131, -0.947, 0.517]]
)  # fmt: skip
N, CA, C, O1, O2, PROTON = 0, 1, 2, 3, 4, 5
PROTONS = (PROTON, 6, 7)
#: sigma (nm) and epsilon (kJ/mol) of amber14, the same wherever the proton is
LENNARD_JONES = {
    "N": (0.32500, 0.71128),
    "CA": (0.33997, 0.45773),
    "C": (0.33997, 0.35982),
    "O": (0.29599, 0.87864),
    "H": (0.10691, 0.06569),
    "HA": (0.19600, 0.06569),
}
EnergyAndForces = Callable[[np.ndarray], tuple[float, np.ndarray]]


# -- the system --------------------------------------------------------------------------------------------------


def model_path(model: str) -> Path:
    """A file, or a model that the package ships."""
    shipped = [m for m in find_family("spookynet").bundled if m.name == model]
    path = shipped[0].path if shipped else Path(model)
    if not path.is_file():
        raise SystemExit(f"There is no file at {path}; --model names a model file, or a model that the package ships.")
    return path


def structure(positions: np.ndarray) -> Structure:
    return Structure(NUMBERS, positions)


def charges(potential: Potential) -> np.ndarray:
    """Charges of the model, halfway between zwitterion and neutral molecule: those of the periodic images."""
    moved = ZWITTERION.copy()
    bond = ZWITTERION[PROTON] - ZWITTERION[O1]
    moved[PROTON] = ZWITTERION[O1] + 0.98 * bond / np.linalg.norm(bond)
    found = potential.evaluate(potential.batch([structure(ZWITTERION), structure(moved)])).charges
    if found is None:
        raise SystemExit("This model predicts no charges, which electrostatic embedding needs.")
    return found.double().numpy().reshape(2, -1).mean(axis=0)


def glycine() -> Topology:
    topology = Topology()
    residue = topology.addResidue("GLZ", topology.addChain())
    elements = (Element.getByAtomicNumber(int(z)) for z in NUMBERS)
    atoms = [topology.addAtom(name, element, residue) for name, element in zip(NAMES, elements, strict=True)]
    for i, j in BONDS:
        topology.addBond(atoms[i], atoms[j])
    return topology


def force_field(image_charges: np.ndarray) -> ForceField:
    """TIP3P, and what the water needs to know of glycine."""
    types, atoms, parameters = [], [], []
    for name, z, charge in zip(NAMES, NUMBERS, image_charges, strict=True):
        element = Element.getByAtomicNumber(int(z))
        sigma, epsilon = LENNARD_JONES[name.rstrip("123")]
        mass = element.mass.value_in_unit(unit.dalton)
        types.append(f'<Type name="glz-{name}" class="glz-{name}" element="{element.symbol}" mass="{mass}"/>')
        atoms.append(f'<Atom name="{name}" type="glz-{name}" charge="{charge:.6f}"/>')
        parameters.append(f'<Atom type="glz-{name}" sigma="{sigma}" epsilon="{epsilon}"/>')
    bonds = "".join(f'<Bond from="{i}" to="{j}"/>' for i, j in BONDS)
    xml = f"""<ForceField>
    <AtomTypes>{"".join(types)}</AtomTypes>
    <Residues><Residue name="GLZ">{"".join(atoms)}{bonds}</Residue></Residues>
    <NonbondedForce coulomb14scale="0.8333333333333334" lj14scale="0.5">
    <UseAttributeFromResidue name="charge"/>{"".join(parameters)}</NonbondedForce>
    </ForceField>"""
    return ForceField("amber14/tip3p.xml", StringIO(xml))


def in_water(
    path: Path, potential: Potential, side: float, induced: bool = False
) -> tuple[Topology, System, np.ndarray]:
    """Topology, system and positions (angstrom) of glycine in a box of water.

    Hydrogens of 8 amu allow a time step of 2 fs; free energies of classical particles do not depend on masses.
    """
    field = force_field(charges(potential))
    modeller = Modeller(glycine(), 0.1 * ZWITTERION * unit.nanometer)
    modeller.addSolvent(field, model="tip3p", boxSize=Vec3(side, side, side) * unit.nanometer)
    mm = field.createSystem(
        modeller.topology, nonbondedMethod=PME, nonbondedCutoff=min(0.9, 0.45 * side) * unit.nanometer
    )  # fmt: skip
    atoms = list(range(len(NUMBERS)))
    maker = MLPotential(potential.family, modelPath=str(path))
    more = INDUCTION if induced else {}
    system = maker.createMixedSystem(modeller.topology, mm, atoms, embedding="electrostatic", charge=0, **more)
    # the other protons stay at the nitrogen, and this one does not go to the other oxygen: one of six neutral molecules
    walls = CustomBondForce("0.5*40000*min(r-0.14,0)^2")
    for proton in PROTONS:
        for oxygen in (O1, O2):
            if (proton, oxygen) != (PROTON, O1):
                walls.addBond(proton, oxygen)
    system.addForce(walls)
    for i in np.flatnonzero(NUMBERS == 1):
        system.setParticleMass(int(i), 8.0)
    return modeller.topology, system, np.array(modeller.positions.value_in_unit(unit.angstrom))


def path_of_windows(transfers: int, turns: int) -> list[UmbrellaWindow]:
    """The zwitterion at rest, the proton on its way, and the turn of the hydroxyl group."""
    windows = [UmbrellaWindow("zwitterion", (Bias(-4.0, -0.7, 5.0), None))]
    centers = np.linspace(-0.75, 0.75, transfers)
    # a free particle would spread over 0.6 of the way to the next window, or 0.33 where barriers are steeper
    stiffness = BOLTZMANN_EV * TEMPERATURE / (0.6 * (centers[1] - centers[0])) ** 2
    for center in centers:
        windows.append(UmbrellaWindow(f"transfer{center:+.3f}", (Bias.umbrella(float(center), stiffness), None)))
    centers = np.linspace(0.0, 180.0, turns)
    stiffness = BOLTZMANN_EV * TEMPERATURE / (0.33 * (centers[1] - centers[0])) ** 2
    for center in centers:
        turn = Bias.umbrella(float(center), stiffness, 360.0)
        windows.append(UmbrellaWindow(f"turn{center:.0f}", (Bias(0.5, 5.0, 5.0), turn)))
    return windows


# -- what comes out ----------------------------------------------------------------------------------------------


@dataclass
class Regions:
    """Which frames are which molecule, by coordinates of all frames.

    `nearest` says where, of the three protons and two oxygens, those that react are nearest to each other: in a sixth
    of the zwitterion, however seldom it turns.
    """

    transfer: np.ndarray
    turn: np.ndarray
    nearest: np.ndarray

    @property
    def masks(self) -> dict[str, np.ndarray]:
        neutral, towards = self.transfer >= 0, self.turn < 90
        return {
            "zwitterion": ~neutral & self.nearest,
            "neutral, hydroxyl group towards the nitrogen": neutral & towards,
            "neutral, hydroxyl group turned away": neutral & ~towards,
        }


def regions_of(frames: np.ndarray) -> Regions:
    """Of positions ``(n, 10, 3)`` angstrom."""
    apart = np.linalg.norm(frames[:, PROTONS, None] - frames[:, None, (O1, O2)], axis=-1).reshape(len(frames), -1)
    n, o = (np.linalg.norm(frames[:, PROTON] - frames[:, i], axis=1) for i in (N, O1))
    return Regions(n - o, np.abs(dihedral(frames, np.array([[CA, C, O1, PROTON]]))[:, 0]), apart.argmin(1) == 0)


def show_windows(windows: list[UmbrellaWindow], runs: list[WindowRun]) -> None:
    print("window           d(N-H) - d(O-H)      turn   uncertainty of a force")
    for window, run in zip(windows, runs, strict=True):
        unsure = f"{np.mean(run.spreads):.2f} eV/Å" if np.isfinite(run.spreads).all() else "-"
        transfer, turn = run.values[:, 0], np.abs(run.values[:, 1])
        print(f"{window.name:16s} {transfer.mean():+7.2f} +- {transfer.std():.2f} Å  {turn.mean():6.0f}°   {unsure}")


def report(samples: Reweighted, regions: Regions) -> dict[str, list[float]]:
    """Free energies and their standard errors, kcal/mol, by name."""
    zwitterion, *neutral = regions.masks.values()
    all_neutral = samples.difference(zwitterion, neutral[0] | neutral[1])
    found = {"neutral less zwitterion": list(all_neutral.times(KT))}
    if all(mask.any() for mask in neutral):
        found["hydroxyl group turned away less towards"] = list(samples.difference(*neutral).times(KT))
    found |= barriers(samples, regions)
    print("free energies in water:")
    for name, (value, error) in found.items():
        print(f"  {name:40s} {value:+.2f} +- {error:.2f} kcal/mol")
    return found


def barriers(samples: Reweighted, regions: Regions) -> dict[str, list[float]]:
    """Of the transfer from both sides, with errors; empty where the free energy has no maximum on the way."""
    zwitterion, towards, _ = regions.masks.values()
    shown, edges = zwitterion | towards, np.arange(-0.9, 1.11, 0.1)
    height = samples.profile(regions.transfer, edges, inside=shown).delta
    inside = np.where(np.isfinite(height), height, -np.inf)[3:17]  # -0.6 to 0.8 angstrom
    top = int(inside.argmax()) + 3
    if not 3 < top < 16:
        return {}

    def of_bin(k: int) -> np.ndarray:
        return shown & (regions.transfer >= edges[k]) & (regions.transfer < edges[k + 1])

    left, right = int(np.nanargmin(height[:top])), top + 1 + int(np.nanargmin(height[top + 1 :]))
    ends = {"barrier from zwitterion": left, "barrier from neutral": right}
    return {name: list(samples.difference(of_bin(k), of_bin(top)).times(KT)) for name, k in ends.items()}


def draw(samples: Reweighted, regions: Regions, path: Path) -> None:
    """Free energy along the transfer, and along the turn of the neutral molecule, with two standard errors."""
    plt = pyplot()
    zwitterion, towards, away = regions.masks.values()
    low, high = np.percentile(regions.transfer[zwitterion | towards], [0.2, 99.8])
    panels = (
        (regions.transfer, np.arange(low, high, 0.1), zwitterion | towards, "the proton moves"),
        (regions.turn, np.arange(0.0, 181.0, 10.0), towards | away, "the hydroxyl group turns"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), constrained_layout=True, sharey=True)
        for axis, (coordinate, edges, shown, title) in zip(axes, panels, strict=True):
            profile = samples.profile(coordinate, edges, inside=shown, zero=shown)
            known = np.isfinite(profile.delta)
            x, y = profile.centers[known], (profile.delta[known] - profile.delta[known].min()) * KT
            spread = 2 * profile.error[known] * KT
            axis.fill_between(x, y - spread, y + spread, color=BLUE, alpha=0.25, linewidth=0)
            axis.plot(x, y, color=BLUE, linewidth=1.5)
            axis.set_title(title, pad=16)
        axes[0].axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        for name, at in (("zwitterion", -0.06), ("neutral", 0.06)):
            side = "right" if at < 0 else "left"
            axes[0].text(at, 1.02, name, transform=axes[0].get_xaxis_transform(), ha=side, color=GREY)
        axes[0].set(xlabel="d(N-H) - d(O-H) [Å]", ylabel="free energy [kcal/mol]")
        axes[1].set(xlabel="torsion C-C-O-H [°]", xticks=range(0, 181, 45))
        save_figure(figure, path)


# -- what GFN2-xTB says ------------------------------------------------------------------------------------------


def of_model(potential: Potential) -> EnergyAndForces:
    """Energy (eV) and forces of one geometry in vacuum."""
    evaluator = potential.evaluator(potential.batch([structure(ZWITTERION)]), ("energy", "forces"), compile="auto")

    def energy_and_forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
        energies, forces = evaluator.arrays(positions)
        return float(energies[0]), forces

    return energy_and_forces


def relaxed(method: EnergyAndForces, positions: np.ndarray) -> tuple[np.ndarray, float]:
    """A minimum downhill of a geometry, and its energy in eV."""

    def downhill(x: np.ndarray) -> tuple[float, np.ndarray]:
        energy, forces = method(x.reshape(-1, 3))
        return energy, -forces.ravel()

    found = minimize(downhill, positions.ravel(), jac=True, method="L-BFGS-B", options={"gtol": 2e-3, "maxiter": 200})
    return found.x.reshape(-1, 3), float(found.fun)


def let_go(methods: dict[str, EnergyAndForces]) -> dict[str, list[float]]:
    """The zwitterion without water: energy that it gains (kcal/mol), N-H and O-H distance (angstrom)."""
    found = {}
    for name, method in methods.items():
        before, (after, energy) = method(ZWITTERION)[0], relaxed(method, ZWITTERION)
        n, o = (float(np.linalg.norm(after[PROTON] - after[i])) for i in (N, O1))
        print(f"  {name:10s} {(energy - before) * EV:+6.1f} kcal/mol; then N-H {n:.2f} Å, O-H {o:.2f} Å")
        found[name] = [(energy - before) * EV, n, o]
    return found


def compare(samples: Reweighted, regions: Regions, frames: np.ndarray, model: EnergyAndForces) -> dict[str, float]:
    """GFN2-xTB on 20 frames of every window, ``(N, 10, 3)``: its energies in vacuum, and minima in implicit water."""
    teacher = TBLite().driver(structure(ZWITTERION))
    ends = np.cumsum(samples.counts)
    spread = [np.linspace(e - n, e - 1, min(n, 20)).astype(int) for n, e in zip(samples.counts, ends, strict=True)]
    chosen, shift = np.zeros(len(frames), dtype=bool), np.zeros(len(frames))
    chosen[np.concatenate(spread)] = True
    for k in np.flatnonzero(chosen):
        x = frames[k].astype(np.float64)
        shift[k] = (teacher(x)[0] - model(x)[0]) * EV
    zwitterion, *neutral = regions.masks.values()
    found = {
        "energies of GFN2-xTB, first order": samples.mean(shift, chosen & (neutral[0] | neutral[1]))
        - samples.mean(shift, chosen & zwitterion)
    }
    print(f"energies of GFN2-xTB instead of the model's: {found['energies of GFN2-xTB, first order']:+.1f} kcal/mol")
    print("minima of GFN2-xTB in the implicit water ALPB:")
    implicit = TBLite(solvent="water").driver(structure(ZWITTERION))
    minima = []
    for mask in regions.masks.values():
        some = np.flatnonzero(chosen & mask)
        for k in some[:: max(1, len(some) // 6)]:
            try:
                minima.append(relaxed(implicit, frames[k].astype(np.float64)))
            except LabelError as error:
                print(f"  left out, a frame on whose way down {error}")
    if not minima:
        return found
    # a frame near the border of two regions may end in the other one, and every zwitterion will do
    reached, energies = regions_of(np.array([x for x, _ in minima])), np.array([e for _, e in minima])
    reached.nearest[:] = True
    for name, mask in reached.masks.items():
        if mask.any():
            found[f"{name}, ALPB"] = float(energies[mask].min() - energies.min()) * EV
            print(f"  {name:46s} {found[f'{name}, ALPB']:+5.1f} kcal/mol")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="spookynet-gfn2-bio", help="a model file, or one that the package ships")
    parser.add_argument("--ps", type=float, default=20.0, help="in each window, after 3 to find its place")
    parser.add_argument("--windows", type=int, default=13, help="while the proton moves")
    parser.add_argument("--turns", type=int, default=10, help="windows while the hydroxyl group turns")
    parser.add_argument("--side", type=float, default=2.0, help="of the box of water in nm")
    parser.add_argument("--processes", type=int, default=1, help="windows at once")
    parser.add_argument("--induced", action="store_true", help="water induces dipoles on the atoms of glycine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps in few windows: a test of the machinery")
    parser.add_argument("--output", type=Path, default=Path("zwitterion"), help="folder")
    args = parser.parse_args()
    settings = UmbrellaSettings(
        temperature=TEMPERATURE, timestep=2.0, pull=1.0, equilibration=3.0, length=args.ps, interval=0.04,
        stretch=5.0, seed=args.seed,
    )  # fmt: skip
    if args.quick:
        settings = replace(settings, pull=0.04, equilibration=0.0, length=0.08, interval=0.004, minimization_steps=20)
        args.windows, args.turns, args.side = 4, 3, 1.5

    # 1. The model, alone: in vacuum the proton leaves.
    path = model_path(args.model)
    potential = load_potential(path)
    methods = {"model": of_model(potential)}
    tblite = importlib.util.find_spec("tblite") is not None
    if tblite:
        methods["GFN2-xTB"] = TBLite().driver(structure(ZWITTERION))
    print("the zwitterion, let go in vacuum:")
    results: dict[str, Any] = {"model": path.name, "induced": args.induced, "in vacuum": let_go(methods)}

    # 2. In water, window by window.
    topology, system, positions = in_water(path, potential, args.side, args.induced)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "start.pdb").open("w", encoding="utf-8") as file:
        PDBFile.writeFile(topology, 0.1 * positions, file)
    coordinates = (proton_transfer(N, PROTON, O1), torsion(CA, C, O1, PROTON, name="turn"))
    windows = path_of_windows(args.windows, args.turns)
    print(f"{len(windows)} windows of {settings.length:g} ps, {system.getNumParticles()} atoms")
    runs = sample_windows(
        system, positions, coordinates, windows, settings, args.output, record=range(len(NUMBERS)),
        processes=args.processes, progress=not args.quick, say=print,
    )  # fmt: skip
    show_windows(windows, runs)

    # 3. All windows together.
    try:
        samples = Reweighted.of(
            [w.biases for w in windows], [run.values for run in runs], TEMPERATURE,
            least_overlap=None if args.quick else LEAST_OVERLAP, names=[w.name for w in windows],
        )  # fmt: skip
    except InsufficientOverlap as error:
        raise SystemExit(f"no free energy: {error}") from None
    frames = np.concatenate([run.recorded for run in runs])
    regions = regions_of(frames)
    results |= {"windows": len(windows), "ps": settings.length, "in water": report(samples, regions)}
    draw(samples, regions, args.output / "profile.png")
    if tblite:
        results["compared"] = compare(samples, regions, frames, methods["model"])
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"windows and picture: {args.output}")


if __name__ == "__main__":
    main()
