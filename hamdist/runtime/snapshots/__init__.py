"""Snapshots of a run: written by every process, completed, and resumed from."""
