"""A user's own rule of learning: what has to hold of it, in float64, on a net of five layers, or,
of a rule of sequences, on an LSTM or a diagonal state space, whichever the rule takes."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.config import EngineKind, EngineSettings, Settings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.rules.rule import BlockView, Messages, Rule, Updates
from hamdist.errors import DivergedError, GraphError
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.ray_engine.session import ray_session
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.train.prepare import level_fields, make_level, make_rule
from hamdist.runtime.train.train import plan_of, train
from hamdist.study.shared.exact_runs import PlanNodes
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.networks import Draws, chain
from hamdist.study.verify.topics.engines import ACTORS, IN_PROCESS, difference, recurrent

SAMPLES, AT = 30, 17  # a process is lost at sample AT
TICKS = 40  # of a sample, for a held rule
TOKENS = 7  # of a sequence: a process is lost, and a run goes on, in the midst of one
RAY = {"kind": "ray", "actors": ACTORS, "balance": "parameters"}


def _dying(method: Any, mark: Path, driver: int, block: Any, *arguments: Any) -> Any:
    """Call a rule's `method`; first kill this process, if it is an actor at sample AT, once."""
    if block.sample == AT and os.getpid() != driver and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return method(block, *arguments)


class VerifiedRule:
    """The checks of the rule `name`, a built-in one or FILE.py:NAME. Raises SettingsError."""

    def __init__(self, name: str) -> None:
        self._rule, self._named = make_rule("--rule", name), {"rules": {"*": name}}
        held: dict[str, Any] = {
            "level": "local",
            "locality": {"speed": TICKS, "update": "last-tick"},
        }
        self._held = self._rule.presentation == "hold"
        self._fits = False
        if nudges := self._rule.nudges(TICKS):
            held["dynamics"] = {"phi": {"values": nudges, "cycle": True}}
        self._level: dict[str, Any] = held if self._held else {"level": "trace"}
        self._ticks = TICKS if self._held else 1
        self._model: Callable[[], nn.Module | Graph] = chain
        self._length: int | None = None  # of a sequence
        if self._rule.presentation == "sequence":
            self._length = TOKENS
            self._model = recurrent
            try:
                self._plan()
            except GraphError:
                self._model = partial(recurrent, diagonal=True)

    def checks(self) -> Generator[Check, None, None]:
        """Yield the checks; some start Ray."""
        yield Check("it keeps plain data", "a dry run", 0.0, self._tried)
        if not self._fits:
            return  # all that follows would fail of the same
        with ray_session(EngineSettings(kind=EngineKind.RAY, actors=ACTORS)):
            yield Check(f"on {ACTORS} Ray actors", IN_PROCESS, 0.0, self._apart)
            yield Check("there, an actor is killed", IN_PROCESS, 0.0, self._killed)
        yield Check("a run goes on from a snapshot", IN_PROCESS, 0.0, self._resumed)
        title = "weights and memory of all other blocks are NaN whenever the rule is called"
        yield Check(title, IN_PROCESS, 0.0, self._poisoned)
        yield Check("1 - cosine of its updates, at most 2", "backpropagation", 2.0, self._cosine)

    def _settings(self, lr: float = 0.05, **fields: Any) -> Settings:
        base = {"steps": SAMPLES, "dtype": "float64", "engine": {"kind": "inprocess"}}
        learning = {"lr": lr, **self._named}
        return Settings.model_validate({**base, **self._level, "learning": learning, **fields})

    def _run(self, rules: Any = None, resume: str | None = None, **fields: Any) -> RunResult:
        config = self._settings(**fields)
        return train(self._model(), self._stream(), config, rules=rules, resume=resume)

    def _stream(self) -> Draws:
        return Draws(SAMPLES, missing={5}, ends=self._length)

    def _tried(self) -> float:
        self._plan()
        self._fits = True
        return 0.0

    def _plan(self) -> Plan:
        return plan_of(self._model(), self._settings(), self._stream().spec)

    def _apart(self) -> Difference:
        return difference(self._run(), self._run(engine=RAY))

    def _killed(self) -> Difference:
        rule, method = copy.copy(self._rule), "relax" if self._held else "forward"
        with TemporaryDirectory() as folder:
            dying = partial(_dying, getattr(rule, method), Path(folder, "mark"), os.getpid())
            object.__setattr__(rule, method, dying)
            snapshots = {"path": f"{folder}/kept", "every": 10 * self._ticks}
            result = self._run({"*": rule}, engine=RAY, snapshots=snapshots)
        lost = difference(self._run(), result)
        return lost if result.replaced else Difference(torch.inf, "no process was lost")

    def _resumed(self) -> Difference:
        with TemporaryDirectory() as folder:
            snapshots = {"path": folder, "every": AT * self._ticks, "keep": 9}
            whole = self._run(snapshots=snapshots)
            first = min(path for path in Path(folder).iterdir() if path.is_dir())
            return difference(whole, self._run(resume=str(first)))

    def _poisoned(self) -> Difference:
        network = PlanNodes(self._plan())
        nodes: list[Any] = [*network.nodes.values()]
        tensors = [_tensors(node.block) for node in nodes]
        for node, mine in zip(nodes, tensors, strict=True):
            if hasattr(node.block, "rule"):
                others = [t for block in tensors if block is not mine for t in block]
                node.block.rule.call = partial(_with_nan, node.block.rule.call, others)
        clean = [t for block in self._run().blocks.values() for t in block.theta.values()]
        try:
            network.run(self._stream())
        except DivergedError as error:
            return Difference(torch.inf, f"it reads other blocks: {error}")
        dirty = [t for node in nodes for t in node.block.weights.theta]
        same = all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
        return Difference(0.0 if same else torch.inf, "" if same else "it reads other blocks")

    def _cosine(self) -> Difference:
        """Compare the gradients of the last sample, with weights that do not move."""
        level: dict[str, Any] = {} if self._held else {"level": "backprop"}
        result = self._run(lr=0.0, **level)
        model, samples = result.model, [*self._stream().samples()]
        if self._length is None:
            y = model(samples[-1].u)
        else:  # of the last token, through all of its sequence
            tokens = samples[(len(samples) - 1) // self._length * self._length :]
            y = model(torch.stack([token.u for token in tokens]))[-1]
        loss = cross_entropy(y, samples[-1].target(""))  # type: ignore[arg-type]
        weights = dict(model.named_parameters())
        exact = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        cosines = {}
        for name, block in result.blocks.items():
            keys = {
                key: key if key in exact else f"blocks.{name}.module.{key}" for key in block.omega
            }
            pairs = [(g.flatten(), exact[keys[key]].flatten()) for key, g in block.omega.items()]
            a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
            cosines[name] = float(torch.cosine_similarity(a, b, dim=0))
        note = ", ".join(f"{name} {value:.2f}" for name, value in cosines.items())
        return Difference(1 - sum(cosines.values()) / len(cosines), f"cosine by block: {note}")


def _tensors(block: Any) -> list[Tensor]:
    memory = block.rule.view.memory.values() if hasattr(block, "rule") else []
    return [
        t
        for t in [*block.weights.theta, *memory]
        if isinstance(t, Tensor) and t.is_floating_point()
    ]


def _with_nan(call: Any, others: list[Tensor], *arguments: Any) -> Any:
    before = [t.clone() for t in others]
    torch._foreach_mul_(others, torch.nan)
    result = call(*arguments)
    torch._foreach_copy_(others, before)
    return result


# -- levels ----------------------------------------------------------------------------------------


SKIPS = {"a": {"u": 1}, "b": {"a": 3}, "c": {"a": 1, "b": 1}, "d": {"c": 1, "u": 1}}


class PlainMessages(Rule):
    """Backpropagation, as a rule that a check can interrupt."""

    on_readout = True

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        return block.vjp(kept, message)


class VerifiedLevel(VerifiedRule):
    """The checks of the level that FILE.py:NAME names. Raises SettingsError."""

    def __init__(self, name: str) -> None:
        self.own_level = make_level("--level", name)
        heads = self.own_level.base == "heads"
        super().__init__("mono-forward" if heads else f"{__name__}:{PlainMessages.__name__}")
        self._level = level_fields("--level", name)

    def checks(self) -> Generator[Check, None, None]:
        for blocks, drawn in self.own_level.tables.items():
            table = partial(self.table, blocks, drawn)
            yield Check(f"its table of {blocks} block(s)", "the one drawn by hand", 0.0, table)
        what = "every signal comes before it is used, over skips and delays, too"
        yield Check(what, "its events", 0.0, lambda: float(not self._own_table(SKIPS, 1)))
        yield from super().checks()

    def table(self, blocks: int, drawn: str) -> Difference:
        """Return 1 and the first row that is another one than in a chain's table drawn by hand."""
        by_hand = [_cells(line) for line in drawn.splitlines() if line.strip()]
        chain = {f"block{i}": {f"block{i - 1}" if i else "u": 1} for i in range(blocks)}
        rows = [_cells(line) for line in self._own_table(chain, len(by_hand) - 1).splitlines()]
        for row, expected in zip(rows[1:], by_hand[1:], strict=True):
            if row != expected:
                return Difference(1.0, f"{' | '.join(row)}, by hand {' | '.join(expected)}")
        return Difference(0.0, "")

    def _own_table(self, parents: Mapping[str, Mapping[str, int]], ticks: int) -> str:
        """Return the level's table of a graph: delays by parent of each block."""
        losses = {[*parents][-1]: cross_entropy}
        blocks = [
            BlockSpec(name, nn.Identity(), tuple(into), delays=into, loss=losses.get(name))
            for name, into in parents.items()
        ]
        return self.own_level.table(Graph(blocks), ticks)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]
