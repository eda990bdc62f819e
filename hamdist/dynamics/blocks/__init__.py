"""WHAT a block computes in a step: the equations of h, z and theta, by presentation."""
