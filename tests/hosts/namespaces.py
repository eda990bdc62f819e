"""Hosts on one machine: each with its own network stack, processes, /dev/shm and name.

    from hosts.namespaces import hosts, why_not

    with hosts(3) as h:                      # Ray's head on host 0, a worker node on each other
        h.run(0, ["hamdist", "run", "digits", "--set", f"engine.address={h.address}"])
        job = h.start(0, [...])              # the same without waiting; job.process, job.text
        h.cut(1); h.mend(1)                  # host 1's cable: nobody hears of it
        h.delay(1, 0.025, loss=0.01)         # seconds one way; only with hosts(3, delay=...)
    h.delay(1, 0.1, rate=1.25e6, jitter=0.2, way="there")   # 10 Mbit/s out of host 1
        h.kill_ray(2); h.start_ray(2)        # SIGKILL to the host's raylet, or to the head's server
        h.kill(2); h.boot(2)                 # the whole host, as if its power was cut, and on again
        for p in h.processes(1): ...         # psutil.Process of all that runs on host 1
    # leaving ends everything

Hosts are 10.77.0.10, 10.77.0.11, ... (`h.ip(i)`), on a bridge in a namespace of its own, so that
nothing leads out and several such worlds do not meet. Each has the Ray resource `host0`, `host1`,
... for placement, `h.folder` is a folder that all see (shared storage), `h.home(i)` one that is
meant for host i alone (its TMPDIR). Ray asks for a token (`h.environment`). `hosts(3, ray=False)`
starts no Ray. `environment=` goes to everything that runs on the hosts, `cpus=` is what each tells
Ray.

Needs root and Linux's namespaces: `why_not()` says what is missing, or "". What one harness starts
ends with it, even if it is killed: the first process of each host waits on a pipe from it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).parent
NET = "10.77.0."
NET6 = "fd00:77::"
GCS_PORT = 6379
SHM_BYTES = 512 * 2**20
QUEUE_FRAMES = 20_000
STORE_BYTES = 80 * 10**6
START_SECONDS = 60.0
LOOK_SECONDS = 0.05
NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc"]
STARTED = "Ray runtime started"


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts of namespaces need Linux and root"
    missing = [c for c in ("ip", "unshare", "nsenter", "mount") if shutil.which(c) is None]
    if missing:
        return f"hosts of namespaces need the command {missing[0]!r}"
    make = "ip link add v0 type veth peer name v1 && ip link add br0 type bridge"
    done = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "sh", "-c", make],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


@dataclass(eq=False)
class Job:
    """What was started on a host. log: the file of its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to it and to what it started, and waits for their end."""
        outer = psutil.Process(self.process.pid)
        inner = outer.children(recursive=True)
        for process in (outer, *inner):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(inner, timeout=START_SECONDS)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def await_text(self, words: str, seconds: float = START_SECONDS) -> None:
        """Returns when `words` were printed. Raises RuntimeError if it ends without, or is late."""
        end = time.monotonic() + seconds
        while words not in self.text:
            if time.monotonic() > end or (self.process.poll() is not None):
                if words in self.text:
                    return
                raise RuntimeError(f"{self.process.args}: no {words!r}\n{self.text}")  # type: ignore[str-bytes-safe]
            time.sleep(LOOK_SECONDS)


@dataclass(eq=False)
class _Machine:
    """snapshot_writer: the process outside whose end ends the host; pid: its first process
    inside."""

    snapshot_writer: subprocess.Popen[bytes]
    pid: int
    ray: Job | None = None
    jobs: list[Job] = field(default_factory=list)
    wire: subprocess.Popen[bytes] | None = None


class Hosts:
    """Made by `hosts`."""

    def __init__(
        self,
        folder: Path,
        cpus: int,
        environment: Mapping[str, str],
        delay: float | None,
        net: str = NET,
        straight: int = 0,
    ) -> None:
        self.folder = folder
        self.net = net  # what the hosts' addresses, as Ray is told them, begin with
        self._cpus = cpus
        self._delay = delay
        self._straight = straight
        self._machines: dict[int, _Machine] = {}
        self._bridge: _Machine | None = None
        self._number = 0
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {
            **own,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")]),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            **environment,
        }

    @property
    def pids(self) -> list[int]:
        """Of each host's first process, and of the bridge's."""
        own = [machine.pid for machine in self._machines.values()]
        return own if self._bridge is None else [*own, self._bridge.pid]

    @property
    def address(self) -> str:
        """Of the cluster, as `engine.address` takes it."""
        ip = self.ip(0)
        return f"[{ip}]:{GCS_PORT}" if ":" in ip else f"{ip}:{GCS_PORT}"

    def ip(self, i: int) -> str:
        return f"{self.net}{10 + i}"

    def home(self, i: int) -> Path:
        """Host i's own temporary files."""
        return self.folder / str(i)

    # Hosts, and their cables

    def lay_bridge(self) -> None:
        self._bridge = _Machine(*_first(["unshare", "--net"], "bridge", 0, self.environment))
        self._ip(self._bridge.pid, "link add br0 type bridge", "link set br0 up")

    def boot(self, i: int) -> None:
        """Host i, without Ray, with its cable."""
        bridge = self._bridge
        assert bridge is not None
        assert i not in self._machines, f"host {i} is up"
        self.home(i).mkdir(exist_ok=True)
        command = ["unshare", *NAMESPACES, "--fork", "--mount-proc"]
        machine = _Machine(*_first(command, f"host{i}", SHM_BYTES, self.environment))
        self._machines[i] = machine
        if self._delay is None or i < self._straight:
            veth = f"link add v{i} type veth peer name eth0 netns {machine.pid}"
            self._ip(bridge.pid, veth)
        else:
            machine.wire = _wire(machine.pid, "eth0", bridge.pid, f"v{i}", i)
            self.delay(i, self._delay)
            # (a wire that waits for a processor loses frames beyond the kernel's usual 1,000)
            self._ip(machine.pid, f"link set eth0 txqueuelen {QUEUE_FRAMES}")
            self._ip(bridge.pid, f"link set v{i} txqueuelen {QUEUE_FRAMES}")
        mask = "/64 dev eth0 nodad" if ":" in self.net else "/24 dev eth0"
        self._ip(machine.pid, f"addr add {self.ip(i)}{mask}", "link set eth0 up")
        self._ip(bridge.pid, f"link set v{i} up", f"link set v{i} master br0")

    def cut(self, i: int) -> None:
        """Host i's cable leads nowhere; neither end is told."""
        self._ip(self._bridge_pid, f"link set v{i} nomaster")

    def mend(self, i: int) -> None:
        self._ip(self._bridge_pid, f"link set v{i} master br0")

    def delay(
        self,
        i: int,
        seconds: float,
        loss: float = 0.0,
        *,
        rate: float = 0.0,
        jitter: float = 0.0,
        way: str = "both",
        resent: bool = False,
        after: float = 0.0,
    ) -> None:
        """What host i's cable does to each frame, one way, from `after` seconds from now on. For
        hosts(..., delay=...).

        loss: share of frames; rate: bytes a second (0: any number); jitter: standard deviation as a
        share of seconds; way: `there` (out of host i), `back`, or both; resent: lost frames come a
        round trip later, instead of never.
        """
        wire = self._machines[i].wire
        if wire is None or wire.stdin is None:
            raise ValueError("hosts(..., delay=0.0) makes cables that can delay")
        again = "resent" if resent else ""
        wire.stdin.write(f"@{after} {seconds} {loss} {rate} {jitter} {way} {again}\n".encode())
        wire.stdin.flush()

    def kill(self, i: int) -> None:
        """Ends host i with all that runs on it, at once."""
        machine = self._machines.pop(i)
        os.kill(machine.pid, signal.SIGKILL)
        _end(machine)

    def close(self) -> None:
        for i in list(self._machines):
            self.kill(i)
        if self._bridge is not None:
            _end(self._bridge)

    @property
    def _bridge_pid(self) -> int:
        assert self._bridge is not None
        return self._bridge.pid

    def _ip(self, pid: int, *lines: str) -> None:
        """Runs lines of `ip` in the network namespace of a process."""
        command = ["nsenter", f"--target={pid}", "--net", "ip", "-batch", "-"]
        text = "\n".join(lines)
        done = subprocess.run(command, input=text, text=True, capture_output=True, timeout=20)
        if done.returncode:
            raise OSError(f"ip {text}: {done.stderr.strip()}")

    # What runs on them

    def start(self, i: int, command: Sequence[str], **environment: str) -> Job:
        """Starts a command on host i."""
        self._number += 1
        log = self.home(i) / f"job{self._number}.log"
        machine = self._machines[i]
        inside = ["--net", "--pid", "--mount", "--uts", "--ipc", f"--wd={Path.cwd()}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["nsenter", f"--target={machine.pid}", *inside, *command],
                env={**self.environment, "TMPDIR": str(self.home(i)), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job = Job(process, log)
        machine.jobs.append(job)
        return job

    def run(
        self,
        i: int,
        command: Sequence[str],
        *,
        seconds: float = 100.0,
        check: bool = True,
        **environment: str,
    ) -> str:
        """Runs a command on host i; returns what it printed.

        Raises RuntimeError with the output if it fails (unless check=False) or takes longer.
        """
        job = self.start(i, command, **environment)
        try:
            code = job.wait(seconds)
        except subprocess.TimeoutExpired:
            job.kill()
            raise RuntimeError(f"{command}: not over in {seconds:g} s\n{job.text}") from None
        self._machines[i].jobs.remove(job)
        if check and code:
            raise RuntimeError(f"{command}: exit status {code}\n{job.text}")
        return job.text

    def python(self, i: int, code: str, *arguments: str, seconds: float = 100.0) -> str:
        """Runs Python code on host i; returns what it printed."""
        return self.run(i, [sys.executable, "-c", code, *arguments], seconds=seconds)

    def processes(self, i: int) -> list[psutil.Process]:
        """All that runs on host i, but for its first process."""
        first = self._machines[i].pid
        mine = os.readlink(f"/proc/{first}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):  # it has just ended
                if os.readlink(f"/proc/{process.pid}/ns/pid") == mine and process.pid != first:
                    found.append(process)
        return found

    # Ray on them

    def start_ray(self, i: int, *, wait: bool = True) -> None:
        """Starts Ray's head on host 0, or a node on another host."""
        ray_folder = self.home(i) / "r"
        command = [
            str(Path(sys.executable).parent / "ray"),
            *("start", "--block", "--disable-usage-stats", f"--node-ip-address={self.ip(i)}"),
            *(f"--temp-dir={ray_folder}", f"--num-cpus={self._cpus}", "--num-gpus=0"),
            *(f"--object-store-memory={STORE_BYTES}", f'--resources={{"host{i}": 1000}}'),
            # Fixed ports: nothing to hand over, and no search for free ones.
            *("--node-manager-port=6700", "--object-manager-port=6701"),
            *("--runtime-env-agent-port=6702", "--dashboard-agent-grpc-port=6703"),
            *("--dashboard-agent-listen-port=6704", "--metrics-export-port=6705"),
            *("--min-worker-port=7000", "--max-worker-port=7999"),
        ]
        if i == 0:
            command += ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", "--no-monitor"]
        else:
            command += [f"--address={self.address}"]
        self._machines[i].ray = self.start(i, command)
        if wait:
            self.await_ray(i)

    def await_ray(self, i: int) -> None:
        """Returns when Ray is up on host i."""
        job = self._machines[i].ray
        assert job is not None
        job.await_text(STARTED)

    def await_head(self) -> None:
        """Returns when the head's server listens, which the other nodes need."""
        job, pid = self._machines[0].ray, self._machines[0].pid
        assert job is not None
        end = time.monotonic() + START_SECONDS
        while not _listens(pid, GCS_PORT):
            if job.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Ray's head did not start\n{job.text}")
            time.sleep(LOOK_SECONDS)

    def kill_ray(self, i: int, name: str = "raylet") -> None:
        """SIGKILL to host i's raylet (or `gcs_server`), and waits for `ray start` to end, which
        ends the rest of that node."""
        for process in self.processes(i):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == name:
                    process.kill()
        job = self._machines[i].ray
        assert job is not None
        job.wait(START_SECONDS)


def _first(
    command: Sequence[str], name: str, shm: int, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], int]:
    """A namespace's snapshot writer, and the process id of first.py in it."""
    snapshot_writer = subprocess.Popen(
        [*command, sys.executable, str(HERE / "first.py"), name, str(shm)],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _await_up(snapshot_writer, name)
    inner = (
        Path(f"/proc/{snapshot_writer.pid}/task/{snapshot_writer.pid}/children").read_text().split()
    )
    return snapshot_writer, int(inner[0]) if "--fork" in command else snapshot_writer.pid


def _wire(pid_a: int, name_a: str, pid_b: int, name_b: str, seed: int) -> subprocess.Popen[bytes]:
    wire = subprocess.Popen(
        [sys.executable, str(HERE / "wire.py"), str(pid_a), name_a, str(pid_b), name_b, str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _await_up(wire, "wire")
    return wire


def _await_up(process: subprocess.Popen[bytes], name: str) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != b"up\n":
        raise OSError(f"{name} did not come up: {process.stderr.read().decode(errors='replace')}")


def _listens(pid: int, port: int) -> bool:
    """Whether somebody listens on a port, where process `pid` lives (state 0A of the table)."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def _end(machine: _Machine) -> None:
    """Waits for the end of all that belongs to a machine, which it brings about."""
    for process in (machine.snapshot_writer, machine.wire):
        if process is not None:
            process.communicate(timeout=START_SECONDS)  # closes its input
    for job in machine.jobs:
        job.process.wait(START_SECONDS)


@contextmanager
def hosts(
    number: int = 3,
    *,
    ray: bool = True,
    cpus: int = 4,
    delay: float | None = None,
    environment: Mapping[str, str] | None = None,
    net: str = NET,
    straight: int = 0,
) -> Iterator[Hosts]:
    """`number` hosts joined by a bridge, ended at the exit. delay: seconds that each cable takes
    one way (None: cables without a wire.py, which are faster than it can be). net: of their
    addresses, NET or NET6. straight: so many hosts, the first ones, have no wire.py."""
    folder = Path(tempfile.mkdtemp(prefix="hw-", dir=_short_folder()))
    world = Hosts(folder, cpus, environment or {}, delay, net, straight)
    try:
        world.lay_bridge()
        for i in range(number):
            world.boot(i)
        if ray:
            world.start_ray(0, wait=False)
            world.await_head()
            for i in range(1, number):
                world.start_ray(i, wait=False)
            for i in range(number):
                world.await_ray(i)
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str | None:
    """The paths of Ray's sockets must fit 107 bytes."""
    return None if len(tempfile.gettempdir()) < 16 else "/tmp"
