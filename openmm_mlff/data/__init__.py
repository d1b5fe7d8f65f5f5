"""structures, labels, files -> datasets and model files.

`structures` holds the two records that travel through the whole package: `Structure` (one molecule or
box, numpy, with its labels) and `Batch` (many of them, torch, with their pair lists). Units: angstrom,
eV, e. This package imports no sibling but `openmm_mlff.units`.
"""
