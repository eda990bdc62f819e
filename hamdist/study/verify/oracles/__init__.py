"""Oracles: golden trajectories, and whole networks by autograd."""
