"""System -> trajectory.

Simulations that can be interrupted and resumed, their reporters and guards.
"""
