"""Blocks, edges, delays and shapes of a network, their checks, and the way back to one module."""
