"""The border of a block: the type and the device in which it computes.

A signal has the type of the block that made it. Its reader casts it to the type of its own block:
here, and nowhere else, so that all engines cast alike. A signal stays on its device as long as it
stays in its process. Between GPUs of two processes of one host it may stay there as well
(transport/gpu_ring.py); otherwise it passes through (pinned) host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hamdist.errors import SettingsError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class CastPlan:
    """The types and the device to which incoming signals of one block are cast.

    Attributes:
        block: name of the block.
        device: 'cpu', 'cuda', 'cuda:N' or 'auto'.
        inputs: type of the states that come along an edge, by the edge's index; an edge that is not
            named keeps its type. Integers are not cast.
        messages: type of the messages, which is the type of the block's h; None keeps it.
        targets: type of a readout's targets; None keeps it.
        autocast: True if the block computes under torch's autocast.
    """

    block: str
    device: str = "cpu"
    inputs: Mapping[int, torch.dtype] = field(default_factory=dict)
    messages: torch.dtype | None = None
    targets: torch.dtype | None = None
    autocast: bool = False

    def at(self, device: str) -> CastPlan:
        """Return the same border on another device."""
        return replace(self, device=device)

    def resolved(self) -> torch.device:
        """Return the device in this process. Raises SettingsError if it has no such one."""
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "auto":
            return torch.device("cuda", 0) if there else CPU
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= there:
            raise SettingsError(
                f"block {self.block!r}: device {self.device!r}, but this process sees {there} "
                "CUDA device(s); use 'auto', which takes the processor where there is none"
            )
        return device


class CastBorder:
    """A `CastPlan` in the process of its block; without a plan, signals keep type and device."""

    def __init__(self, cast_plan: CastPlan | None) -> None:
        self._cast_plan = cast_plan
        self.device = CPU if cast_plan is None else cast_plan.resolved()
        self.autocast = cast_plan is not None and cast_plan.autocast

    def state(self, edge: int, h: Tensor) -> Tensor:
        return (
            h
            if self._cast_plan is None
            else entered(h, self.device, self._cast_plan.inputs.get(edge))
        )

    def message(self, m: Tensor) -> Tensor:
        return m if self._cast_plan is None else entered(m, self.device, self._cast_plan.messages)

    def target(self, y: Tensor) -> Tensor:
        return y if self._cast_plan is None else entered(y, self.device, self._cast_plan.targets)

    def moved(self, tensor: Tensor) -> Tensor:
        """Move a tensor of the block itself to its device."""
        return tensor.to(self.device)


def entered(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """Return `tensor` as its reader takes it, cast on the side where it is smaller."""
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    if tensor.dtype == dtype and tensor.device == device:
        return tensor
    if dtype.itemsize < tensor.dtype.itemsize:
        tensor = tensor.to(dtype)
    return tensor.to(device, non_blocking=tensor.is_pinned()).to(dtype)


def to_host(tensor: Tensor) -> Tensor:
    """Copy `tensor` to host memory, where a socket can read it.

    From a GPU it is copied to pinned memory, which the copy engine reaches directly. The copy has
    finished when this returns.
    """
    if tensor.is_cpu:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def host_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor of a block to host memory, for readers without a GPU."""
    return tensor.detach().clone() if tensor.is_cpu else tensor.detach().cpu()
