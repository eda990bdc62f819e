"""What becomes of what is raised: one message, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hamdist.cli.console import complain
from hamdist.errors import INTERRUPTED, BlockError, HamdistError, exit_code


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what hamdist raises on purpose, and Ctrl-C, into one message and an exit code."""
    try:
        yield
    except HamdistError as error:
        if isinstance(error, BlockError) and error.details:
            complain(error.details.rstrip())
        complain(f"Error: {error}")
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        complain("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
