"""A user's own rule of learning: what has to hold of it, on a net of five layers in float64."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hamdist.config import EngineKind, EngineSettings, Settings
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.train.rules import make_rule
from hamdist.runtime.train.train import plan_of, train
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.networks import Draws, chain
from hamdist.study.verify.topics.engines import ACTORS, IN_PROCESS, difference

SAMPLES, AT = 30, 17  # a process is lost at sample AT
TICKS = 40  # of a sample, for a held rule
RAY = {"kind": "ray", "actors": ACTORS, "balance": "parameters"}


@dataclass(frozen=True, slots=True)
class _DiesOnce:
    """A method of a rule that kills its process, unless that is the driver, at sample AT, once."""

    method: Any
    mark: str
    driver: int

    def __call__(self, block: Any, *arguments: Any) -> Any:
        if block.sample == AT and os.getpid() != self.driver and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.method(block, *arguments)


class VerifiedRule:
    """The checks of the rule `name`, a built-in one or FILE.py:NAME. Raises SettingsError."""

    def __init__(self, name: str) -> None:
        self._rule, self._named = make_rule("--rule", name), {"rules": {"*": name}}
        held = {"level": "local", "locality": {"speed": TICKS, "update": "last-tick"}}
        self._held = self._rule.presentation == "hold"
        self._level: dict[str, Any] = held if self._held else {"level": "trace"}
        self._ticks = TICKS if self._held else 1

    def checks(self) -> Generator[Check, None, None]:
        yield Check("what it keeps is plain data", "a dry run", 0.0, self._tried)
        with ray_session(EngineSettings(kind=EngineKind.RAY, actors=ACTORS)):
            yield Check(f"on {ACTORS} Ray actors", IN_PROCESS, 0.0, self._apart)
            yield Check("there, an actor is killed", IN_PROCESS, 0.0, self._killed)
        yield Check("a run goes on from a snapshot", IN_PROCESS, 0.0, self._resumed)
        what = "weights and memory of all other blocks are NaN whenever the rule is called"
        yield Check(what, IN_PROCESS, 0.0, self._poisoned)
        yield Check("1 - cosine of its updates, at most 2", "backpropagation", 2.0, self._cosine)

    def _settings(self, lr: float = 0.05, **fields: Any) -> Settings:
        base = {"steps": SAMPLES, "dtype": "float64", "engine": {"kind": "inprocess"}}
        learning = {"lr": lr, **self._named}
        return Settings.model_validate({**base, **self._level, "learning": learning, **fields})

    def _run(self, rules: Any = None, resume: str | None = None, **fields: Any) -> RunResult:
        stream = Draws(SAMPLES, missing={5})
        return train(chain(), stream, self._settings(**fields), rules=rules, resume=resume)

    def _tried(self) -> float:
        plan_of(chain(), self._settings(), Draws(SAMPLES).spec)
        return 0.0

    def _apart(self) -> Difference:
        return difference(self._run(), self._run(engine=RAY))

    def _killed(self) -> Difference:
        rule, method = copy.copy(self._rule), "relax" if self._held else "forward"
        with TemporaryDirectory() as folder:
            dies = _DiesOnce(getattr(rule, method), f"{folder}/mark", os.getpid())
            object.__setattr__(rule, method, dies)
            kept = {"path": f"{folder}/kept", "every": 10 * self._ticks}
            result = self._run({"*": rule}, engine=RAY, snapshots=kept)
        lost = difference(self._run(), result)
        return lost if result.replaced else Difference(torch.inf, "no process was lost")

    def _resumed(self) -> Difference:
        with TemporaryDirectory() as folder:
            kept = {"path": folder, "every": AT * self._ticks, "keep": 9}
            whole = self._run(snapshots=kept)
            first = min(path for path in Path(folder).iterdir() if path.is_dir())
            return difference(whole, self._run(resume=str(first)))

    def _poisoned(self) -> Difference:
        pairs = zip(self._weights(poisoned=False), self._weights(poisoned=True), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        return Difference(0.0 if same else torch.inf, "" if same else "it reads other blocks")

    def _weights(self, *, poisoned: bool) -> list[Tensor]:
        """Return weights and memory of all blocks after a run."""
        plan = plan_of(chain(), self._settings(), Draws(SAMPLES).spec)
        mailbox = Mailbox({INPUT, *plan.graph.blocks})
        nodes: list[Any] = [make_node(plan, name, mailbox) for name in plan.graph.blocks]
        own = [_tensors(node.block) for node in nodes]
        for node, mine in zip(nodes, own, strict=True):
            if poisoned and hasattr(node.block, "rule"):
                others = [t for o in own if o is not mine for t in o]
                node.block.rule.call = _with_nan(node.block.rule.call, others)
        run_loop([SourceNode(plan, Draws(SAMPLES), mailbox), *nodes])
        return [t for mine in own for t in mine]

    def _cosine(self) -> Difference:
        """Compare the gradients of the last sample, with weights that do not move."""
        level: dict[str, Any] = {} if self._held else {"level": "backprop"}
        result = self._run(lr=0.0, **level)
        model, sample = chain(), [*Draws(SAMPLES).samples()][-1]
        loss = cross_entropy(model(sample.u), sample.target(""))  # type: ignore[arg-type]
        weights = dict(model.named_parameters())
        exact = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        found = {}
        for name, block in result.blocks.items():
            a = torch.cat([g.flatten() for g in block.omega.values()])
            b = torch.cat([exact[key].flatten() for key in block.omega])
            found[name] = float(torch.cosine_similarity(a, b, dim=0))
        note = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        return Difference(1 - sum(found.values()) / len(found), f"cosine by block: {note}")


def _tensors(block: Any) -> list[Tensor]:
    memory = block.rule.view.memory.values() if hasattr(block, "rule") else []
    own = [*block.weights.theta, *memory]
    return [t for t in own if isinstance(t, Tensor) and t.is_floating_point()]


def _with_nan(call: Any, others: list[Tensor]) -> Any:
    def inside(*arguments: Any) -> Any:
        before = [t.clone() for t in others]
        torch._foreach_mul_(others, torch.nan)
        found = call(*arguments)
        torch._foreach_copy_(others, before)
        return found

    return inside
