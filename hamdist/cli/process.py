"""The process of the command: its standard streams, and the signals that end it.

All else is imported inside.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import io
import os
import signal
import sys
import time
from types import FrameType
from typing import TextIO

from hamdist.errors import INTERRUPTED, WRONG_USAGE

PLAIN = {"•": "*", "·": "-", "–": "-", "→": "->", "±": "+-", "×": "x", "≤": "<=", "≥": ">="}
PLAIN |= {"τ": "tau", "η": "eta", "ω": "omega", "θ": "theta", "φ": "phi", "β": "beta"}


class SteadyFile(io.FileIO):
    """A standard stream that ignores errors of writing when it is full or closed.

    So the files of a run do not depend on who reads its output.

    Attributes:
        full: the latest error of a full disk.
    """

    full: OSError | None = None

    def write(self, data: object, /) -> int:
        """Write `data` (bytes-like), and return its length whatever becomes of it."""
        whole = memoryview(data)  # type: ignore[arg-type]
        try:
            return super().write(whole) or 0
        except OSError as error:
            self.full = error if error.errno in (errno.ENOSPC, errno.EDQUOT) else self.full
            return whole.nbytes


def replaced(error: UnicodeError) -> tuple[str, int]:
    """Return ASCII for the character that the terminal or log file cannot show (codecs' protocol).

    Raises the error where it is not one of writing.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return PLAIN.get(error.object[error.start], "?"), error.start + 1


def steady_streams() -> None:
    """Make standard output and error take any text, also where they are closed or full."""
    codecs.register_error("hamdist", replaced)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdout, sys.stderr = _steady(sys.stdout, 1), _steady(sys.stderr, 2)


def _steady(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(SteadyFile(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", None),
        errors="hamdist",
        line_buffering=number == 2 or os.isatty(number),
        write_through=getattr(stream, "write_through", False),
    )


class Interrupts:
    """A signal handler that raises KeyboardInterrupt, which an import may lose; `came`: it did."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def main() -> None:
    """Run the command in this process. Ctrl-C ends it with exit code 130, while it imports, too.

    So do SIGTERM and a terminal that closes: what it has begun to write is removed. While Python
    itself ends, they change the exit code no more.
    """
    interrupted = Interrupts()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupted)
            atexit.register(signal.signal, number, signal.SIG_IGN)
    try:
        steady_streams()
        try:
            os.getcwd()
        except FileNotFoundError:  # (Intel's MKL would end the process, with another reason)
            sys.stderr.write("Error: the current folder is gone; change to another one\n")
            sys.exit(WRONG_USAGE)

        import psutil

        from hamdist.cli.commands import app

        # A run's start-up counts from the start of this process, which its context passes on.
        app(obj=time.perf_counter() - (time.time() - psutil.Process().create_time()))
    except BaseException as error:
        # An import that is interrupted may end in another error, as that of numpy in torch.
        if not interrupted.came or isinstance(error, SystemExit):
            raise
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
