"""Memory of the processor that stands for a GPU's: files that two processes map."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from hamdist.runtime.transport.gpu_ring import GpuMemoryError

LIES = {
    "cannot be lent": "no memory of this kind is left",
    "cannot be reached": "no peer access between these GPUs",
    "is other memory": "something else",
    "breaks": "RuntimeError: an illegal access",
}


class FileMemory:
    """What is written comes to be there no sooner than `settle` returns, as on a GPU. holding:
    tensors of up to so many bytes are taken for such that lie on it."""

    def __init__(self, folder, lie="", holding=2**20):
        self._folder = Path(folder)
        self._lie = lie
        self._holding = holding
        self._lent = []  # what was written, and where it will be seen

    def holds(self, tensor):
        return tensor.nbytes <= self._holding

    def new(self, shape, dtype):
        return torch.empty(shape, dtype=dtype)

    def export(self, nbytes):
        if self._lie == "cannot be lent":
            raise GpuMemoryError(LIES[self._lie])
        path = self._folder / f"lent.{secrets.token_hex(8)}"
        path.write_bytes(bytes(nbytes))
        shared = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)
        written = torch.zeros_like(shared)
        self._lent.append((written, shared))
        return written, str(path).encode()

    def reach(self, handle):
        path = Path(handle.decode())
        if self._lie == "cannot be reached":
            raise GpuMemoryError(LIES[self._lie])
        if self._lie == "breaks":
            raise RuntimeError("an illegal access\nand its trace")
        nbytes = path.stat().st_size
        path.with_name(path.name.replace("lent", "reached")).touch()
        if self._lie == "is other memory":
            return torch.zeros(nbytes, dtype=torch.uint8)
        return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    def synchronise(self):
        for written, shared in self._lent:
            shared.copy_(written)


@dataclass(frozen=True)
class StandIn:
    """`Plan.memory_of` of a run whose blocks compute as if the processor were a GPU."""

    folder: str
    lie: str = ""

    def __call__(self, device):
        return FileMemory(self.folder, self.lie)

    def count(self, what):
        return len(list(Path(self.folder).glob(f"{what}.*")))
