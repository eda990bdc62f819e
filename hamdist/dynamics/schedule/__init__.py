"""WHEN: which block steps in which tick, at which level, and which signals it waits for."""
