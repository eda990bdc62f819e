"""Exceptions that end a wait: the run was called off, or another thread has a request."""

from __future__ import annotations


class Aborted(Exception):
    """Raised when the run is called off while this process waits."""


class Interrupted(Exception):
    """Raised to leave a blocked call because another thread has a request (`ThreadCalls.serve`)."""
