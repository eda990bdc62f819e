"""GPU memory that other processes of the host can reach, by CUDA IPC.

These lines were written without a GPU at hand. The code that shares memory by them (gpu_ring.py) is
tested with memory of the processor in their place, and uses no memory before it has read back what
was written there; the tests that need a GPU are in tests/runtime/transport.

torch's own mechanism is used: it keeps shared memory until the reader has released it (if the
reader was killed, until this process ends), and maps an allocation once a process. Its handle is
plain data, and is sent as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hamdist.runtime.transport.gpu_ring import GpuMemory, GpuMemoryError


class CudaMemory:
    """Memory of one GPU, which is named by its number in this process."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self._device

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def lend(self, nbytes: int) -> tuple[Tensor, bytes]:
        with _unlent("lent"):
            memory = self.new((nbytes,), torch.uint8)
            # (the number of the device means something in this process alone; the event is not
            # needed, for what is written is waited for)
            storage = memory.untyped_storage()
            _, handle, size, offset, counter, place, event, _ = storage._share_cuda_()  # type: ignore[no-untyped-call]
        fields = [handle.hex(), size, offset, counter.hex(), place, event.hex()]
        return memory, json.dumps(fields).encode()

    def reach(self, handle: bytes) -> Tensor:
        with _unlent("reached"):
            allocation, size, offset, counter, place, event = json.loads(handle)
            torch.cuda.init()  # type: ignore[no-untyped-call]
            # (the driver maps memory of GPUs that this process does not see, too)
            storage = torch.UntypedStorage._new_shared_cuda(
                self._device.index,
                bytes.fromhex(allocation),
                size,
                offset,
                bytes.fromhex(counter),
                place,
                bytes.fromhex(event),
                False,
            )
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def synchronise(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def cuda_memory(device: torch.device) -> GpuMemory | None:
    """Return the memory of `device`; None if it is no GPU."""
    return CudaMemory(device.index or 0) if device.type == "cuda" else None


@contextmanager
def _unlent(step: str) -> Iterator[None]:
    """Turn errors of CUDA, a torch without sharing, and wrong handles into GpuMemoryError."""
    try:
        yield
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        first = (str(error).strip() or "no reason given").split("\n")[0]
        raise GpuMemoryError(
            f"memory of a GPU cannot be {step}: {type(error).__name__}: {first}"
        ) from None
