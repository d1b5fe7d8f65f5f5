"""The native generalised Born force against the one that `ForceField` writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.sampling.implicit_solvent import use_native_obc2


def capped_alanine(repository: Path, *implicit: str, **options: Any) -> tuple[openmm.System, np.ndarray]:
    """System and positions (nm)."""
    pdb = app.PDBFile(str(repository / "examples" / "recipes" / "capped_alanine.pdb"))
    system = app.ForceField("amber99sbildn.xml", *implicit).createSystem(pdb.topology, **options)
    return system, np.array(pdb.positions.value_in_unit(unit.nanometer))


def state_of(system: openmm.System, positions: np.ndarray) -> tuple[float, np.ndarray]:
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


@pytest.mark.parametrize("dielectrics", [{}, {"soluteDielectric": 2.0, "solventDielectric": 40.0}])
def test_energies_and_forces_stay(repository: Path, dielectrics: dict[str, float]) -> None:
    custom, positions = capped_alanine(repository, "implicit/obc2.xml", **dielectrics)
    native = copy.deepcopy(custom)
    use_native_obc2(native)
    names = [type(force).__name__ for force in native.getForces()]
    assert "GBSAOBCForce" in names and "CustomGBForce" not in names
    rng = np.random.default_rng(0)
    vacuum, _ = capped_alanine(repository)
    for _ in range(3):
        x = positions + 0.01 * rng.normal(size=positions.shape)
        (e1, f1), (e2, f2) = state_of(custom, x), state_of(native, x)
        solvation = e1 - state_of(vacuum, x)[0]
        assert solvation < -10
        # the two write the Coulomb constant with a different number of digits
        assert e2 - e1 == pytest.approx(0, abs=1e-5 * abs(solvation))
        np.testing.assert_allclose(f2, f1, atol=1e-4 * np.abs(f1).max())


@pytest.mark.parametrize(
    ("implicit", "options", "message"),
    [
        ((), {}, "expected one CustomGBForce .* got 0"),
        (("implicit/obc1.xml",), {}, "expected the OBC2 model"),
        (("implicit/gbn2.xml",), {}, "expected the parameters charge, or, sr"),
        (("implicit/obc2.xml",), {"implicitSolventKappa": 1.0 / unit.nanometer}, "expected no salt"),
        (("implicit/obc2.xml",), {"sasaMethod": None}, "expected the ACE surface-area term"),
        (
            ("implicit/obc2.xml",),
            {"nonbondedMethod": app.CutoffNonPeriodic},
            "expected generalised Born without a cutoff",
        ),
    ],
)
def test_other_models_are_refused(
    repository: Path, implicit: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    system, _ = capped_alanine(repository, *implicit, **options)
    with pytest.raises(ValueError, match=f"system: {message}"):
        use_native_obc2(system)
