"""Potential -> OpenMM Force -> System.

The one bridge to OpenMM: the PythonForce callable, the implementation behind `openmmml.MLPotential`, embeddings, safe
serialization, and an ASE calculator over the same potentials.
"""
