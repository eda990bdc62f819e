"""`torch.distributed.pipelining` over gloo: one stage of two, in a process with one thread."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy

from harness.centralised import sgd
from harness.configurations import STAGES, Pipeline
from harness.works import Work

WARM_STEPS = 3
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Stage:
    """The first half of the layers, or the second."""

    def __init__(self) -> None:
        self._rank = 0
        self._items: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._half = nn.Sequential()
        self._steps: dict[str, Callable[[], None]] = {}

    def open(self, rank: int, rendezvous: str) -> None:
        """rendezvous: a file that does not exist yet, in a folder of the owner's."""
        torch.set_num_threads(1)
        self._rank = rank
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=STAGES
        )

    def build(self, work: dict[str, Any]) -> None:
        made = Work.of(work)
        self._items = cycle(made.items())
        self._half = half(made.model(), self._rank)
        self._steps.clear()

    def _step(self, given: Pipeline) -> Callable[[], None]:
        module = copy.deepcopy(self._half)
        optimiser = sgd(module, given.optimiser)
        stage = PipelineStage(module, self._rank, STAGES, torch.device("cpu"))
        schedule = SCHEDULES[given.schedule](
            stage, n_microbatches=given.micro_batches, loss_fn=cross_entropy
        )

        def step() -> None:
            u, y = next(self._items)
            optimiser.zero_grad()
            if self._rank == 0:
                schedule.step(u, return_outputs=False)
            else:
                schedule.step(target=y, return_outputs=False)
            optimiser.step()

        return step

    def run(self, configuration: dict[str, Any], steps: int) -> float:
        """Seconds a step."""
        given = Pipeline(**configuration)
        step = self._steps.get(str(given)) or self._step(given)
        self._steps[str(given)] = step
        for _ in range(WARM_STEPS):
            step()
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begun) / steps

    def close(self) -> None:
        dist.destroy_process_group()


def half(model: nn.Sequential, rank: int) -> nn.Sequential:
    """As many layers (children with weights, and what follows them) on both sides."""
    children = list(model)
    layers = [i for i, child in enumerate(children) if any(True for _ in child.parameters())]
    cut = layers[len(layers) // STAGES]
    return nn.Sequential(*(children[cut:] if rank else children[:cut]))
