"""model file -> Potential.

The interface that every model family implements, its neighbour lists, and terms that families share.
"""
