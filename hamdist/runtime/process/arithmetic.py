"""The fingerprint of a process's arithmetic: digests of fixed calculations, and what makes them.

The order in which a sum is rounded depends on the processor's vectors, and so does the polynomial
that exp is: equal code gives equal bits on hosts of one kind alone. A difference that digests show
is certain; one in shapes that were not tried they do not show.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from hamdist.config import Bits
from hamdist.dynamics.native import rows
from hamdist.dynamics.native.chain import Activation, NativeChain, Operation, OperationKind
from hamdist.errors import SettingsError
from hamdist.runtime.process.module_path import WITHOUT_CURRENT_FOLDER, module_variables
from hamdist.runtime.process.portable import other_bits, portable_environment
from hamdist.runtime.process.switches import Switches, read_switches
from hamdist.runtime.process.threads import torch_threads

START_SECONDS = 120.0
# (M, K, N): one row, few, many; sizes that fill vectors and sizes that do not
_SHAPES = ((1, 64, 64), (1, 300, 10), (2, 64, 64), (8, 33, 7), (64, 785, 130), (128, 256, 300))
_TYPES = (torch.float32, torch.float64)


class Arithmetic(BaseModel):
    """A process's arithmetic.

    Attributes:
        machine: the instruction set, as the operating system names it.
        processor: its model, for people: two models may compute alike.
        capability: the vectors that torch's own code uses.
        blas: what computes products of matrices, and MKL's mode, for people.
        torch: its version.
        threads: of torch, with which `digests` were computed.
        digests: of the results of fixed calculations, by kind of calculation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: str
    processor: str
    capability: str
    blas: str
    torch: str
    threads: int
    digests: dict[str, str]

    def unlike(self, other: Arithmetic) -> list[str]:
        """Return the differences from `other` that decide bits, for a message; empty if there is
        none.

        Two instruction sets never agree.
        """
        names = ("machine", "capability", "torch", "threads")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        differences = [f"{name} {mine} against {its}" for name, mine, its in pairs if mine != its]
        both = {**self.digests, **other.digests}
        kinds = [kind for kind in both if self.digests.get(kind) != other.digests.get(kind)]
        return [*differences, *([f"other bits of {', '.join(kinds)}"] if kinds else [])]

    def __str__(self) -> str:
        return f"{self.processor} ({self.capability}, {self.blas})"


def arithmetic(threads: int, *, native: bool) -> Arithmetic:
    """Compute the fingerprint of this process, in about 0.05 s the first time.

    threads: of torch; native: the C code of rows.py belongs to it.
    """
    return _computed(threads, native, tuple(read_switches().items()))


@lru_cache
def _computed(threads: int, native: bool, _switches: tuple[Any, ...]) -> Arithmetic:
    info = torch.__config__.show()
    blas = re.search(r"BLAS_INFO=(\w+)", info)
    mode = os.environ.get("MKL_CBWR")
    with torch.no_grad(), torch_threads(threads):
        digests = {kind: _digest(list(results)) for kind, results in _calculations(native)}
    return Arithmetic(
        machine=platform.machine(),
        processor=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        blas=(blas.group(1) if blas else "unknown") + (f", MKL_CBWR={mode}" if mode else ""),
        torch=torch.__version__,
        threads=threads,
        digests=digests,
    )


_IN_ANOTHER = f"""{WITHOUT_CURRENT_FOLDER}
import json
from hamdist.runtime.process.arithmetic import arithmetic
from hamdist.runtime.process.switches import set_switches
threads, native, switches = json.load(sys.stdin)
set_switches(switches)
print(arithmetic(threads, native=native).model_dump_json())
"""


def check_portable(here: Arithmetic, switches: Switches, *, native: bool) -> None:
    """Compare this process with another one that has the variables of `portable_environment`.

    That takes some seconds, the first time. `here`: our fingerprint. Raises SettingsError if they
    do not compute the same bits, or the other one cannot be started.
    """
    there = _of_a_portable_process(json.dumps([here.threads, native, dict(switches)]))
    unlike = here.unlike(there)
    if unlike:
        text = f"this process on {here} does not compute as on {there}: {', '.join(unlike)}"
        other_bits(text, Bits.PORTABLE, SettingsError)


@lru_cache
def _of_a_portable_process(order: str) -> Arithmetic:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IN_ANOTHER],
            input=order,
            env={**os.environ, **module_variables(), **portable_environment()},
            capture_output=True,
            check=True,
            text=True,
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        details = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise SettingsError(
            "engine.bits 'portable': no process could be started to compare this one with "
            f"({details[-1]}); set it to 'exact' or 'warn'"
        ) from None
    return Arithmetic.model_validate_json(done.stdout.splitlines()[-1])


@lru_cache(1)
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine()


def _digest(results: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return numbers of (-1, 1): quotients of integers, which every processor rounds alike."""
    steps = torch.arange(math.prod(shape)) * 7919 % 10007
    return (2 * (steps.to(torch.float64) / 10007) - 1).to(dtype).reshape(shape)


def _calculations(native: bool) -> Iterator[tuple[str, Iterator[Tensor]]]:
    for kind, results in _KINDS.items():
        yield kind, (result for dtype in _TYPES for result in results(dtype))
    yield "random numbers", _drawn()
    yield "the C library", iter([torch.tensor(_libm(), dtype=torch.float64)])
    if native:
        yield "hamdist's C code", (r for dtype in _TYPES for r in _in_c(dtype))


def _products(dtype: torch.dtype) -> Iterator[Tensor]:
    for m, k, n in _SHAPES:
        x, w = _numbers(dtype, m, k), _numbers(dtype, n, k)
        yield functional.linear(x, w, _numbers(dtype, n))  # x W^T + b
        yield _numbers(dtype, m, n) @ w  # the message
        yield _numbers(dtype, m, n).T @ x  # the gradient
    yield torch.bmm(_numbers(dtype, 4, 9, 32), _numbers(dtype, 4, 32, 9))
    yield torch.mv(_numbers(dtype, 70, 130), _numbers(dtype, 130))
    yield torch.dot(_numbers(dtype, 1000), _numbers(dtype, 1000).flip(0))
    if dtype is torch.float32:
        half = torch.bfloat16
        yield functional.linear(_numbers(half, 8, 64), _numbers(half, 32, 64))


def _convolutions(dtype: torch.dtype) -> Iterator[Tensor]:
    yield functional.conv2d(_numbers(dtype, 2, 3, 14, 14), _numbers(dtype, 8, 3, 3, 3), padding=1)
    yield functional.conv2d(_numbers(dtype, 2, 32, 8, 8), _numbers(dtype, 32, 32, 3, 3))
    yield functional.conv1d(_numbers(dtype, 2, 16, 40), _numbers(dtype, 24, 16, 5))


def _norms(dtype: torch.dtype) -> Iterator[Tensor]:
    x = 4 * _numbers(dtype, 7, 130)
    yield functional.layer_norm(x, (130,))
    yield functional.group_norm(x, 10)
    yield functional.batch_norm(x, None, None, training=True)
    yield from (x.sum(), x.sum(0), x.mean(1), x.var(), x.norm())


def _softmaxes(dtype: torch.dtype) -> Iterator[Tensor]:
    x = 4 * _numbers(dtype, 7, 130)
    yield from (x.softmax(-1), x.log_softmax(-1))
    q = _numbers(dtype, 1, 2, 9, 16)
    yield functional.scaled_dot_product_attention(q, q, q)


def _elementwise(dtype: torch.dtype) -> Iterator[Tensor]:
    x = 4 * _numbers(dtype, 7, 130)
    yield from (x.exp(), x.tanh(), x.sigmoid(), x.erf(), x.sin())
    yield from (functional.gelu(x), functional.silu(x), functional.softplus(x))
    yield from (x.abs().log1p(), x.abs().sqrt(), x.abs().rsqrt(), x.abs() ** 0.7)
    yield torch.add(x, x.flip(0), alpha=0.3)
    yield torch.addcmul(x, x, x.flip(0), value=0.3)
    yield torch.lerp(x, x.flip(0), 0.3)
    yield x * torch.finfo(dtype).tiny  # (denormal numbers, or 0)


def _drawn() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    yield torch.randn(100, generator=generator)
    yield torch.rand(100, generator=generator)
    yield torch.bernoulli(torch.full((100,), 0.3), generator=generator)


def _libm() -> list[float]:
    """Return results of the functions that Python's own code, and C code without vectors, calls."""
    points = [(step * 7919 % 10007) / 10007 + 0.1 for step in range(50)]
    calls = (math.exp, math.log, math.sin, math.tanh, math.erf)
    return [call(point) for call in calls for point in points]


def _in_c(dtype: torch.dtype) -> Iterator[Tensor]:
    if not rows.built():
        return
    w, b = _numbers(dtype, 70, 130), _numbers(dtype, 70)
    layer = Operation(OperationKind.LINEAR, (0,), w, b, Activation.TANH, width=70)
    norm = Operation(OperationKind.NORM, (1,), number=1e-5, width=70)
    for batch in (1, 8, 9, 40):
        chain = NativeChain([layer, norm], [(batch * width, width) for width in (130, 70, 70)])
        y = torch.zeros(batch, 70, dtype=dtype)
        if chain.runs:
            chain.forward(_numbers(dtype, batch, 130), y.new_empty(chain.inner), y)
        yield y
    numbers = rows.cross_entropy(4 * _numbers(dtype, 4, 10), torch.tensor([1, 2, 3, 4]), -100)
    yield from numbers or ()


_KINDS = {
    "matrix products": _products,
    "convolutions": _convolutions,
    "norms and sums": _norms,
    "softmax": _softmaxes,
    "elementwise functions": _elementwise,
}
