"""The contract that every potential must pass, for the tests of this package and of third-party plugins.

Subclass `PotentialContract` in a test module, say how the model is made, and pytest collects the checks::

    from openmm_mlff.testing import PotentialContract

    class TestMyModel(PotentialContract):
        separable = False  # what the family does not promise, with the reason

        def make(self):
            return MyModel(MyConfig())  # any weights; float64

Every check compares with an independent truth: finite differences, symmetry, sums over periodic images by brute force,
or another route through the package. pytest itself is not needed: a check that does not apply raises
``unittest.SkipTest``. Units: angstrom, eV, e.
"""

from openmm_mlff.testing.lattice_sums import LatticeSums
from openmm_mlff.testing.mechanics import Mechanics
from openmm_mlff.testing.surroundings import Surroundings
from openmm_mlff.testing.usage import Usage


class PotentialContract(Mechanics, Surroundings, LatticeSums, Usage):
    """All checks; a subclass defines ``make``, and says what else is in `openmm_mlff.testing.base.ContractBase`."""


__all__ = ["PotentialContract"]
