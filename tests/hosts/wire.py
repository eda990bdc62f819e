"""A wire with delay and loss between two network namespaces, as the kernel here has no netem.

    wire.py PID_A NAME_A PID_B NAME_B

Makes a TAP device in the network namespace of each process, says "up", and carries frames from one
to the other. Each line of input is "SECONDS LOSS": how long a frame takes from then on, one way,
and the share of frames that are lost. Ends with its input.
"""

import contextlib
import ctypes
import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x2, 0x1000
FRAME = 65536
AT_ONCE = 64  # frames taken from one side before the other's turn


def device(pid, name):
    """A TAP device `name` in the network namespace of process `pid`."""
    kernel = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if kernel.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to process {pid}")
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
    fcntl.ioctl(file, TUNSETIFF, request)
    return file


def carry(a, b):
    """Until the input ends. A frame never overtakes the one before it."""
    seconds = loss = 0.0
    waiting = {a: deque(), b: deque()}  # by destination: (when, frame)
    other = {a: b, b: a}
    selector = selectors.DefaultSelector()
    for file in (0, a, b):
        selector.register(file, selectors.EVENT_READ)
    while True:
        first = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        rest = None if first is None else max(0.0, first - time.monotonic())
        for key, _ in selector.select(rest):
            if key.fd == 0:
                words = os.read(0, 4096).split()
                if not words:
                    return
                seconds, loss = map(float, words[-2:])
                continue
            for _ in range(AT_ONCE):
                try:
                    frame = os.read(key.fd, FRAME)
                except BlockingIOError:
                    break
                if random.random() >= loss:
                    queue = waiting[other[key.fd]]
                    due = time.monotonic() + seconds
                    queue.append((max(due, queue[-1][0]) if queue else due, frame))
        now = time.monotonic()
        for destination, queue in waiting.items():
            while queue and queue[0][0] <= now:
                # (the device may be down, or its queue full: the frame is lost)
                with contextlib.suppress(OSError):
                    os.write(destination, queue.popleft()[1])


ends = device(sys.argv[1], sys.argv[2]), device(sys.argv[3], sys.argv[4])
os.write(1, b"up\n")
carry(*ends)
