"""A wire between two network namespaces that delays, drops and holds back, as the kernel here has
no netem.

    wire.py PID_A NAME_A PID_B NAME_B [SEED]

Makes a TAP device in the network namespace of each process, says "up", and carries frames from one
to the other. Each line of input is "SECONDS LOSS [RATE JITTER [WAY [resent]]]": how long a frame
takes from then on, one way; the share of frames that are lost; bytes a second (0: any number),
behind which frames queue; the standard deviation of SECONDS as a share of it (never below 0, and no
frame overtakes another); and which way: `there` from A to B, `back`, or `both`. With `resent` a
lost frame comes after all, later by a round trip, and those behind it wait: what a retransmission
costs where the sender does not slow down for it. Frames are packets where any are lost for good;
else the kernel hands over up to 64 KiB of a connection as one frame, which stands for the packets
that it makes, which leave together and are late together: it is lost if one of them is, and as long
as all with their headers. What is drawn follows from SEED and the order of the frames, for each way
alone. A line that begins with @T counts from T seconds later on. Ends with its input.
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
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000
TUNSETOFFLOAD = 0x400454D0
OFFLOAD = 0x1 | 0x2 | 0x4  # checksums, and segments of TCP over IPv4 and IPv6
HEADER = struct.Struct("<BBHHHH")  # before a frame; the fourth: bytes of a packet, 0: one
FRAME = 2**17
PACKET_HEADERS = 66  # bytes: Ethernet, IPv4, TCP with timestamps
AT_ONCE = 64  # frames taken from one side before the other's turn
QUEUE_SECONDS = 0.5  # of frames that wait for a narrow wire; further ones are lost, as in a router


def device(pid, name):
    """A TAP device `name` in the network namespace of process `pid`."""
    kernel = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if kernel.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to process {pid}")
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    fcntl.ioctl(file, TUNSETIFF, request)
    return file


def packets(frame):
    """How many packets a frame makes, headers of packets left out."""
    size = HEADER.unpack_from(frame)[3]
    return -(-(len(frame) - HEADER.size) // size) if size else 1


class Way:
    """One direction: its properties, and the frames under way with their times."""

    def __init__(self, seed):
        self.seconds = self.loss = self.rate = self.jitter = 0.0
        self.resent = False
        self.random = random.Random(seed)
        self.waiting = deque()
        self.free = 0.0  # when the wire has taken the frames before

    def take(self, frame, now, packets=1):
        """Puts a frame on its way, or loses it."""
        lost = self.random.random() < 1 - (1 - self.loss) ** packets
        if lost and not self.resent:
            return
        begin = max(now, self.free)
        if begin - now > QUEUE_SECONDS:
            return
        nbytes = len(frame) + (packets - 1) * PACKET_HEADERS
        self.free = begin + (nbytes / self.rate if self.rate else 0.0)
        late = self.seconds * max(0.0, 1.0 + self.jitter * self.random.gauss(0.0, 1.0))
        due = self.free + late + (2 * self.seconds if lost else 0.0)
        before = self.waiting[-1][0] if self.waiting else due
        self.waiting.append((max(due, before), frame))


def carry(a, b, seed):
    """Until the input ends. A frame never overtakes the one before it."""
    ways = {b: Way(2 * seed), a: Way(2 * seed + 1)}  # by destination: there, back
    plan = Plan()
    other = {a: b, b: a}
    selector = selectors.SelectSelector()  # (the others wait for whole milliseconds)
    for file in (0, a, b):
        selector.register(file, selectors.EVENT_READ)
    while True:
        times = [way.waiting[0][0] for way in ways.values() if way.waiting] + plan.times
        rest = max(0.0, min(times) - time.monotonic()) if times else None
        for key, _ in selector.select(rest):
            if key.fd == 0:
                text = os.read(0, 4096).decode()
                if not text:
                    return
                plan.add(text, time.monotonic())
                continue
            for _ in range(AT_ONCE):
                try:
                    frame = os.read(key.fd, FRAME)
                except BlockingIOError:
                    break
                ways[other[key.fd]].take(frame, time.monotonic(), packets(frame))
        now = time.monotonic()
        for words in plan.due(now):
            adjust(ways[b], ways[a], words)
            apart = any(way.loss and not way.resent for way in ways.values())
            for file in (a, b):
                fcntl.ioctl(file, TUNSETOFFLOAD, 0 if apart else OFFLOAD)
        for destination, way in ways.items():
            while way.waiting and way.waiting[0][0] <= now:
                # (the device may be down, or its queue full: the frame is lost)
                with contextlib.suppress(OSError):
                    os.write(destination, way.waiting.popleft()[1])


class Plan:
    """Lines of input with the times from which on they count."""

    def __init__(self):
        self.lines = []

    @property
    def times(self):
        return [at for at, _ in self.lines]

    def add(self, text, now):
        for line in text.splitlines():
            words = line.split()
            later = float(words.pop(0)[1:]) if words[0].startswith("@") else 0.0
            self.lines.append((now + later, words))

    def due(self, now):
        """Takes out the words of the lines whose time has come, in its order."""
        self.lines.sort(key=lambda line: line[0])
        while self.lines and self.lines[0][0] <= now:
            yield self.lines.pop(0)[1]


def adjust(there, back, words):
    chosen = {"there": [there], "back": [back]}.get(words[4] if len(words) > 4 else "")
    for way in chosen or [there, back]:
        way.seconds, way.loss = map(float, words[:2])
        if len(words) > 3:
            way.rate, way.jitter = map(float, words[2:4])
        way.resent = words[5:] == ["resent"]


if __name__ == "__main__":
    ends = device(sys.argv[1], sys.argv[2]), device(sys.argv[3], sys.argv[4])
    os.write(1, b"up\n")
    carry(*ends, int(sys.argv[5]) if len(sys.argv) > 5 else 0)
