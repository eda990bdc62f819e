"""Small runs whose snapshots were written by every released format: tests/snapshots/FORMAT/CASE.

python tests/runtime/snapshots/released.py FOLDER      writes those of the hamdist that is installed
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

import hamdist
from hamdist.streams import Sample, from_iterable

ITEMS, EVERY = 12, 8


def _net(*, random: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.Dropout(0.5) if random else nn.LayerNorm(4)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), middle, nn.Linear(4, 4), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, 2)).double()


def _convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    ).double()


def _couplings() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Linear(3, 2), hamdist.ToPair())
    pairs = [hamdist.Coupling(nn.Sequential(nn.Linear(2, 2), nn.Tanh())) for _ in range(2)]
    return nn.Sequential(stem, *pairs, nn.Linear(4, 2)).double()


def _recurrent() -> hamdist.Graph:
    torch.manual_seed(0)
    cell = hamdist.RecurrentCell(nn.LSTMCell(3, 4).double())
    arguments = hamdist.Combine.ARGUMENTS
    reads = hamdist.Reads(nn.Linear(4, 2).double(), cell.hidden)
    return hamdist.Graph(
        [
            hamdist.BlockSpec("cell", cell, ("u", "cell"), combine=arguments, shape=(cell.size,)),
            hamdist.BlockSpec("y", reads, ("cell",), loss=nn.functional.cross_entropy),
        ]
    )


CASES = {
    "trace": (_net, {"level": "trace", "learning": {"lr": 0.1, "momentum": 0.5}}),
    "adaptive": (_net, {"level": "trace", "learning": {"lr": 0.01, "adaptive": {}}}),
    "average": (_net, {"level": "trace", "learning": {"lr": 0.1, "average": 0.9}}),
    "random": (lambda: _net(random=True), {"level": "trace", "learning": {"lr": 0.1}}),
    "convolutions": (_convolutions, {"level": "trace", "learning": {"lr": 0.1}}),
    "backprop": (_net, {"level": "backprop", "learning": {"lr": 0.1}}),
    "heads": (_net, {"level": "heads", "learning": {"lr": 0.1}}),
    "local": (_net, {"level": "local", "learning": {"lr": 0.1}}),
    "delay-free": (_net, {"level": "delay-free", "learning": {"lr": 0.1}}),
    "reversible": (_couplings, {"level": "reversible", "learning": {"lr": 0.1}}),
    "bptt": (_recurrent, {"level": "bptt", "learning": {"lr": 0.1}}),
}


def run(case: str, **fields: object) -> hamdist.RunResult:
    """Make the run of a case, as far as `fields` say otherwise."""
    model, settings = CASES[case]
    torch.manual_seed(1)
    tokens = [
        Sample(torch.randn(2, 3).double(), torch.randint(2, (2,)), end=n % 3 == 2)
        for n in range(ITEMS)
    ]
    stream = from_iterable(tokens, classes=2)
    return hamdist.train(model(), stream, dtype="float64", **{**settings, **fields})


def write(folder: Path) -> None:
    """Write the first snapshot of every case."""
    os.chdir(folder)  # (a snapshot holds its path as it was given)
    for case in CASES:
        path = Path(case)
        run(case, snapshots={"path": case, "every": EVERY, "keep": 100})
        for later in sorted(path.glob("tick-*"))[1:]:
            for file in later.iterdir():
                file.unlink()
            later.rmdir()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
