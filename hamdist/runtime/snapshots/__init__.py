"""Snapshots of a run: written by every process, completed, gone on from."""
