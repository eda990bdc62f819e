"""The job of a launched run: `python -m hamdist.launch.guardian`, in the package folder.

A small process that starts the driver (driver.py) and outlives it:

    the driver ends with an exit code      so does the job
    a signal ends it that was not ours     another driver resumes from the run's snapshots
    SIGTERM (the Jobs API stops the job)   is SIGINT for the driver, as Ctrl-C in a terminal

Ray sends SIGTERM to the driver, too, and installs a handler of its own in every driver. So the
driver has SIGTERM blocked and SIGINT open (in Ray's jobs it is the other way round), and gets the
signal to end once, from here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from hamdist.errors import FAILED, INTERRUPTED, WRONG_USAGE, SettingsError
from hamdist.launch.package import SETTINGS, read_spec
from hamdist.runtime.process.portable import pin
from hamdist.study.shared.recipes import load_settings

DRIVER = (sys.executable, "-m", "hamdist.launch.driver")
MOST_LOST = 3
# A driver that has lived so long was well: what ends it is bad luck, not a defect.
WELL_SECONDS = 600.0
TOLD = (0, FAILED, WRONG_USAGE, INTERRUPTED)


class Guardian:
    """Restarts the driver of a run when it is lost.

    `command` starts a driver; its last argument is the signal that ended the one before, if there
    was one. `keeps_snapshots` says whether the run keeps snapshots.
    """

    def __init__(self, command: tuple[str, ...], keeps_snapshots: bool) -> None:
        self._command = command
        self._keeps_snapshots = keeps_snapshots
        self._driver: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Run until the last driver has ended, and return the exit code of the job."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        losses, lost = 0, ""
        while True:
            began = time.monotonic()
            code = self._start(lost).wait()
            if self._stopping:
                return self._stopped(code)
            if code >= 0:
                return code
            lost = signal.Signals(-code).name
            losses = 1 if time.monotonic() - began > WELL_SECONDS else losses + 1
            _new_line()
            if not self._keeps_snapshots:
                return _failed(
                    f"the driver was lost ({lost}), and the run keeps no snapshots to go on from: "
                    "give the cluster file a storage, or set snapshots.path"
                )
            if losses > MOST_LOST:
                return _failed(
                    f"the driver was lost {losses} times ({lost}): is there too little memory on "
                    "the head (dmesg)? The run can go on from its latest snapshot (--resume)"
                )

    def _start(self, lost: str) -> subprocess.Popen[bytes]:
        """Start a driver, and hold SIGTERM back until it can be forwarded."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        command = [*self._command, *([lost] if lost else [])]
        self._driver = subprocess.Popen(command, stdin=subprocess.PIPE)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return self._driver

    def _forward(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if self._driver is not None:
            self._driver.send_signal(signal.SIGINT)

    def _stopped(self, code: int) -> int:
        """Report the end of a driver that was stopped while it started."""
        if code in TOLD:
            return code
        from hamdist.launch.events import Ended, tell

        error = "stopped before its first tick"
        if code == -signal.SIGKILL:
            error = "the driver was lost while it was ending"
        _new_line()
        tell(Ended(code=INTERRUPTED, interrupted=True, error=error))
        return INTERRUPTED


def _new_line() -> None:
    """Begin a new line: the last output of a lost driver may be half a line."""
    with suppress(OSError):  # the log's disk is full
        os.write(1, b"\n")


def _failed(error: str) -> int:
    from hamdist.launch.events import Ended, tell  # (imports torch, which this process can spare)

    tell(Ended(code=FAILED, error=error))
    return FAILED


def main() -> int:
    """Run the package in this folder, and return the exit code."""
    try:
        spec = read_spec(Path.cwd())
        pin(load_settings(str(Path.cwd() / SETTINGS)).engine)  # for the driver, its child
    except SettingsError as error:
        return _failed(str(error))
    return Guardian(DRIVER, spec.snapshots is not None).run()


if __name__ == "__main__":
    sys.exit(main())
