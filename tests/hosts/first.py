"""The first process of a host of namespaces.py: makes the host's own /dev/shm, name and loopback.

    first.py NAME SHM_BYTES      (SHM_BYTES 0: a bare network namespace, with the caller's mounts)

Says "up" and then waits until its input ends, which is when the harness closes it, or dies. The
kernel then ends all that ran in its process namespace. Until then it reaps what was orphaned.
"""

import os
import signal
import socket
import subprocess
import sys

# Linux's usual one (cubic) sends a signal at once; bbr, where it is the default, at a pace, which
# adds up to half a round trip. (Of the others, reno alone may be chosen in a namespace.)
CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"


def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


name, shm_bytes = sys.argv[1], int(sys.argv[2])
if shm_bytes:
    socket.sethostname(name)
    options = ["-t", "tmpfs", "-o", f"size={shm_bytes},mode=1777", "tmpfs"]
    subprocess.run(["mount", *options, "/dev/shm"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
if os.path.exists(CONGESTION):
    with open(CONGESTION, "w") as file:
        file.write("reno")
signal.signal(signal.SIGCHLD, reap)
os.write(1, b"up\n")
os.read(0, 1)
