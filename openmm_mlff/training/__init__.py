"""dataset -> training -> model file.

Training methods that work for any potential; only models live in plugins.
"""
