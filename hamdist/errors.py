"""Every exception that hamdist raises on purpose.

    HamdistError
    ├── SettingsError      a settings file, an override or an argument is wrong
    ├── GraphError         the graph of blocks cannot run: names the blocks
    ├── LevelError         knobs of locality that do not fit together, or do not fit the graph
    ├── StreamError        a sample is unusable: names its index, or the file it comes from
    ├── BlockError         a block failed while it ran: names block and tick, carries its traceback
    │   ├── StampError     a signal other than the one that the schedule names arrived on an edge
    │   └── DivergedError  h, z, omega or the loss left the finite range: tick, block, quantity
    ├── WireError          bytes from a socket are no signal
    ├── StallError         no block moved for too long: names the edge that blocks
    ├── SnapshotError      a snapshot cannot be written, read, or gone on from: names the file
    └── ClusterError       Ray, an actor or a host failed or cannot take the run

A message says what was wrong (the field or file, and the value) and what to do about it.
`ChoiceWarning` and `Stop` are no errors: a warning that tells what hamdist has chosen, where it was
asked to; and how `on_progress` ends a run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


class HamdistError(Exception):
    """Root of the tree: catch this to catch whatever hamdist raises on purpose."""


class HamdistWarning(UserWarning):
    """What a run tells its user, also in `RunResult.warnings`: filter it by this class."""


class ChoiceWarning(HamdistWarning):
    """What hamdist has chosen where it was asked to (level 'auto'), and why."""


class Stop(Exception):
    """End the run now, and keep what it has learned: what `on_progress` returns, or raises."""


class SettingsError(HamdistError):
    """A settings file, an override or an argument is wrong."""


class GraphError(HamdistError):
    """The graph of blocks cannot run; found before anything starts."""


class LevelError(HamdistError):
    """Knobs of locality that do not fit together, or do not fit the graph."""


class StreamError(HamdistError):
    """A sample is unusable; the message names its index or its file."""


class BlockError(HamdistError):
    """A block failed while it ran.

    `block` and `tick` say where; `details` is the traceback of the process in which it happened.
    """

    def __init__(self, block: str, tick: int, message: str, details: str = "") -> None:
        super().__init__(f"block {block!r} failed at tick {tick}: {message}")
        self.block = block
        self.tick = tick
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[type[BlockError], tuple[str, int, str, str]]:
        return type(self), (self.block, self.tick, self.message, self.details)


class StampError(BlockError):
    """A signal other than the one that the schedule names arrived on an edge: a defect."""


class DivergedError(BlockError):
    """h, z, omega or the loss of a block left the finite range.

    quantity: 'h', 'z', 'omega' or 'loss'; norm: its own. cause: what it is likely to come from.
    result: the `RunResult` of what came before, its model with the weights that the blocks had then
    (the value was not used any more); None until `train` has made it.
    """

    def __init__(self, block: str, tick: int, quantity: str, norm: float, cause: str = "") -> None:
        behind = f": {cause}" if cause else ""
        super().__init__(block, tick, f"{quantity} left the finite range (norm {norm:.3g}){behind}")
        self.quantity = quantity
        self.norm = norm
        self.cause = cause
        self.outcome: Any = None
        self.result: Any = None

    def __reduce__(self) -> tuple[type[DivergedError], tuple[str, int, str, float, str]]:  # type: ignore[override]
        return type(self), (self.block, self.tick, self.quantity, self.norm, self.cause)


class WireError(HamdistError):
    """Bytes that came from a socket are no signal."""


class StallError(HamdistError):
    """No block moved for longer than the watchdog allows."""


class SnapshotError(HamdistError):
    """A snapshot cannot be written, read, or gone on from; the message names its file.

    full: it could not be written for want of room.
    """

    full: bool = False


class ClusterError(HamdistError):
    """Ray, an actor or a host failed, or cannot take the run."""


def need_package(module: str, package: str, use: str) -> None:
    """Check that an optional package is installed.

    Args:
        module: its name in an import.
        package: its name for pip.
        use: what needs it, as the beginning of a sentence.

    Raises:
        SettingsError: it is not; the message has the command that installs it.
    """
    if find_spec(module) is None:
        raise SettingsError(f"{use}: {package} is not installed: pip install {package}")


FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130  # exit codes of a command, and of a launched run


def exit_code(error: HamdistError) -> int:
    """What a command, or a launched run, ends with where `error` has ended it."""
    wrong = isinstance(error, (SettingsError, LevelError, GraphError))
    return WRONG_USAGE if wrong else FAILED
