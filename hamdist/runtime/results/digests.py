"""Running digests of the signals of every edge and of the weights, to compare two runs.

A signal is hashed twice, by its sender when it is posted and by its receiver when it is taken, each
time on top of the digest of all signals before it on that channel. Two runs of the same settings
have equal digests up to the signal at which they part; if the digests of the two ends differ, the
transport, or code that wrote to a payload, has changed the signal. Hashed is the signal as it
travels (of compressed ones the code): its stamp, its flags, type, shape, and the CRC-32 of its
bytes, which is five times as fast as a cryptographic hash of them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias
from zlib import crc32

import torch
from torch import Tensor

from hamdist.dynamics.saved_state.stateful import registered
from hamdist.runtime.signals.cast import to_host
from hamdist.runtime.signals.signal import Channel, Signal

MOST_MARKS = 512
DIGEST_BYTES = 8
_HEAD = struct.Struct("<qqqBB")


@registered("DigestTrack")
@dataclass(slots=True)
class DigestTrack:
    """The digests of one channel's signals, or of one block's weights, as hexadecimal text.

    Attributes:
        count: signals, or updates, until `last`, the latest digest.
        of: one in so many signals is hashed, those whose number is a multiple of it.
        marks: (tick, digest) in order. Of signals the tick is the sender's, and there is one mark
            for every `every` signals: with 512 marks each second one is dropped, and `every`
            doubles. Of weights there are marks after 1, 2, 4, 8, ... updates.
    """

    count: int = 0
    last: str = ""
    every: int = 1
    marks: list[tuple[int, str]] = field(default_factory=list)
    of: int = 1

    def add(self, signal: Signal) -> None:
        """Hash a signal on top of those before it."""
        self.count += 1
        if self.count % self.of:
            return
        self.last = on_top(self.last, signal)
        if self.count % self.every == 0:
            self.marks.append((signal.stamp.tick, self.last))
            if len(self.marks) == MOST_MARKS:
                del self.marks[::2]
                self.every *= 2


DigestMap: TypeAlias = dict[str, DigestTrack]


class Digests:
    """Digests of a process: `sent`, `taken` by channel ('state u->block0'), `weights` by block.

    of: one in so many signals of a channel is hashed.
    """

    def __init__(self, of: int = 1) -> None:
        self._of = of
        self._out: dict[int, DigestTrack] = {}  # by number of the channel, which is quicker
        self._in: dict[int, DigestTrack] = {}
        self.sent: DigestMap = {}
        self.received: DigestMap = {}
        self.weights: DigestMap = {}

    def post(self, channel: Channel, signal: Signal) -> None:
        """Note a signal on its way out."""
        (self._out.get(channel.number) or self._track(self.sent, self._out, channel)).add(signal)

    def take(self, channel: Channel, signal: Signal) -> None:
        """Note a signal that has arrived, before it is decoded."""
        (self._in.get(channel.number) or self._track(self.received, self._in, channel)).add(signal)

    def _track(
        self, tracks: DigestMap, by_channel: dict[int, DigestTrack], channel: Channel
    ) -> DigestTrack:
        track = tracks.setdefault(channel.key, DigestTrack(every=self._of, of=self._of))
        by_channel[channel.number] = track
        return track

    def after_step(self, node: Any, tick: int) -> None:
        """Hash the weights of a node's block if its number of updates is a power of two.

        `tick` is that of the step that the node has made.
        """
        block = getattr(node, "block", None)
        if block is None:  # the stream
            return
        track = self.weights.setdefault(node.name, DigestTrack())
        updates = block.weights.updates
        if updates >= max(1, 2 * track.count):
            track.count, track.last = updates, weights_digest(node.state())
            track.marks.append((tick, track.last))

    def result(self, blocks: Mapping[str, Any]) -> dict[str, DigestMap]:
        """Return all digests by kind; 'weights' with those of `blocks` at the end."""
        for name, state in blocks.items():
            track = self.weights.setdefault(name, DigestTrack())
            track.count, track.last = state.updates, weights_digest(state)
        return {"sent": self.sent, "taken": self.received, "weights": self.weights}

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, name: str, out: Iterable[Channel], into: Iterable[Channel]) -> Any:
        """Return the digests of node `name`'s channels and weights."""
        return {
            "sent": _of(self.sent, [c.key for c in out]),
            "taken": _of(self.received, [c.key for c in into]),
            "weights": _of(self.weights, [name]),
        }

    def load_state_dict(self, state: Mapping[str, DigestMap]) -> None:
        """Continue from the digests of one node."""
        self._out.clear()
        self._in.clear()
        self.sent |= state["sent"]
        self.received |= state["taken"]
        self.weights |= state["weights"]


def joined(parts: Iterable[Mapping[str, DigestMap]]) -> dict[str, DigestMap]:
    """Merge the digests of the processes of one run."""
    whole: dict[str, DigestMap] = {}
    for part in parts:
        for kind, tracks in part.items():
            whole.setdefault(kind, {}).update(tracks)
    return whole


def weights_digest(state: Any) -> str:
    """Return the digest of all weights and buffers of a block's `BlockState`."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in sorted({**state.theta, **state.buffers}.items()):
        if isinstance(tensor, Tensor):  # (a module's extra state may be anything)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            _update(digest, tensor.contiguous())
    return digest.hexdigest()


def _of(tracks: DigestMap, keys: Sequence[str]) -> DigestMap:
    return {key: tracks[key] for key in keys if key in tracks}


def on_top(last: str, signal: Signal) -> str:
    """Return the digest of a signal on top of that of the signals before it."""
    payload = signal.payload
    digest = blake2b(last.encode(), digest_size=DIGEST_BYTES)
    digest.update(_HEAD.pack(*signal.stamp, signal.end, signal.sequence_end))
    if payload is not None:
        digest.update(_form(payload.dtype, payload.shape))
        _update(digest, payload)
    return digest.hexdigest()


def _update(digest: blake2b, tensor: Tensor) -> None:
    tensor = to_host(tensor.detach())
    if tensor.nbytes:
        data = _bytes(tensor.nbytes).from_address(tensor.data_ptr())
        digest.update(crc32(data).to_bytes(4, "little"))


@lru_cache(maxsize=256)
def _bytes(number: int) -> Any:
    return ctypes.c_char * number


@lru_cache(maxsize=256)
def _form(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{dtype} {tuple(shape)}".encode()
