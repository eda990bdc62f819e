"""A run spread over Ray actors equals the run in one process to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.config import EngineKind, EngineSettings, Settings
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.modules.recurrent import DiagonalCell, Reads, RecurrentCell
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.train.train import train
from hamdist.study.verify.oracles.check import Check, Difference, absolute, largest
from hamdist.study.verify.oracles.networks import (
    CLASSES,
    F64,
    FEATURES,
    Draws,
    Skips,
    chain,
    cycle_graph,
    seeded,
    skip_graph,
    tied,
)
from hamdist.study.verify.topics.bptt import cell_block
from hamdist.study.verify.topics.reversible import couplings

ACTORS = 2
SEQUENCE = 6
IN_PROCESS = "the same run in one process"

Model = Callable[[], nn.Module | Graph]

LAGGING = {
    "locality": {"order": "simultaneous"},
    "dynamics": {"tau": {"values": [0.5, 0.3, 0.4], "cycle": True}, "c": 0.8, "eta": 1.2},
}
TRUNCATED = {"locality": {"truncation": 3}}
SEQUENTIAL = {"locality": {"order": "sequential", "readout": "state"}}
ADAMW = {"learning": {"lr": 0.01, "optimizer": {"name": "adamw", "weight_decay": 0.1}}}
IN_PARTS = {"locality": {"microbatches": 3}, "learning": {"lr": 0.05, "momentum": 0.5}}
IN_GROUPS = {"locality": {"microbatches": 3, "accumulate": 4}, **ADAMW}
BUFFERED = {"locality": {"accumulate": 8, "double_buffered": True}, **ADAMW}


def _skips() -> Graph:
    return skip_graph(seeded(Skips))


def recurrent(*, diagonal: bool = False) -> Graph:
    """Return a linear readout of h of an LSTM, or of a diagonal state space."""

    def build() -> Graph:
        cell: Any = RecurrentCell(nn.LSTMCell(FEATURES, 5, dtype=F64))
        if diagonal:
            cell = DiagonalCell(FEATURES, 5).to(F64)
        head = Reads(nn.Linear(5, CLASSES, dtype=F64), slice(0, 5))
        readout = BlockSpec("y", head, ("cell",), loss=cross_entropy)
        return Graph([cell_block("cell", cell, INPUT, cell.size), readout])

    return seeded(build)


RUNS: tuple[tuple[str, Model, Mapping[str, Any]], ...] = (
    ("local, a chain", chain, {"level": "local"}),
    ("local, simultaneous, uneven tau, a chain", chain, {"level": "local", **LAGGING}),
    ("local, sequential, a chain", chain, {"level": "local", **SEQUENTIAL}),
    ("local, cycles", cycle_graph, {"level": "local"}),
    ("local, simultaneous, uneven tau, cycles", cycle_graph, {"level": "local", **LAGGING}),
    ("group, a chain", chain, {"level": "group"}),
    ("group, cycles", cycle_graph, {"level": "group"}),
    ("delay-free, a chain", chain, {"level": "delay-free"}),
    ("trace, a chain", chain, {"level": "trace"}),
    ("trace, skips", _skips, {"level": "trace"}),
    ("trace, tied weights, a layer in two blocks", tied, {"level": "trace"}),
    ("trace, three frozen blocks of five", lambda: tied(2), {"level": "trace"}),
    ("trace, a chain, two versions of the weights", chain, {"level": "trace", **BUFFERED}),
    ("heads, a chain", chain, {"level": "heads"}),
    ("backprop, a chain", chain, {"level": "backprop"}),
    ("backprop, skips", _skips, {"level": "backprop"}),
    ("pipeline, skips", _skips, {"level": "pipeline", **IN_PARTS}),
    ("pipeline, a chain, a step for 4 samples", chain, {"level": "pipeline", **IN_GROUPS}),
    ("reversible, couplings", lambda: seeded(partial(couplings, 4)), {"level": "reversible"}),
    ("bptt, an LSTM", recurrent, {"level": "bptt"}),
    ("bptt truncated to 3, an LSTM", recurrent, {"level": "bptt", **TRUNCATED}),
)


def checks(full: bool) -> Generator[Check, None, None]:
    """Yield a check per run."""
    samples = 400 if full else 40
    with ray_session(EngineSettings(kind=EngineKind.RAY, actors=ACTORS)):
        for name, model, fields in RUNS:
            title = f"{name}: {samples} samples on {ACTORS} Ray actors"
            yield Check(title, IN_PROCESS, 0.0, partial(_apart, model, samples, fields))


def _apart(model: Model, samples: int, fields: Mapping[str, Any]) -> Difference:
    stream = Draws(samples, missing={0, 7, 8, samples - 5}, ends=SEQUENCE)

    def run(engine: Mapping[str, Any]) -> RunResult:
        settings = {"steps": samples, "seed": 5, "dtype": "float64", "engine": engine, **fields}
        return train(model(), stream, Settings.model_validate(settings))

    return difference(run({"kind": "inprocess"}), run({"kind": "ray", "actors": ACTORS}))


def difference(alone: RunResult, spread: RunResult) -> Difference:
    """Return the largest difference between the results of two runs, and where it is.

    It is infinite if one has an entry that the other has not.
    """
    a, b = dict(_numbers(alone)), dict(_numbers(spread))
    odd = a.keys() ^ b.keys()
    if odd:
        return Difference(float("inf"), f"only one run has {sorted(odd)[0]}")
    return largest((name, _distance(left, b[name])) for name, left in a.items())


def _distance(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return absolute(a.double(), b.double()) if a.shape == b.shape else float("inf")


def _numbers(result: RunResult) -> Iterator[tuple[str, Tensor]]:
    """Yield all that a run has computed, by name."""
    for name, block in result.blocks.items():
        for part in ("theta", "omega", "buffers"):
            for key, value in getattr(block, part).items():
                if isinstance(value, Tensor):
                    yield f"{part} {name}.{key}", value
        for part in ("h", "z"):
            value = getattr(block, part)
            if value is not None:
                yield f"{part} {name}", value
        yield f"updates of {name}", torch.tensor(block.updates)
    for name, windows in result.windows.items():
        yield f"losses at {name}", torch.tensor([w.loss for w in windows], dtype=torch.float64)
    yield "ticks", torch.tensor(result.ticks)
    for edge, count in result.bytes_per_edge.items():
        yield f"bytes on {edge}", torch.tensor(count)
