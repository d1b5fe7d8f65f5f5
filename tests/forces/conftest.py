"""Small systems: a random SpookyNet that needs no data, and capped alanine in a box of TIP3P water."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_mlff.potentials.family import save_potential
from openmm_spookynet import SpookyNet, SpookyNetConfig

# ACE-ALA-NME near C7eq
ALANINE = """\
ATOM      1  CH3 ACE A   1      -3.280   0.410  -1.160  1.00  0.00           C
ATOM      2  C   ACE A   1      -2.210   0.390  -0.110  1.00  0.00           C
ATOM      3  O   ACE A   1      -2.180   1.200   0.810  1.00  0.00           O
ATOM      4 HH31 ACE A   1      -4.260   0.540  -0.680  1.00  0.00           H
ATOM      5 HH32 ACE A   1      -3.100   1.250  -1.850  1.00  0.00           H
ATOM      6 HH33 ACE A   1      -3.300  -0.520  -1.740  1.00  0.00           H
ATOM      7  N   ALA A   2      -1.280  -0.620  -0.280  1.00  0.00           N
ATOM      8  CA  ALA A   2      -0.060  -0.610   0.520  1.00  0.00           C
ATOM      9  CB  ALA A   2       0.410  -2.030   0.800  1.00  0.00           C
ATOM     10  C   ALA A   2       1.030   0.150  -0.260  1.00  0.00           C
ATOM     11  O   ALA A   2       1.010   0.240  -1.490  1.00  0.00           O
ATOM     12  H   ALA A   2      -1.160  -0.950  -1.230  1.00  0.00           H
ATOM     13  HA  ALA A   2      -0.240  -0.100   1.470  1.00  0.00           H
ATOM     14  HB1 ALA A   2       1.320  -2.040   1.400  1.00  0.00           H
ATOM     15  HB2 ALA A   2       0.630  -2.570  -0.130  1.00  0.00           H
ATOM     16  HB3 ALA A   2      -0.360  -2.600   1.330  1.00  0.00           H
ATOM     17  N   NME A   3       2.050   0.650   0.520  1.00  0.00           N
ATOM     18  C   NME A   3       3.090   1.460  -0.070  1.00  0.00           C
ATOM     19  H   NME A   3       1.860   0.780   1.500  1.00  0.00           H
ATOM     20  H1  NME A   3       3.910   1.550   0.640  1.00  0.00           H
ATOM     21  H2  NME A   3       3.450   0.990  -1.000  1.00  0.00           H
ATOM     22  H3  NME A   3       2.680   2.450  -0.300  1.00  0.00           H
END
"""


@dataclass
class Box:
    """A topology with its MM system and positions ``(n_atoms, 3)`` in nm."""

    topology: app.Topology
    system: openmm.System
    positions: np.ndarray

    @property
    def vectors(self) -> np.ndarray:
        return np.array(self.topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))


def small_spookynet(seed: int = 1, **config: object) -> SpookyNet:
    """Two narrow modules with random weights, in float64; every term is alive."""
    torch.manual_seed(seed)
    model = SpookyNet(SpookyNetConfig(**{"num_features": 16, "num_modules": 2, "num_random_features": 16, **config}))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            # parts that a fresh network switches off
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model() -> SpookyNet:
    return small_spookynet()


@pytest.fixture(scope="session")
def model_path(model: SpookyNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_potential(model, tmp_path_factory.mktemp("models") / "small.safetensors")


@pytest.fixture(scope="session")
def alanine() -> app.PDBFile:
    return app.PDBFile(StringIO(ALANINE))


@pytest.fixture(scope="session")
def solvated(alanine: app.PDBFile) -> Box:
    """Capped alanine in about 300 waters, PME; the first 22 atoms are the molecule."""
    field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = app.Modeller(alanine.topology, alanine.positions)
    modeller.addSolvent(field, model="tip3p", boxSize=openmm.Vec3(2.2, 2.2, 2.2) * unit.nanometer, neutralize=False)
    system = field.createSystem(
        modeller.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.9 * unit.nanometer,
        rigidWater=True,
        removeCMMotion=False,
    )
    return Box(modeller.topology, system, np.array(modeller.positions.value_in_unit(unit.nanometer)))


def topology_of(numbers: np.ndarray, box: np.ndarray | None = None) -> app.Topology:
    """A topology of one residue without bonds; box vectors in nm."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in numbers:
        topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue)
    if box is not None:
        topology.setPeriodicBoxVectors(box * unit.nanometer)
    return topology


def context_of(
    system: openmm.System, positions: np.ndarray, platform: str = "Reference", step: float = 0.0005
) -> openmm.Context:
    """A Context at `positions` (nm); skips the test where the platform is missing."""
    names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if platform not in names:
        pytest.skip(f"OpenMM finds no {platform} platform here (OpenCL on the CPU comes with pocl-opencl-icd)")
    context = openmm.Context(system, openmm.VerletIntegrator(step), openmm.Platform.getPlatform(platform))
    context.setPositions(positions)
    return context


def energy_of(context: openmm.Context) -> float:
    """kJ/mol"""
    return float(context.getState(energy=True).getPotentialEnergy()._value)


def forces_of(context: openmm.Context) -> np.ndarray:
    """kJ/mol/nm"""
    return np.array(context.getState(forces=True).getForces(asNumpy=True)._value)
