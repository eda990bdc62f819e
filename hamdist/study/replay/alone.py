"""One block alone, replayed from its snapshot and a record of the signals that it took.

A run keeps no signals. A rewind, which steps the whole network once, can write those that one block
took from the snapshot on; from then on the block is replayed without the others, as often as one
likes, with another version of its code or on another host: what it takes stays the same to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from hamdist.dynamics.saved_state.stateful import Packing, check_names
from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import SettingsError
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import order_of, run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.process.threads import torch_threads
from hamdist.runtime.signals.sent_log import SentLog
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.snapshots.process_snapshots import ProcessSnapshots
from hamdist.runtime.storage.snapshot_files import from_bytes, to_bytes
from hamdist.study.replay.replay import Reached, RecordedRun, Replay, from_snapshot, replay_at
from hamdist.study.shared.result_folder import write_file

FIELDS = ("block", "began", "last", "signals")


def write_signals(file: Path, seen: Replay) -> None:
    """Write what a replay has recorded of its block: a safetensors file."""
    began = None if seen.began is None else seen.began.tick
    content = dict(zip(FIELDS, (seen.block, began, int(seen.last), seen.record), strict=True))
    packing = Packing()
    data = packing.packed(content)
    write_file(file, to_bytes(data, packing.tensors))


def _read(file: Path) -> dict[str, Any]:
    """Return the content of such a file. Raises SettingsError, SnapshotError for another one."""
    try:
        content = from_bytes(file.read_bytes(), str(file))
    except OSError as error:
        raise SettingsError(f"--signals {str(file)!r}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"--signals {str(file)!r}: no file that --record has written")
    check_names(f"--signals {str(file)!r}", content, FIELDS)
    return content


class _Recorded:
    """The transport of a block alone: hands out what was recorded; what it sends goes nowhere."""

    def __init__(self, signals: Mapping[str, list[Signal]]) -> None:
        self._left = {key: deque(queue) for key, queue in signals.items()}

    def send(self, channel: Channel, *signals: Signal) -> None:
        pass

    def receive(self, channel: Channel, stamp: Stamp) -> Signal:  # noqa: ARG002
        left = self._left.get(channel.key)
        if not left:
            raise Aborted  # (the record is over)
        return left.popleft()


def alone(run: RecordedRun, file: Path, block: str, tick: int) -> Replay:
    """Replay one block up to a tick, with the signals of a file.

    Raises SettingsError as `rewind`, and if the file is of another block, of earlier ticks, or of a
    snapshot that is gone.
    """
    content = _read(file)
    began, last = content["began"], content["last"]
    if content["block"] != block or tick > last or (began is not None and tick < began):
        raise SettingsError(
            f"--signals {str(file)!r} has what block {content['block']!r} took at ticks "
            f"{began or 0} to {last}, not block {block!r} up to tick {tick}"
        )
    snapshot = None if began is None else run.latest_before(began)
    if began is not None and (snapshot is None or snapshot.tick != began):
        raise SettingsError(f"--signals {str(file)!r} begins at a snapshot of tick {began}: gone")
    plan, _, seen = from_snapshot(run, snapshot, tick, tick, block)
    sent_log = None if snapshot is None else SentLog({block}, replays=False)
    mailbox = Mailbox({block}, _Recorded(content["signals"]), sent_log, seen)
    with suppress(Aborted, Reached), torch_threads(plan.engine.threads):
        node = make_node(plan, block, mailbox)
        if snapshot is not None and sent_log is not None:
            with closing(ProcessSnapshots(plan, [node], mailbox, sent_log)) as saved:
                saved.restore(snapshot)
        run_loop(
            [node],
            lambda: None,
            started=snapshot is not None,
            after_step=seen.after_step,
            order=order_of(plan, [block]),
        )
    return replay_at(seen, tick)
