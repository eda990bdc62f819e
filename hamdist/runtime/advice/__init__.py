"""Warnings to the user before and after a run."""
