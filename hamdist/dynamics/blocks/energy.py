"""The energies of a run, per tick and block, and their sums over the network.

    Lagrangian           phi L + r_w/2 |theta|^2 + 1/2 sum beta |omega|^2        (NILP)
    robust Hamiltonian   H' = phi L + r_w/2 |theta|^2 + sum z . dh/dt            (HL Eq. 8)
    Hamiltonian          H  = H' - 1/2 sum beta |omega|^2                        (NILP)

All of a tick k is taken at t_k, L as the order of the tick takes it (docs: concepts/equations).
K: entries, B: batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hamdist.dynamics.blocks.readout_loss import Reading
from hamdist.dynamics.saved_state.stateful import Stateful, registered

LIMIT = 1 << 17
LIMIT_BYTES = 1 << 28
TRAJECTORIES = ("h", "z", "prediction", "target")


@registered("Energy")
@dataclass(slots=True)
class Energy:
    """Energies of one block in one tick.

    loss: phi L; work: z . dh/dt; kinetic: 1/2 sum beta |omega|^2; cost: r_w/2 |theta|^2;
    theta_norm: |theta|.
    """

    kinetic: float
    cost: float
    theta_norm: float
    loss: float = 0.0
    work: float = 0.0


@dataclass(frozen=True, slots=True)
class Records:
    """A block's entries: tick (K,) int64; loss, work, kinetic, cost, theta_norm (K,) float64.

    With trajectories: h, z (K, B, ...) at t_k, prediction and target (K, B, ...) of a readout (NaN
    in ticks without a loss); else None, as what a block does not have.
    """

    tick: Tensor
    loss: Tensor
    work: Tensor
    kinetic: Tensor
    cost: Tensor
    theta_norm: Tensor
    h: Tensor | None = None
    z: Tensor | None = None
    prediction: Tensor | None = None
    target: Tensor | None = None


@registered("_Entry")
@dataclass(slots=True)
class _Entry:
    tick: int
    energy: Energy
    h: Tensor | None
    z: Tensor | None
    prediction: Tensor | None
    target: Tensor | None


class Recorder(Stateful):
    """Keeps an entry every `every` ticks, in constant memory.

    With LIMIT entries, or LIMIT_BYTES of tensors, every second one is dropped and `every` doubles.
    """

    def __init__(self, every: int, *, trajectory: bool) -> None:
        self._every = every
        self._trajectory = trajectory
        self._entries: list[_Entry] = []
        self._bytes = 0

    STATE = ("_every", "_entries", "_bytes")

    def due(self, tick: int) -> bool:
        """Return True if `tick` is to be recorded."""
        return tick % self._every == 0

    def add(
        self,
        tick: int,
        energy: Energy,
        reading: Reading | None,
        h: Tensor | None = None,
        z: Tensor | None = None,
    ) -> None:
        """Record a tick; h, z: at t_k (kept by reference, since they are never written to)."""
        entry = _Entry(tick, energy, None, None, None, None)
        if self._trajectory:
            entry.h, entry.z = h, z
            if reading is not None:
                entry.prediction, entry.target = reading.prediction, reading.target
        self._entries.append(entry)
        self._bytes += _size(entry)
        if len(self._entries) >= LIMIT or self._bytes > LIMIT_BYTES:
            self._every *= 2
            self._entries = [e for e in self._entries if e.tick % self._every == 0]
            self._bytes = sum(_size(e) for e in self._entries)

    def records(self) -> Records:
        """Return the entries so far."""
        entries = self._entries

        def column(name: str) -> Tensor:
            values = [getattr(e.energy, name) for e in entries]
            return torch.tensor(values, dtype=torch.float64)

        ticks = torch.tensor([e.tick for e in entries], dtype=torch.int64)
        energies = {f.name: column(f.name) for f in fields(Energy)}
        trajectories: dict[str, Any] = {name: _stacked(entries, name) for name in TRAJECTORIES}
        return Records(ticks, **energies, **trajectories)


def _size(entry: _Entry) -> int:
    tensors = (getattr(entry, name) for name in TRAJECTORIES)
    return sum(t.nbytes for t in tensors if t is not None)


def _stacked(entries: Sequence[_Entry], name: str) -> Tensor | None:
    """Return the tensors of this name stacked, NaN for a missing one; None where all are."""
    values: list[Tensor | None] = [getattr(entry, name) for entry in entries]
    example = next((v for v in values if v is not None), None)
    if example is None:
        return None
    if any(v is None for v in values):
        dtype = example.dtype if example.is_floating_point() else torch.float64
        example = torch.full_like(example, torch.nan, dtype=dtype)
    stacked = torch.stack([example if v is None else v.to(example.dtype) for v in values])
    return stacked.cpu()


def lagrangian(records: Mapping[str, Records]) -> tuple[Tensor, Tensor]:
    """Return (ticks, Lagrangian), both (K,), over the ticks that all blocks have."""
    return _sum(records, ("loss", "cost", "kinetic"))


def robust_hamiltonian(records: Mapping[str, Records]) -> tuple[Tensor, Tensor]:
    """Return (ticks, H'), both (K,), over the ticks that all blocks have (HL Eq. 8)."""
    return _sum(records, ("loss", "cost", "work"))


def hamiltonian(records: Mapping[str, Records]) -> tuple[Tensor, Tensor]:
    """Return (ticks, H), both (K,), over the ticks that all blocks have."""
    ticks, robust = robust_hamiltonian(records)
    return ticks, robust - _sum(records, ("kinetic",))[1]


def _sum(records: Mapping[str, Records], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the columns `names` of all blocks, added up in the blocks' order."""
    common = set.intersection(*(set(r.tick.tolist()) for r in records.values()))
    ticks = torch.tensor(sorted(common), dtype=torch.int64)
    total = torch.zeros(len(ticks), dtype=torch.float64)
    for r in records.values():
        rows = torch.isin(r.tick, ticks)
        for name in names:
            total += getattr(r, name)[rows]
    return ticks, total
