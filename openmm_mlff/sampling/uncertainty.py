"""Uncertainty of a running simulation -> a table, by a reporter for OpenMM's own loops or with a run in a folder.

Both read what the forces of an ensemble kept from their last evaluation; nothing is evaluated for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openmm
from openmm import app

from openmm_mlff.forces import running
from openmm_mlff.sampling.reporters import Table

HEADER = "step,time_ps,energy_uncertainty_eV,largest_force_uncertainty_eV_A,atom"


class UncertaintyTable(Table):
    """One row per frame: step, time, uncertainty of the energy (eV), of the worst force (eV/angstrom), and its atom.

    Args:
        path: of the CSV file.
        keep: rows up to this step stay; None starts a new file.

    Raises `ValueError` if the file to go on from has other columns.
    """

    def __init__(self, path: str | Path, keep: int | None = None) -> None:
        super().__init__(path, HEADER, keep)

    def write(self, step: int, time_ps: float, system: openmm.System) -> None:
        """Append the row of the last evaluation of a system's forces; atom indices are those of the system.

        An ensemble that has fallen back to another model has no uncertainty: ``nan`` and atom -1.
        """
        found = running.most_uncertain(system)
        values = "nan,nan,-1" if found is None else f"{found[0]:.6g},{found[1]:.6g},{found[2]}"
        self._append(f"{step},{time_ps:.6f},{values}")


class UncertaintyReporter:
    """Reporter for `openmm.app.Simulation`: writes an `UncertaintyTable` while it runs.

    It asks for the energy, as OpenMM's StateDataReporter does, so that the row belongs to the frame that is reported.

    Args:
        file: path of the CSV file. reportInterval: steps. append: go on with the rows that the file has.

    Raises `ValueError` for an interval that is not a positive whole number; and at the first report, if no force of the
    simulation is an ensemble.
    """

    def __init__(self, file: str | Path, reportInterval: int, append: bool = False) -> None:
        if isinstance(reportInterval, bool) or not isinstance(reportInterval, int) or reportInterval < 1:
            raise ValueError(f"reportInterval: expected a whole number of steps >= 1, got {reportInterval!r}")
        self._interval = reportInterval
        self._table = UncertaintyTable(file, keep=2**62 if append else None)
        self._checked = False

    def describeNextReport(self, simulation: app.Simulation) -> dict[str, Any]:
        """What OpenMM asks a reporter before it makes the steps up to the next report."""
        steps = self._interval - simulation.currentStep % self._interval
        return {"steps": steps, "periodic": None, "include": ["energy"]}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Append a row."""
        if not self._checked and running.most_uncertain(simulation.system) is None:
            raise ValueError("simulation: expected a force of an ensemble, whose members disagree, found none")
        self._checked = True
        self._table.write(simulation.currentStep, state.getTime()._value, simulation.system)

    def __del__(self) -> None:
        if hasattr(self, "_table"):
            self._table.close()
