"""The driver of a launched run, on the cluster: `python -m hamdist.launch.job`, in the parcel.

Its standard output is the job's log, where it tells what happens (events.py). SIGTERM, which is how
Ray's Jobs API stops a job, ends the stream as the first Ctrl-C does in a terminal; what the run has
reached by then is its result.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType

from hamdist.config import Settings
from hamdist.errors import BlockError, HamdistError, LevelError, SettingsError
from hamdist.launch.events import (
    Ended,
    Event,
    Kept,
    Pace,
    Reached,
    Said,
    Started,
    file_events,
    moved,
    to_line,
)
from hamdist.launch.parcel import SETTINGS, Order, read_order
from hamdist.runtime.result import Progress
from hamdist.study.recipes import load_settings

FAILED, WRONG_SETTINGS, INTERRUPTED = 1, 2, 130


def main() -> int:
    """Runs the parcel in the current folder. Returns the exit code of `hamdist run`."""
    end_on_sigterm()
    try:
        ended = _run(Path.cwd())
    except (SettingsError, LevelError) as error:
        ended = Ended(code=WRONG_SETTINGS, error=str(error))
    except BlockError as error:
        ended = Ended(code=FAILED, error=str(error), details=error.details)
    except HamdistError as error:
        ended = Ended(code=FAILED, error=str(error))
    except KeyboardInterrupt:
        ended = Ended(code=INTERRUPTED, interrupted=True, error="stopped before its first tick")
    tell(ended)
    return ended.code


def _run(folder: Path) -> Ended:
    order = read_order(folder)
    here = [{"engine": {"address": os.environ.get("RAY_ADDRESS", "auto")}}]
    settings = load_settings(str(folder / SETTINGS), here)
    factory = None
    if order.model is not None:
        from hamdist.models import load_factory

        factory = load_factory(order.model)
    tell(Started(title=f"{settings.name}, {settings.level.value}", batch=settings.stream.batch))

    from hamdist.study.runs import run_level
    from hamdist.study.save import save_run
    from hamdist.study.table import run_facts

    with warnings.catch_warnings():
        warnings.showwarning = _warn
        run, model = run_level(settings, factory=factory, on_progress=_Teller())
    title = f"{settings.name}: {run.level} on {run.engine}, seed {run.seed}"
    tell(Reached(title=title, facts=run_facts(run)))
    for warning in dict.fromkeys(run.warnings):
        if warning != run.failure:
            tell(Said(warning=warning))
    with _Results(order) as results:
        save_run(results, run, model, _without_address(settings))
        _hand_over(results, order)
    code = FAILED if run.failure is not None else INTERRUPTED if run.interrupted else 0
    return Ended(code=code, samples=run.samples, interrupted=run.interrupted, error=run.failure)


def _without_address(settings: Settings) -> Settings:
    """As the user can run them again, from elsewhere."""
    engine = settings.engine.model_copy(update={"address": None})
    return settings.model_copy(update={"engine": engine})


class _Results:
    """The folder that the results are written to: in the shared storage, or else a temporary one,
    which goes when all of it has been handed over."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._folder = Path()

    def __enter__(self) -> Path:
        if self._order.storage is None:
            self._folder = Path(mkdtemp(prefix=f"hamdist-{self._order.id}-"))
            return self._folder
        self._folder = Path(self._order.storage) / self._order.id
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"storage: {str(self._folder)!r} cannot be written on {socket.gethostname()}: "
                f"{error.strerror or error}"
            ) from None
        return self._folder

    def __exit__(self, *_: object) -> None:
        largest = max((f.stat().st_size for f in self._folder.iterdir()), default=0)
        if self._order.storage is not None or largest > self._order.most:
            tell(Kept(host=socket.gethostname(), folder=str(self._folder)))
        else:
            shutil.rmtree(self._folder)


def _hand_over(folder: Path, order: Order) -> None:
    for path in sorted(folder.iterdir()):
        for event in file_events(path, order.most):
            tell(event)


class _Teller:
    """Passes a run's progress on, less and less often; a phase of its start at once."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        end_on_sigterm()
        if progress.phase is not None or self._pace.due(time.monotonic() - self._began):
            tell(moved(progress))


def end_on_sigterm() -> None:
    """SIGTERM counts as Ctrl-C from here on. Ray puts its own handler there whenever it starts (it
    ends the process at once), so this is called again now and then; a handler of somebody else is
    left alone."""
    now = signal.getsignal(signal.SIGTERM)
    if now is signal.SIG_DFL or getattr(now, "__module__", "").startswith("ray."):
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """What Ctrl-C would do. It is called, not sent: Ray's jobs begin with SIGINT blocked."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    tell(Said(warning=str(message)))


def tell(event: Event) -> None:
    """One write, so that no other thread's output comes between."""
    data = (to_line(event) + "\n").encode("ascii")
    sys.stdout.flush()
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main())
