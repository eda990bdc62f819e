"""Faults at chosen places of a run, for scripts/chaos and scripts/soak: what fails and when
(events.py), a small network in which it happens (net.py), the process that trains it (drive.py),
and the one that watches and repairs what a process cannot do to itself (watch.py)."""
