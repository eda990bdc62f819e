"""The command `hamdist`: the only place that prints, reads argv, or decides an exit code.

One file a command, or a few alike. Results go to standard output; progress, warnings and errors to
standard error. Exit codes: 0 done, 1 a run failed, 2 wrong settings or usage, 130 ended by Ctrl-C.
torch and all that needs it are imported when a command runs, so that `hamdist --help` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hamdist.cli.process import main

if TYPE_CHECKING:
    from hamdist.cli.commands import app

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'hamdist.cli' has no attribute {name!r}")
    from hamdist.cli.commands import app

    return app
