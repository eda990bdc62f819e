"""Memory that this process takes, and energy that the processors of this machine use.

The peak resident memory is that since the start, or since the last reset.

On Linux the kernel's high-water mark (VmHWM) is read, and reset by writing 5 to
/proc/self/clear_refs. Elsewhere psutil tells the peak of the whole life of the process, or the
present memory where the system keeps no peak; there a reset does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import psutil

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_HIGH_WATER_MARK = "5"
# Of glibc's mallopt: M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD, as large as it may get by itself.
MALLOC_OPTIONS = {-1: 2**26, -3: 2**25}
RINGS = "/memfd:hamdist"  # of transport/shared_memory.py


def reset_peak(*, collect: bool = False) -> bool:
    """Begin a new measurement; False if the system cannot (the peak then covers the past as well).

    Freed memory goes back to the system first. `collect` runs the garbage collector, too (a tenth
    of a second and more).
    """
    if collect:
        gc.collect()
    return_freed_memory()
    try:
        CLEAR_REFS.write_text(RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc, which would keep it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 64 MiB, for what is made next.

    By itself it gives blocks of some MiB back to the system and asks for them again: where images
    pass through a convolution, at every step, and each new page of them costs 0.1 to 7 µs.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        for option, number in MALLOC_OPTIONS.items():
            library.mallopt(option, number)


def peak_bytes() -> int:
    """Return the most resident bytes of this process since the last successful `reset_peak`."""
    high = _status("VmHWM")
    if high is not None:
        return high
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def resident_bytes() -> int:
    """Return the resident bytes of this process now."""
    now = _status("VmRSS")
    return int(psutil.Process().memory_info().rss) if now is None else now


def own_bytes() -> int:
    """Return the resident bytes of this process alone.

    Those are anonymous memory and the rings of its signals (a ring counts in both its processes).
    Left out are the code of libraries, which the system can drop and which processes share, and
    Ray's object store. Other systems than Linux: the unique set size.
    """
    anonymous, shared = (_status(field) for field in ("RssAnon", "RssShmem"))
    process = psutil.Process()
    if anonymous is None:
        return int(process.memory_full_info().uss)
    if not shared:  # no ring: the list of all mappings takes a while
        return anonymous
    maps = process.memory_maps(grouped=True)
    return anonymous + sum(m.rss for m in maps if m.path.startswith(RINGS))


def _status(field: str) -> int | None:
    """Return the bytes of a line of /proc/self/status; None where the system has none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    matching = (line for line in lines if line.startswith(f"{field}:"))
    return next((int(line.split()[1]) * 1024 for line in matching), None)


# -- energy, where the kernel counts it (RAPL, powercap) -------------------------------------------


POWERCAP = Path("/sys/class/powercap")


def joules_from_now() -> Callable[[], float | None]:
    """Return a function that says how many joules all packages have used since, for whomever.

    It returns None where the kernel does not count or show them. A counter that has come round
    once is put right.
    """
    first = _readings()

    def joules() -> float | None:
        now = _readings()
        used = [(now[name][0] - at) % most for name, (at, most) in first.items() if name in now]
        return sum(used) * 1e-6 if used else None

    return joules


def _readings() -> dict[str, tuple[int, int]]:
    """Return by package its microjoules, and those at which its counter begins anew."""
    readings = {}
    for folder in POWERCAP.glob("*:*"):
        try:
            if (folder / "name").read_text().startswith("package"):
                files = (folder / name for name in ("energy_uj", "max_energy_range_uj"))
                used, most = (int(file.read_text()) for file in files)
                readings[folder.name] = used, most
        except (OSError, ValueError):  # (only root may read it; a part without a counter)
            continue
    return readings
