"""engine.bits 'portable': variables of a process, so that hosts of different kinds compute the same
bits.

    torch's own code     vectors of AVX2, whatever is there
    MKL                  its branch for every x86 processor: the one that those of all makers have
    oneDNN               AVX2, and no float32 product in fewer bits
    rows.c               needs nothing: its clones agree
    threads, denormals   `engine.threads`, and the driver's switch, in every run (switches.py)

The libraries read their variables when they are loaded or first used, so they are set before torch
is imported. Nothing here imports it.
"""

from __future__ import annotations

import os
import platform
import sys

from hamdist.config import Bits, EngineSettings
from hamdist.errors import HamdistError

_X86 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
}
_OTHERS = {"ATEN_CPU_CAPABILITY": "default"}

_pinned = False


def portable_environment() -> dict[str, str]:
    """Return the variables of a process that computes portable bits, on a host like this one."""
    return _X86 if platform.machine().lower() in ("x86_64", "amd64") else _OTHERS


def pin(engine: EngineSettings) -> None:
    """Make this process compute portable bits if `engine.bits` asks for them.

    That has an effect only before torch is imported; later, `check_portable` checks whether the
    process was started in that way.
    """
    global _pinned
    if engine.bits is Bits.PORTABLE and "torch" not in sys.modules:
        os.environ.update(portable_environment())
        _pinned = True


def is_pinned() -> bool:
    """Return True if `pin` had its effect."""
    return _pinned


def other_bits(field: str, bits: Bits, error: type[HamdistError]) -> str:
    """Return the warning that other bits are computed; `field` says where, and how they differ.

    Raises `error` with it where `bits` asks for equal ones.
    """
    remedy = "use hosts of one kind and the same switches of torch, or engine.bits 'portable'"
    if bits is Bits.WARN:
        text = f"{field}; numbers will differ in their last bits: {remedy}"
        return f"{text}; 'exact' refuses such a run"
    if bits is Bits.PORTABLE:
        variables = " ".join(f"{k}={v}" for k, v in portable_environment().items())
        remedy = (
            f"start Python with {variables} (the command hamdist does so by itself), for they are "
            "read when torch is imported; where this was done, these processors do not agree even "
            "so: use hosts of one kind"
        )
    raise error(f"engine.bits {bits.value!r}: {field}; {remedy}")
