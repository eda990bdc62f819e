"""torch's optimisers on a block's own weights, instead of the last of Hamilton's equations.

    g_k     = tau (phi dL/dtheta + z^T dh/dtheta)          the gradient, clipped by `learning.clip`
    theta_k+1, state_k+1 = optimizer.step(theta_k, g_k, state_k),       lr = lr_k s_k

with s_k the factor of the step size by sample (learning_rate.py) and of its delay. g is handed over
once per message, dense, as `.grad`; omega is then the latest g. Where several uses of a weight give
gradients, g is their sum. One optimiser (or several) per block: nothing of it is seen elsewhere.
A scheduler of torch.optim.lr_scheduler is stepped once per sample, with or without a target.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hamdist.config import MUON, VECTORS, OptimizerSettings, Order, optimizer_class
from hamdist.dynamics.finite import OutOfRange, StepFactor
from hamdist.dynamics.graph.patterns import fitting
from hamdist.dynamics.saved_state.stateful import Stateful, as_text, check_names, plain_parts
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.dynamics.updates.optimizer_state import own_attributes, state_forms, without_arrays
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient, Unused, dense
from hamdist.dynamics.vjp.seeding import OwnGenerator, block_seed
from hamdist.errors import SettingsError

OptimizerFunction: TypeAlias = "Callable[[list[nn.Parameter]], Optimizer | Sequence[Optimizer]]"
SchedulerFunction: TypeAlias = Callable[[Optimizer], Any]

_STATE = ("kinds", "optimizers", "schedulers", "began", "item", "own", "random")
# Steps that take every number of a weight by itself: those of a slice are those of the whole.
ELEMENTWISE = {
    *("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam"),
    *("ASGD", "Rprop", "Lion"),
}


@dataclass(frozen=True)
class OptimizerRule:
    """Maker of the optimisers of a run's blocks: by settings, or by functions of the user's.

    Attributes:
        lr: The step size of all blocks; lrs: of some, by pattern of their names.
        qualified: Weights are known by BLOCK.NAME in patterns, as those of a hand-built graph.
        kinds: The classes of the optimisers, by block.
        own: The class, or the function, that `settings` names, where it is not torch's.
        seed: Of what a user's optimisers draw.
    """

    settings: OptimizerSettings | None = None
    function: OptimizerFunction | None = None
    scheduler: SchedulerFunction | None = None
    lr: float = 0.0
    lrs: Mapping[str, float] = field(default_factory=dict)
    qualified: bool = False
    kinds: Mapping[str, list[str]] = field(default_factory=dict)
    own: Callable[..., Any] | None = None
    seed: int = 0

    def full_name(self, block: str, name: str) -> str:
        """Return the name of a weight in patterns."""
        return f"{block}.{name}" if self.qualified else name

    def optimizers(self, block: str, named: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """Make the optimisers of a block's weights.

        Raises:
            SettingsError: The user's function failed, or did not return what it should.
        """
        if self.settings is None:
            return self._by_function(block, list(named.values()))
        pattern = fitting(block, self.lrs)
        lr = self.lr if pattern is None else self.lrs[pattern]
        full = {self.full_name(block, name): p for name, p in named.items()}
        if self.own is None:
            return _by_settings(self.settings, lr, full)
        origin = f"learning.optimizer {self.settings.name!r}"
        make = functools.partial(self.own, **self.settings.options, lr=lr)
        opt = _called(origin, block, make, _grouped(self.settings, full))
        if not isinstance(opt, Optimizer):
            raise SettingsError(
                f"{origin} made a {type(opt).__name__}; name a torch.optim.Optimizer"
            )
        _check_optimizer(opt, block, list(named.values()))
        return [opt]

    def _by_function(self, block: str, parameters: list[nn.Parameter]) -> list[Optimizer]:
        if self.function is None:
            raise TypeError("a rule has settings or a function")
        result = _called("optimizer", block, self.function, parameters)
        optimizers = list(result) if isinstance(result, (list, tuple)) else [result]
        for opt in optimizers:
            if not isinstance(opt, Optimizer):
                raise SettingsError(
                    f"optimizer: the function returned a {type(opt).__name__} for block {block!r}; "
                    "return a torch.optim.Optimizer of the parameters that it gets, or several"
                )
            _check_optimizer(opt, block, parameters)
        seen = [id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]]
        if len(seen) > len(set(seen)):
            raise SettingsError(
                f"optimizer: two optimisers of block {block!r} have the same parameter; give each "
                "parameter to one of them"
            )
        return optimizers

    def schedulers(self, block: str, optimizers: Sequence[Optimizer]) -> list[Any]:
        """Make the scheduler of each optimiser.

        Raises:
            SettingsError: The user's function failed, or did not return a scheduler by sample.
        """
        if self.scheduler is None:
            return []
        schedulers = [_called("scheduler", block, self.scheduler, opt) for opt in optimizers]
        for lr in schedulers:
            if isinstance(lr, ReduceLROnPlateau) or not isinstance(lr, LRScheduler):
                raise SettingsError(
                    f"scheduler: the function returned a {type(lr).__name__}; return a scheduler "
                    "of torch.optim.lr_scheduler whose step() needs no measured loss: it is "
                    "stepped once per sample"
                )
        return schedulers


def _called(option: str, block: str, function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:
        raise SettingsError(
            f"{option}: the function failed for block {block!r}: {type(error).__name__}: {error} "
            "(it is called for each block alone: a list that it picks of them may be empty)"
        ) from error


def _check_optimizer(opt: Optimizer, block: str, parameters: Sequence[nn.Parameter]) -> None:
    kind, owned = type(opt).__name__, {id(p) for p in parameters}
    closure = inspect.signature(opt.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SettingsError(
            f"optimizer: {kind} asks for the loss again within a step (a closure), which a block "
            "does not have; use one that moves by the gradient alone"
        )
    if not {"state", "param_groups"} <= opt.state_dict().keys():
        raise SettingsError(
            f"optimizer: the state_dict() of {kind} has no 'state' and 'param_groups' for snapshots"
            ": call super().__init__(), and keep what changes in self.state, as torch does"
        )
    for group in opt.param_groups:
        if not all(id(p) in owned for p in group["params"]):
            raise SettingsError(
                f"optimizer: {kind} of block {block!r} has parameters that are not the block's; "
                "make it of those that the function gets"
            )
        if "lr" not in group:
            raise SettingsError(
                f"optimizer: {kind} has no 'lr' in its parameter groups, which learning.decay, "
                "delay_power and schedulers change; give it one"
            )


def _by_settings(
    s: OptimizerSettings, lr: float, named: Mapping[str, nn.Parameter]
) -> list[Optimizer]:
    """Return the optimisers that settings name. named: parameters by the names of patterns."""
    options = {**s.options, "lr": lr}
    parts = [(s.name, options, dict(named))]
    if s.name == MUON:
        shared = {k: v for k, v in options.items() if k in ("lr", "weight_decay")}
        matrices = {name: p for name, p in named.items() if p.ndim == 2}
        others = {name: p for name, p in named.items() if p.ndim != 2}
        parts = [(MUON, options, matrices), ("adamw", {**shared, **s.rest}, others)]
    return [
        optimizer_class(name)(_grouped(s, part), **keywords)
        for name, keywords, part in parts
        if part
    ]


def _grouped(s: OptimizerSettings, named: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameter groups: first of what no pattern fits, then one for each pattern."""
    groups: dict[str | None, list[nn.Parameter]] = {None: [], **{p: [] for p in s.groups}}
    for name, p in named.items():
        fits = [pattern for pattern in s.groups if _fits(name, p, pattern)]
        groups[name if name in fits else next(iter(fits), None)].append(p)
    return [
        {"params": options, **({} if pattern is None else s.groups[pattern])}
        for pattern, options in groups.items()
        if options
    ]


def _fits(name: str, p: Tensor, pattern: str) -> bool:
    return p.ndim < 2 if pattern == VECTORS else fitting(name, [pattern]) is not None


class BlockOptimizers(Stateful):
    """The optimisers of one block, and their schedulers.

    Their state is what `state_dict` says, with weights by name instead of by number. A run that
    goes on with other arguments than before takes over the state of each weight; groups and
    schedulers begin as the new arguments say, the latter at the sample that has been reached.
    A user's class has its plain attributes and optimisers inside it in the state, too, and draws
    random numbers from a generator of the block's own.
    """

    def __init__(self, rule: OptimizerRule, block: str, named: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(p): name for name, p in named.items()}
        (first, p), *_ = named.items()
        self._parameters = list(named.values())
        self._generator = OwnGenerator(block_seed(rule.seed, f"{block}/{first}/steps"), p.device)
        with self._generator:
            self.optimizers = rule.optimizers(block, named)
        self._own = [o for o in self.optimizers if not type(o).__module__.startswith("torch.optim")]
        self._made = [dict(vars(opt)) for opt in self._own]
        inside = [v for o in self._own for v in vars(o).values() if isinstance(v, Optimizer)]
        self._with_inside = [*self.optimizers, *inside]
        self.schedulers = rule.schedulers(block, self.optimizers)
        self._sample = 0  # which the schedulers stand at
        groups = [self._by_name(opt)["param_groups"] for opt in self._with_inside]
        self._began: Any = copy.deepcopy([groups, self._scheduled()])  # their arguments

    def step(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Move the weights by `gradients`, with `factor` times the step sizes of the groups.

        None: of a weight that was not used, which torch's optimisers leave as it is.
        """
        groups = [group for opt in self.optimizers for group in opt.param_groups]
        rates = [group["lr"] for group in groups]
        places = [p.data for p in self._parameters]
        for p, g in zip(self._parameters, gradients, strict=True):
            # (a clone: some optimisers use it up, as foreach with Nesterov's momentum)
            p.grad = None if g is None else g.clone()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        with self._generator if self._own else nullcontext():
            for opt in self.optimizers:
                opt.step()
        for p, place in zip(self._parameters, places, strict=True):
            if p.data_ptr() != place.data_ptr():  # an optimiser of a user's has put another there
                p.data = place.copy_(p.data)
            p.grad = None
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def advance(self, sample: int) -> None:
        """Step the schedulers up to `sample`."""
        while self._sample < sample:
            with warnings.catch_warnings():
                if not self._sample:  # (a sample without target has no step of the optimiser)
                    warnings.filterwarnings("ignore", r".*lr_scheduler\.step\(\)")
                for opt in self.schedulers:
                    opt.step()
            self._sample += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "kinds": [type(opt).__name__ for opt in self.optimizers],
            "optimizers": [self._by_name(opt) for opt in self._with_inside],
            "schedulers": self._scheduled(),
            "began": self._began,
            "item": self._sample,
            "own": [
                plain_parts(own_attributes(opt), made, self._parameters)
                for opt, made in zip(self._own, self._made, strict=True)
            ],
            "random": self._generator.state_dict() if self._own else None,
        }

    def _scheduled(self) -> list[dict[str, Any]]:
        """Return the states of the schedulers, without the functions that they are made of."""
        return [plain_parts(scheduler.state_dict()) for scheduler in self.schedulers]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        state = {"own": [], "random": None, **state}  # (of earlier versions)
        check_names("optimiser", state, _STATE)
        alike = as_text(state["began"]) == as_text(self._began)
        kinds = [type(opt).__name__ for opt in self.optimizers]
        check_names("block's optimisers", dict.fromkeys(state["kinds"]), kinds)
        for own, attributes in zip(self._own, state["own"], strict=False):
            vars(own).update(attributes)
        if state["random"] is not None:
            self._generator.load_state_dict(state["random"])
        for opt, saved in zip(self._with_inside, state["optimizers"], strict=False):
            names, was = self._order(opt), saved["param_groups"]
            then = [name for group in was for name in group["params"]]
            check_names("optimiser", dict.fromkeys(then), names)
            groups = was if alike else self._by_name(opt)["param_groups"]
            if state_forms(was) != state_forms(groups):
                continue  # (the state has another form, and begins anew)
            place = {name: i for i, name in enumerate(names)}
            numbered = [{**g, "params": [place[n] for n in g["params"]]} for g in groups]
            by_place = {place.get(k, k): without_arrays(v) for k, v in saved["state"].items()}
            here = list(opt.param_groups)
            opt.load_state_dict({**saved, "state": by_place, "param_groups": numbered})
            for group, values in zip(here, opt.param_groups, strict=True):
                group.update(values)
            opt.param_groups[:] = here  # (an optimiser inside another has the same groups)
            for p in self._parameters:  # (`load_state_dict` gives tensors the type of the weight)
                if self._names[id(p)] in saved["state"]:
                    opt.state[p].update(saved["state"][self._names[id(p)]])
        if alike:
            self._sample = state["item"]
            for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
                scheduler.load_state_dict(saved)

    def _order(self, opt: Optimizer) -> list[str]:
        return [self._names[id(p)] for group in opt.param_groups for p in group["params"]]

    def _by_name(self, opt: Optimizer) -> dict[str, Any]:
        names, state = self._order(opt), opt.state_dict()
        groups = [{**g, "params": [names[i] for i in g["params"]]} for g in state["param_groups"]]
        by_name = {names[k] if isinstance(k, int) else k: v for k, v in state["state"].items()}
        return {**state, "state": by_name, "param_groups": groups}


class OptimizerWeights(Weights):
    """theta, moved by optimisers of torch's. omega: the latest gradient."""

    STATE = ("updates", "_omega", "average", "_inputs", "optimizers")
    ADDED: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        theta: Sequence[Tensor],
        dynamics: Dynamics,
        order: Order,
        names: Sequence[str],
        rule: OptimizerRule,
        block: str,
    ) -> None:
        super().__init__(theta, dynamics, order, names)
        # Parameters that share memory with theta: autograd's graphs do not see them move.
        parameters = [nn.Parameter(t) for t in self.theta]
        self.optimizers = BlockOptimizers(rule, block, dict(zip(names, parameters, strict=True)))

    def scaled_by(self, factor: StepFactor, sample_of: Callable[[int], int]) -> StepFactor:
        """Return the factor as `Weights.scaled_by`; the schedulers follow the samples."""
        if not self.optimizers.schedulers:
            return factor

        def followed(sample: int) -> float:
            self.optimizers.advance(sample_of(sample))
            return factor(sample)

        return followed

    def at_once(self, factor: float, tau: float) -> AtOnce | None:  # noqa: ARG002
        """Return None: the optimiser gets whole gradients."""
        return None

    def conclude(self, factor: float, tau: float, unused: Collection[int] = ()) -> None:  # noqa: ARG002
        """Move theta by the gradient that several `integrate` have gathered."""
        self.updates += 1
        if self.theta:
            used = [None if i in unused else g_i for i, g_i in enumerate(self.omega)]
            self.optimizers.step(used, factor)
            if self.average is not None:
                self.average.update()

    def _move(self, g: Sequence[Gradient] | None, factor: float, tau: float) -> None:
        if g is None:
            g = [torch.zeros_like(t) for t in self.theta]
        if self._inputs is not None:
            g = self._inputs.applied(g)
        gain = self._gain(g, tau)
        # Fresh tensors: omega outlives the memory of gradients.
        gradients = [g_i.clone() if isinstance(g_i, Tensor) else dense(g_i) for g_i in g]
        if gain != 1:
            torch._foreach_mul_(gradients, gain)
        norm = math.hypot(*(float(n) for n in torch._foreach_norm(gradients)))
        if not norm <= self._limit:
            raise OutOfRange("omega", norm)
        self.omega = gradients
        pairs = zip(g, gradients, strict=True)
        used = [None if isinstance(g_i, Unused) else omega for g_i, omega in pairs]
        self.optimizers.step(used, factor)
