"""The driver of a launched run: `python -m hamdist.launch.driver [SIGNAL]`, in the package folder.

guardian.py starts it, and again if it was lost (SIGNAL ended the one before). Its standard output
is the job's log, into which it writes events (events.py). SIGINT is the first Ctrl-C of a terminal:
a snapshot, the end of the stream, and the state of the run by then is its result.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from hamdist.config import Settings
from hamdist.errors import (
    INTERRUPTED,
    HamdistError,
    SettingsError,
    SnapshotError,
    exit_code,
    need_package,
)
from hamdist.launch.events import (
    DriverLost,
    Ended,
    FilesStay,
    Listening,
    ResultValues,
    file_events,
    tell,
)
from hamdist.launch.package import SETTINGS, JobSpec, in_package, read_spec, with_names
from hamdist.runtime.results.events import RunBegun, Warned
from hamdist.runtime.results.result import Progress
from hamdist.runtime.results.run_events import ProgressEvents
from hamdist.study.shared.recipes import load_settings

if TYPE_CHECKING:
    from hamdist.models.build import ModelFactory


def main() -> int:
    """Run the package in the current folder. Returns the exit code of `hamdist run`."""
    _end_with_the_job()
    lost = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        ended = _run(Path.cwd(), lost)
    except HamdistError as error:
        ended = Ended(code=exit_code(error), error=str(error), details=error.details)
    except KeyboardInterrupt:
        ended = Ended(code=INTERRUPTED, interrupted=True, error="stopped before its first tick")
    tell(ended)
    return ended.code


def _run(folder: Path, lost: str | None) -> Ended:
    """Run the package; `lost` is the signal that ended the driver before this one."""
    spec = read_spec(folder)
    here = {"engine": {"address": os.environ.get("RAY_ADDRESS", "auto")}}
    as_sent = load_settings(str(folder / SETTINGS), [here])
    settings = in_package(as_sent)
    if spec.snapshots is not None:
        settings = settings.changed(snapshots={"path": spec.snapshots})
    from hamdist.study.run.own_data import load_functions

    own = load_functions(settings, spec.model, spec.stream)
    resume = spec.resume if lost is None else _found_again(spec, lost)
    batch = settings.stream.batch if own.data is None else None
    title = f"{settings.name}, {settings.level_name}"
    tell(RunBegun.of(_as_given(settings, as_sent), title, batch))
    if spec.live is not None:
        warnings.showwarning = _warn
        return _serve(spec, settings, own.model)

    from hamdist.study.report.save import save_run
    from hamdist.study.report.table import run_facts, run_title
    from hamdist.study.run.run import run_level

    with warnings.catch_warnings():
        warnings.showwarning = _warn
        show = _teller(settings)
        run, model = run_level(settings, own=own, on_progress=show, resume=resume, partial=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has ended; what is left is to hand it over
    if run.chosen is not None:
        run.chosen = _as_given(run.chosen, as_sent)
    code = INTERRUPTED if run.interrupted else 0
    code = code if run.error is None else exit_code(run.error)
    over = code == 0 and spec.own_snapshots  # (nobody goes on from them)
    if over:
        run.snapshots = []
    with _Results(spec) as results:
        save_run(results.path, run, model, _as_given(settings, as_sent))
        tell(ResultValues(title=run_title(run, settings.name), facts=run_facts(run)))
        for warning in dict.fromkeys(run.warnings):
            if warning != run.failure:
                _warn(warning)
        results.handed_over = _hand_over(results.path, spec)
    if over:
        shutil.rmtree(str(spec.snapshots), ignore_errors=True)
    return Ended(
        code=code,
        samples=run.samples,
        interrupted=run.interrupted,
        error=run.failure,
        details="" if run.error is None else run.error.details,
        resume=spec.called if run.interrupted and run.snapshots else None,
    )


def _serve(spec: JobSpec, settings: Settings, factory: ModelFactory | None) -> Ended:
    """Serve a live run until it is stopped; a driver that was lost goes on with its journal."""
    need_package("uvicorn", "'hamdist[serve]'", "`hamdist launch --live`")
    from hamdist.api import start
    from hamdist.serve import serving
    from hamdist.study.report.save import save_weights
    from hamdist.study.run.export import initial_model

    host, port = spec.live or ("", 0)
    network, first, classes = initial_model(settings, factory, spec.resume)
    with _Results(spec) as results:
        out = results.path
        begin: Any = {"example": first, "classes": classes, "out": out}
        begin["resume"] = out if (out / "journal.jsonl").exists() else None
        run = start(network, settings, **begin)
        try:
            with run, suppress(KeyboardInterrupt), serving(run, host, port, out=out) as served:
                show = _teller(settings)
                run.settle()  # Ray has set handlers of its own by then
                signal.signal(signal.SIGINT, signal.default_int_handler)
                tell(Listening(address=served.address, token=served.token))
                while run.running and not served.stopped.wait(1.0):
                    progress = run.status().progress
                    show(progress) if progress is not None else None
        finally:  # (also of a run that failed)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if run.result is not None:
                save_weights(out / "model.safetensors", run.result.model.state_dict())
                results.handed_over = _hand_over(out, spec)
    return Ended(code=0, samples=run.stop().samples)


def _found_again(spec: JobSpec, lost: str) -> str | None:
    """Return the snapshot from which the run resumes after its driver was lost, and report it. That
    is one of its own snapshots, else the one from which it began."""
    from hamdist.runtime.storage.snapshot_files import latest, snapshot_folders
    from hamdist.runtime.storage.store import storage

    for where in (spec.snapshots, spec.resume):
        if where is None:
            continue
        try:
            tick = latest(where, _warn).tick
        except SnapshotError:
            if where == spec.snapshots:  # lost before the first one was whole
                for folder in list(snapshot_folders(storage(where))):
                    storage(where).remove(folder)
            continue
        tell(DriverLost(signal=lost, tick=tick))
        return where
    tell(DriverLost(signal=lost, tick=0))
    return None


def _as_given(settings: Settings, as_sent: Settings) -> Settings:
    """Return the settings as the user can run them again, from elsewhere."""
    settings = settings.changed(engine={"address": None}, snapshots=as_sent.snapshots)
    learning = as_sent.learning
    return with_names(settings, learning.rules, as_sent.locality.level, learning.optimizer)


class _Results:
    """The folder of the results: in the shared storage, or else a temporary one, which is removed
    when all files have been transferred.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.path = Path()
        self.handed_over = False

    def __enter__(self) -> _Results:
        if self._spec.storage is None:
            self.path = Path(mkdtemp(prefix=f"hamdist-{self._spec.id}-"))
            return self
        self.path = Path(self._spec.storage) / self._spec.id
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"storage: {str(self.path)!r} cannot be written on {socket.gethostname()}: "
                f"{error.strerror or error}"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        largest = max((f.stat().st_size for f in _files(self.path)), default=0)
        if self._spec.storage or largest > self._spec.most or not self.handed_over:
            tell(FilesStay(host=socket.gethostname(), folder=str(self.path)))
        else:
            shutil.rmtree(self.path)


def _hand_over(folder: Path, spec: JobSpec) -> bool:
    """Return True if all files could be written into the log."""
    events = (event for path in _files(folder) for event in file_events(path, spec.most))
    return all(tell(event) for event in events)


def _files(folder: Path) -> list[Path]:
    """Return the files of the result, without the folder of snapshots beside them."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def _teller(settings: Settings) -> Callable[[Progress], None]:
    """Return a function that writes the events of a run's progress into the log."""
    events = ProgressEvents(settings.level_name, settings.seed)

    def note(progress: Progress) -> None:
        for event in events(progress):
            _warn(event.text) if isinstance(event, Warned) else tell(event)

    return note


def _end_with_the_job() -> None:
    """End this process when guardian.py ends, as it could not be stopped any more. Standard input
    is a pipe of guardian.py's, which closes with that process."""

    def listen() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=listen, name="hamdist-job", daemon=True).start()


_warned_of: set[str] = set()


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    if str(message) not in _warned_of:
        _warned_of.add(str(message))
        tell(Warned(text=str(message)))


if __name__ == "__main__":
    sys.exit(main())
