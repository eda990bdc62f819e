"""What becomes of what is raised: one message, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hamdist.cli.console import complain
from hamdist.errors import BlockError, GraphError, HamdistError, LevelError, SettingsError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what hamdist raises on purpose, and Ctrl-C, into one message and an exit code."""
    try:
        yield
    except (SettingsError, LevelError, GraphError) as error:
        complain(f"Error: {error}")
        raise typer.Exit(WRONG_USAGE) from None
    except BlockError as error:
        if error.details:
            complain(error.details.rstrip())
        complain(f"Error: {error}")
        raise typer.Exit(FAILED) from None
    except HamdistError as error:
        complain(f"Error: {error}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        complain("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
