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
    ├── SnapshotError      a snapshot cannot be written, read, or resumed from: names the file
    └── ClusterError       Ray, an actor or a host failed or cannot take the run

A message says what was wrong (the field or file, and the value) and what to do about it.
`ChoiceWarning` and `Stop` are no errors: the first is a warning that reports a choice which the
settings left to hamdist, the second is how `on_progress` ends a run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


class HamdistError(Exception):
    """Root of all exceptions that hamdist raises on purpose.

    Attributes:
        result: of an error that ended a run behind its first sample, the `RunResult` up to there,
            its model with the weights that the blocks had then; of a comparison its runs.
        details: the traceback of a block's failure; '' of other errors.
    """

    result: Any = None
    details: str = ""


class HamdistWarning(UserWarning):
    """Warning of a run, also listed in `RunResult.warnings`: the class to filter by."""


class ChoiceWarning(HamdistWarning):
    """Warning that reports, with reasons, a choice that was left to hamdist (level 'auto')."""


class Stop(Exception):
    """Request of `on_progress`, returned or raised, to end the run and keep what it has learned."""


class TakeSnapshot:
    """Request of `on_progress`, returned, for a snapshot soon, where the run takes some."""


class SettingsError(HamdistError):
    """Error in a settings file, an override or an argument."""


class GraphError(HamdistError):
    """The graph of blocks cannot run; raised before anything starts."""


class LevelError(HamdistError):
    """Knobs of locality do not fit together, or do not fit the graph."""


class StreamError(HamdistError):
    """A sample is unusable; the message names its index or its file."""


class BlockError(HamdistError):
    """A block failed while it ran.

    Attributes:
        block: name of the block.
        tick: tick at which it failed.
        message: the cause, without block and tick.
        details: traceback of the process in which it happened.
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

    Attributes:
        quantity: 'h', 'z', 'omega' or 'loss'.
        norm: the norm of that quantity.
        cause: the likely cause. (`result` has the weights from before: the value was not used.)
    """

    def __init__(self, block: str, tick: int, quantity: str, norm: float, cause: str = "") -> None:
        behind = f": {cause}" if cause else ""
        super().__init__(block, tick, f"{quantity} left the finite range (norm {norm:.3g}){behind}")
        self.quantity = quantity
        self.norm = norm
        self.cause = cause

    def __reduce__(self) -> tuple[type[DivergedError], tuple[str, int, str, float, str]]:  # type: ignore[override]
        return type(self), (self.block, self.tick, self.quantity, self.norm, self.cause)


class WireError(HamdistError):
    """Bytes that came from a socket are no signal."""


class StallError(HamdistError):
    """No block moved for longer than the watchdog allows."""


class SnapshotError(HamdistError):
    """A snapshot cannot be written, read, or resumed from; the message names its file.

    Attributes:
        full: True if it could not be written for lack of space.
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
    """Return the exit code of a command, or of a launched run, that `error` has ended."""
    wrong = isinstance(error, (SettingsError, LevelError, GraphError))
    return WRONG_USAGE if wrong else FAILED
