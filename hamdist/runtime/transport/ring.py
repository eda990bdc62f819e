"""The ring of slots in shared memory: its layout, its seals, the packets between its two ends."""

from __future__ import annotations

import fcntl
import mmap
import socket
import struct

import numpy as np

from hamdist.runtime.transport.endpoint import TURN_MS

SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")
_TURN = struct.pack("ll", 0, TURN_MS * 1000)

SCHEME = "shm://"
GPU_SCHEME = "gpu://"  # the same, to a receiver that can be lent memory of a GPU
# Bytes up to which a payload travels in the packet. Measured (2 cores, both neighbours' signals,
# medians of a tick, packet / slot): 47 / 56 us at 4 KiB, 42 / 46 at 8, 58 / 56 at 16, 61 / 64 at
# 32. Up to 8 KiB the packet wins, then it is equal, and short packets need less of the buffer.
INLINE_BYTES = 8192
PACKET_BYTES = 65536
RING_HEADER = struct.Struct(
    "<2sBBIQIQ"
)  # magic, format, padding, channel, run, slots, bytes of a slot
RING_MAGIC = b"HR"
RING_FORMAT = 1
CREDIT = struct.Struct("<I")
PEER = struct.Struct("3i")  # pid, uid, gid


def prepare_socket(connection: socket.socket) -> None:
    """Limit how long a socket waits, in either direction."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TURN)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TURN)


class Ring:
    """Slots of equal size in a memory file that two processes map.

    The file cannot be shrunk or grown (seals), so that no access behind its end is possible.
    """

    def __init__(self, fd: int, slots: int, slot_bytes: int, *, writes: bool) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        self._map = mmap.mmap(fd, slots * slot_bytes, mmap.MAP_SHARED, protection)
        # (the array is gone at once: it would keep the map from being closed)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data

    def at(self, slot: int, nbytes: int) -> int:
        """Return the address of a slot that is about to take or give `nbytes`."""
        if not (0 <= slot < self.slots and nbytes <= self.slot_bytes) or self._map.closed:
            raise ValueError(f"{nbytes} bytes at slot {slot} of {self.slots}")
        return self._address + slot * self.slot_bytes

    def close(self) -> None:
        self._map.close()


def seals() -> int:
    """Return the seals of a ring's memory, as one number."""
    return int(sum(getattr(fcntl, name) for name in SEALS))
