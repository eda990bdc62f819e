"""A run of a model written down as a program, which can be cut and sliced."""
