"""Exceptions that end a wait: the run was called off, or another thread has a request."""

from __future__ import annotations


class Aborted(Exception):
    """The run was called off while this process waited."""


class Interrupted(Exception):
    """A blocked call was left, because somebody has asked for something (`Requests.serve`)."""
