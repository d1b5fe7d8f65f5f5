"""size of a system -> OpenMM platform and its settings."""

from __future__ import annotations

import os
from dataclasses import dataclass

import openmm

#: below this number of particles the Reference platform is the faster one (0.4 us against 20 us per step and more).
REFERENCE_BELOW = 100
#: up to this number of particles the CPU platform gets one thread: the model takes most of the time, and one thread
#: gives the same bits every time.
ONE_THREAD_UP_TO = 3000


@dataclass(frozen=True)
class PlatformChoice:
    """A platform by name with its properties.

    Attributes:
        inexact: why two runs with the same seeds can differ in the last bits; empty if they cannot.
    """

    name: str
    properties: dict[str, str]
    inexact: str = ""

    @property
    def platform(self) -> openmm.Platform:
        return openmm.Platform.getPlatform(self.name)


def choose_platform(n_particles: int, name: str | None = None, threads: int | None = None) -> PlatformChoice:
    """The platform asked for, or the one for this size: CUDA or HIP where there is a device, else Reference or CPU.

    OpenCL is used only when asked for by name, because its device may be the processor. Raises `ValueError` for an
    unknown platform.
    """
    known = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if name is not None:
        by_lower = {k.lower(): k for k in known}
        if name.lower() not in by_lower:
            raise ValueError(f"platform: expected one of {', '.join(known)}, got {name!r}")
        name = by_lower[name.lower()]
    else:
        gpu = next((p for p in ("CUDA", "HIP") if p in known and _has_device(p)), None)
        name = gpu or ("Reference" if n_particles < REFERENCE_BELOW else "CPU")
    if threads is not None and name != "CPU":
        raise ValueError(f"threads: the {name} platform has none to set; expected platform CPU")
    if name == "Reference":
        return PlatformChoice(name, {})
    if name == "CPU":
        threads = threads or (1 if n_particles <= ONE_THREAD_UP_TO else len(os.sched_getaffinity(0)))
        inexact = "" if threads == 1 else "the CPU platform adds forces in a random order with more than one thread"
        return PlatformChoice(name, {"Threads": str(threads), "DeterministicForces": "true"}, inexact)
    understood = openmm.Platform.getPlatform(name).getPropertyNames()
    wanted = {"Precision": "mixed", "DeterministicForces": "true"}
    properties = {key: value for key, value in wanted.items() if key in understood}
    return PlatformChoice(name, properties, "the model's own sums on a GPU have no fixed order")


def choose_for_many(system: openmm.System, name: str | None = None, threads: int | None = None) -> PlatformChoice:
    """The platform asked for, or the one for many molecules that do not see one another.

    Bonded forces and integration cost 0.09 us per particle and step on Reference and on one thread of CPU alike, and
    CPU adds 60 us per step (measured for 6 beads times 16 to 512), so Reference is chosen unless a force with
    neighbour lists wants CPU, or there is a GPU.
    """
    choice = choose_platform(system.getNumParticles(), name, threads)
    lists = any(isinstance(force, openmm.CustomNonbondedForce) for force in system.getForces())
    if name is None and threads is None and choice.name == "CPU" and not lists:
        return choose_platform(system.getNumParticles(), "Reference")
    return choice


def _has_device(name: str) -> bool:
    system = openmm.System()
    system.addParticle(1.0)
    try:
        openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform(name))
    except openmm.OpenMMException:
        return False
    return True
