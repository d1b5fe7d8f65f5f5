"""openmm-mlff: machine-learned force fields (MLFF) as OpenMM forces, and the tools that train them.

The way through the package is one arrow::

    model file -> Potential -> OpenMM Force -> System -> trajectory -> dataset -> training -> model file
                  potentials/  forces/        sampling/              data/       training/

Importing this package imports nothing else; OpenMM users only need ``from openmmml import MLPotential``.
"""

__version__ = "0.1.0"
