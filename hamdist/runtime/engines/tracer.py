"""Records a trace of one process: its nodes' methods are wrapped, so that others pay nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hamdist.dynamics.graph.graph import INPUT
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.results.trace import TraceSpan

# What blocks do, by method; `move` is of their weights.
PHASES = {
    **{name: name for name in ("forward", "backward", "tick")},
    "read": "forward, loss and backward",
    "learn": "local readout",
    "complete": "costate",
    "end": "update",
}


class Tracer:
    """Keeps the spans of the last `ticks` ticks in `spans`.

    Args:
        ticks: that are kept.
        nodes: of the process.
        mailbox: of the process.
        writer: of snapshots, if there is one.
    """

    def __init__(self, ticks: int, nodes: Sequence[Any], mailbox: Mailbox, writer: Any) -> None:
        self.spans: deque[TraceSpan] = deque()
        self._ticks = ticks
        self._offset = time.time() - time.perf_counter()
        self._wrap(mailbox, "post", lambda channel, signal: (
            channel.sender, f"send {channel}", signal.stamp.tick, f">{_id(channel, signal.stamp)}"
        ))  # fmt: skip
        self._wrap(mailbox, "take", lambda channel, stamp, tick: (
            channel.receiver, f"wait for {channel}", tick, f"<{_id(channel, stamp)}"
        ))  # fmt: skip
        for node in nodes:
            if node.name == INPUT:
                self._wrap(node, "_draw", lambda n, node=node: (INPUT, "draw", node.tick or n))
                continue
            owners = [(node.block, method, name) for method, name in PHASES.items()]
            for owner, method, name in [*owners, (node.block.weights, "move", "update")]:
                if callable(getattr(owner, method, None)):
                    label = lambda *_, n=node, name=name, **__: (n.name, name, n.event.tick)  # noqa: E731
                    self._wrap(owner, method, label)
        if writer is not None:
            self._wrap(writer, "reach", lambda tick: ("snapshots", "snapshot", tick))

    def _wrap(self, owner: Any, method: str, described: Callable[..., tuple[Any, ...]]) -> None:
        act = getattr(owner, method)

        def timed(*arguments: Any, **more: Any) -> Any:
            track, name, tick, *flow = described(*arguments, **more)
            begin = time.perf_counter()
            try:
                return act(*arguments, **more)
            finally:
                spent = time.perf_counter() - begin
                span = TraceSpan(track, name, begin + self._offset, spent, tick, *flow)
                self.spans.append(span)
                while self.spans[0].tick < tick - self._ticks:
                    self.spans.popleft()

        setattr(owner, method, timed)


def _id(channel: Any, stamp: Any) -> str:
    return f"{channel.number}.{stamp.tick}.{stamp.sample}"
