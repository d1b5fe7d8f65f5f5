"""trajectory, labels -> numbers with error bars.

Errors against reference labels, observables, and plots.
"""
