"""Centralised PyTorch at its best: backpropagation and SGD in one process, without metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from harness.configurations import Centralised as Configuration
from harness.turns import per_step
from harness.works import LR, Work

Step = Callable[[Tensor, Tensor], object]


def sgd(model: nn.Module, kind: str, lr: float = LR) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, foreach=kind == "foreach", fused=kind == "fused")


class Centralised:
    """Holds one step for each configuration that it was asked to build."""

    def __init__(self) -> None:
        self._steps: dict[str, Callable[[], object]] = {}

    def build(self, work: dict[str, Any], configurations: list[dict[str, Any]]) -> dict[str, str]:
        """The data and a step each. What a configuration could not do stands in the result."""
        self._steps.clear()
        torch.compiler.reset()  # (it compiles one function eight times at most)
        items, model = cycle(Work.of(work).items()), Work.of(work).model()
        problems = {}
        for raw in configurations:
            given = Configuration(**raw)
            torch.set_num_threads(given.threads)
            step = _step(copy.deepcopy(model), given)
            if given.compiled != "no":
                try:
                    step(*next(items))  # compiles
                except RuntimeError as error:  # of dynamo, of the backend, of the compiler
                    problems[str(given)] = f"{type(error).__name__}: {_first_line(error)}"
                    given = Configuration(given.threads, "fused", "model")
                    step = _step(copy.deepcopy(model), given)
            self._steps[str(Configuration(**raw))] = partial(_on_next, step, items)
        return problems

    def run(self, configuration: dict[str, Any], seconds: float) -> float:
        given = Configuration(**configuration)
        torch.set_num_threads(given.threads)
        return per_step(self._steps[str(given)], seconds)


def _on_next(step: Step, items: Iterator[tuple[Tensor, Tensor]]) -> object:
    return step(*next(items))


def _step(model: nn.Module, given: Configuration) -> Step:
    if given.compiled == "step":
        return _whole(model)
    optimiser = sgd(model, given.optimiser)
    forward = torch.compile(model) if given.compiled == "model" else model

    def step(u: Tensor, y: Tensor) -> None:
        loss = cross_entropy(forward(u), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def _whole(model: nn.Module) -> Step:
    """theta <- theta - lr dL/dtheta in one compiled function, without an autograd graph."""
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], u: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (u,)), y)

    def step(u: Tensor, y: Tensor) -> None:
        for name, g in grad(loss)(theta, u, y).items():
            theta[name].sub_(g, alpha=LR)

    compiled_step: Step = torch.compile(step, fullgraph=True)
    return compiled_step


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
