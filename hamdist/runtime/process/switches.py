"""torch's global switches that change numbers: read in the driver, set in every process of a run.

They belong to a process, flush_denormal even to a thread, so a process that Ray starts has torch's
defaults, whatever the driver's program has set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, TypeAlias

import torch

Switches: TypeAlias = Mapping[str, bool | int | str]

_ATTRIBUTES = (  # below torch, where its version has them; general ones before single ones
    "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.cudnn.enabled",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.opt_einsum.enabled",
    "backends.opt_einsum.strategy",
    "backends.quantized.engine",
    "utils.deterministic.fill_uninitialized_memory",
)
_BEFORE_FP32_PRECISION = ("backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32")


def _flushes() -> bool:
    """Return True if this thread's processor takes denormal numbers for 0."""
    return sys.float_info.min / 2 == 0


def _nnpack() -> bool:
    """Return the value of the switch, which only setting it returns."""
    put: Callable[[bool], tuple[bool]] = torch.backends.nnpack.set_flags
    (enabled,) = put(True)
    put(enabled)
    return enabled


def _default_dtype(name: str) -> None:
    torch.set_default_dtype(getattr(torch, name))


def _attribute(path: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    owner, _, name = path.rpartition(".")
    return (
        lambda: attrgetter(path)(torch),
        lambda value: setattr(attrgetter(owner)(torch), name, value),
    )


def _all() -> dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]:
    """Return the functions that read and set each switch."""
    cuda, mha = torch.backends.cuda, torch.backends.mha
    old = () if hasattr(torch.backends, "fp32_precision") else _BEFORE_FP32_PRECISION
    return {
        "default_dtype": (lambda: str(torch.get_default_dtype())[len("torch.") :], _default_dtype),
        "flush_denormal": (_flushes, torch.set_flush_denormal),
        "deterministic_debug_mode": (
            torch.get_deterministic_debug_mode,
            torch.set_deterministic_debug_mode,
        ),
        "float32_matmul_precision": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        "backends.nnpack": (_nnpack, torch.backends.nnpack.set_flags),
        "backends.mha.fastpath": (mha.get_fastpath_enabled, mha.set_fastpath_enabled),
        "backends.cuda.flash_sdp": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "backends.cuda.math_sdp": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "backends.cuda.mem_efficient_sdp": (
            cuda.mem_efficient_sdp_enabled,
            cuda.enable_mem_efficient_sdp,
        ),
        "backends.cuda.cudnn_sdp": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        **{path: _attribute(path) for path in (*old, *_ATTRIBUTES)},
    }


def read_switches() -> dict[str, bool | int | str]:
    """Read the switches of this process and thread, by name, in the order to set them in.

    Without those that this version of torch does not have, and without the precision of all float32
    products where single backends have been given theirs.
    """
    switches = {name: _read(get) for name, (get, _) in _all().items()}
    return {name: value for name, value in switches.items() if value is not None}


def _read(get: Callable[[], Any]) -> bool | int | str | None:
    try:
        value: bool | int | str | None = get()
    except (AttributeError, RuntimeError):
        return None
    return value


def set_switches(switches: Switches) -> list[str]:
    """Set the switches of this process and thread; return those that could not be, and why."""
    here = _all()
    refused = []
    for name, value in switches.items():
        get, put = here.get(name, (lambda: None, lambda _: None))
        if _read(get) == value:
            continue
        reason = "this torch cannot set it"
        try:
            put(value)
        except (AttributeError, RuntimeError, ValueError) as error:
            reason = str(error)
        if _read(get) != value:
            refused.append(f"torch's switch {name} cannot be {value!r} there ({reason})")
    return refused


def other_switches(then: Switches, now: Switches) -> list[str]:
    """Return the differences, for a message. A switch that only one of them has is left out."""
    return [
        f"{name} {then[name]} then, {now[name]} now"
        for name in then
        if name in now and then[name] != now[name]
    ]
