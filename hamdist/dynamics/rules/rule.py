"""The interface of a learning rule, and what a rule may read and use of its block.

B: batch, n: numbers of a block's state, O: outputs of the readout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hamdist.errors import GraphError

Updates: TypeAlias = Mapping[str, Tensor]  # by name of a weight, or `memory:NAME`
Messages: TypeAlias = Sequence[Tensor | None]  # by parent, each like its h; None: zeros

MEMORY = "memory:"
# Their arguments: input, weight, bias, and then what else says how the product is taken.
PRODUCTS = (
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)
NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Signals:
    """The signals that a rule asks for, beside the parents' states.

    Attributes:
        back: what comes back about a sample: `message`, the sum of the children's messages;
            `error`, phi dL/dy (B, O) of the first readout, sent to the block at once; `none`.
        label: True if the sample's target travels along with it.
    """

    back: str = "message"
    label: bool = False


class Rule:
    """A learning rule: how a block computes its state, its messages, and its updates.

    Subclasses override the methods that their signals need:

        pulse, back message or error:  forward, backward (and learn, in the tick of the forward)
        pulse, back none:              forward, learn
        hold:                          relax
        sequence:                      as pulse

    What is kept is plain data: numbers, texts, tensors without a graph, and lists, tuples and
    mappings of these. `self` has constants alone: one object serves several blocks and processes.

    Attributes:
        presentation: `pulse` (levels trace, backprop, heads), `hold` (levels local, group), or
            `sequence`: a pulse for each token of a sequence, through a block that reads itself
            (levels trace, backprop). Its own h of the token before is one of its inputs, zeros at
            a sequence's first token (`block.begins`); nothing goes back to it.
        signals: what the rule asks for.
        on_readout: True if the rule may be that of an output net, too, whose message is then its
            own error. Patterns pass over readouts where it is False.
    """

    presentation: ClassVar[str] = "pulse"
    signals: ClassVar[Signals] = Signals()
    on_readout: ClassVar[bool] = False

    def start(self, block: BlockView) -> dict[str, Any]:  # noqa: ARG002
        """Return the memory that the block begins with, plain data by name.

        A tensor that is an `nn.Parameter` is learned: updates for `memory:NAME` move it with the
        step size, optimiser and clipping of the block's weights.

        Args:
            block: with its weights and shapes; h is zeros.
        """
        return {}

    def forward(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Compute the state of a sample.

        Args:
            block: the block.
            inputs: the parents' states, (B, ...) each.

        Returns:
            h (B, ...), and what is kept of the sample until `learn` and `backward`: plain data.
        """
        return block.f(inputs), list(inputs)

    def learn(self, block: BlockView, kept: Any, label: Tensor | None) -> Updates:
        """Return the updates of the tick in which the sample passes, right behind `forward`.

        Args:
            block: the block.
            kept: what `forward` kept.
            label: of the sample, (B, ...); None where the signals ask for none. A sample without a
                label has no call then.

        Returns:
            Gradient-like tensors by weight: the optimiser moves against them.
        """
        raise NotImplementedError("a rule of your own has its own learn()")

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        """Compute what goes back to the parents, and the updates.

        Args:
            block: the block.
            kept: what `forward` kept.
            message: the sum of the children's messages (B, ...), like h; or the error (B, O). A
                sample without either (its target is missing) has no call.

        Returns:
            One message for each parent, like its state (None: no message), and the updates as of
            `learn`.
        """
        raise NotImplementedError("a rule of your own has its own backward()")

    def relax(
        self, block: BlockView, inputs: Sequence[Tensor], message: Tensor
    ) -> tuple[Tensor, Messages, Updates]:
        """Compute one tick of a held block.

        Args:
            block: with its state h and its tick.
            inputs: the parents' states, (B, ...) each.
            message: the sum of the children's messages, like h; zeros where none has come.

        Returns:
            The next h, one message for each parent, and the updates, which act in ticks in which
            `block.learns`.
        """
        raise NotImplementedError("a rule of your own has its own relax()")

    def nudges(self, ticks: int) -> list[float]:  # noqa: ARG002
        """Return the scale of the loss by tick of a held sample, where the rule needs another than
        1: a run is refused whose `dynamics.phi` is not {values: these, cycle: true}.

        Args:
            ticks: of a sample.
        """
        return []

    def feedback(self, block: BlockView) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return the matrices that take the place of weights on the way back, by weight.

        Only figures read them: how well they are aligned with the weights (`metrics.alignment`).

        Args:
            block: the block.
        """
        return {}

    def overrides(self, method: str) -> bool:
        """Return True if the class has a method of its own.

        Args:
            method: its name.
        """
        return getattr(type(self), method) is not getattr(Rule, method)


@dataclass
class BlockView:
    """A block as its rule may read and use it.

    Attributes:
        name: of the block; depth: ticks from the input; readout: True for an output net.
        own: place of its own state of the token before among the inputs, in a sequence.
        theta: the weights that are learned, by name; as they are now, and not to be written to.
        memory: the rule's own plain data by name, which it may change.
        shape: of h, inputs: of each parent's h, outputs: of the first readout's prediction; all
            without the batch.
        batch: B, of the sample; sample: its number.
        initial: h at the start, of the batch with which the run begins.
        tick: of a held block; age: ticks since its sample is at the input; ticks: of a sample.
        learns: True in the ticks in which the weights of a held block move.
    """

    name: str
    module: nn.Module
    theta: dict[str, Tensor]
    shape: tuple[int, ...]
    inputs: list[tuple[int, ...]]
    outputs: tuple[int, ...]
    depth: int
    readout: bool
    wanted: Sequence[bool]
    join: Callable[[Sequence[Tensor]], list[Tensor]]
    seed: Callable[[str], int]
    random: Callable[[str], AbstractContextManager[None]]
    initial: Tensor
    copies: bool = False
    own: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    batch: int = 0
    sample: int = 0
    tick: int = 0
    age: int = 0
    ticks: int = 0
    learns: bool = True
    _h: Tensor | None = field(default=None, init=False)
    _begins: bool = field(default=True, init=False)

    def at(self, phase: str, sample: int, batch: int) -> None:
        """Move to a phase of a sample, or of a tick: random numbers begin anew.

        Args:
            phase: 'forward', 'backward', 'learn' or 'relax'.
            sample: its number.
            batch: B of it.
        """
        self.sample, self.batch, self._phase = sample, batch, phase
        self._generator: torch.Generator | None = None
        self._first = phase in ("forward", "relax")  # the pass in which buffers move

    def in_tick(self, h: Tensor, k: int, ticks: int, *, learns: bool) -> None:
        """Move a held block to a tick.

        Args:
            h: its state then, (B, ...).
            k: the tick.
            ticks: of a sample.
            learns: True if weights move in it.
        """
        self._h, self.tick, self.age, self.ticks, self.learns = h, k, k % ticks, ticks, learns

    def in_sample(self, *, begins: bool, h: Tensor | None = None) -> None:
        """Move to a pulse's forward pass, and behind it with its h.

        Args:
            begins: True if it is the first token of a sequence.
            h: (B, ...).
        """
        self._begins, self._h = begins, h

    @property
    def h(self) -> Tensor:
        """Return the state (B, ...): in `relax` of the tick, in `learn` of the sample, in `start`
        the initial one. Raises GraphError in `forward` and `backward`, where none is the sample's.
        """
        state = self.initial if self._phase == "start" else self._h
        if state is None or self._phase in ("forward", "backward", "feedback"):
            self._refuse("h", "return what `backward` needs of it as a part of `kept`")
        return state

    @property
    def begins(self) -> bool:
        """Return True in `forward` (and `learn`) of a sequence's first token.

        Raises GraphError in `backward`: other tokens have passed since, and one without a target
        has no call. Traces are moved on in `forward`.
        """
        if self._phase not in ("forward", "learn"):
            self._refuse("begins", "move traces on in `forward`, which every token has")
        return self._begins

    def _refuse(self, name: str, remedy: str) -> NoReturn:
        where = f"rule of block {self.name!r}: block.{name} in {self._phase}()"
        raise GraphError(f"{where} is of another sample: {remedy}")

    @property
    def generator(self) -> torch.Generator:
        """Return a generator that depends on the run's seed, the block and the sample alone."""
        if self._generator is None:
            seed = self.seed(f"{self._phase} {self.sample} {self.tick}")
            self._generator = torch.Generator().manual_seed(seed)
        return self._generator

    def randn_like(self, tensor: Tensor) -> Tensor:
        """Return normal numbers of the shape, type and device of a tensor, from `generator`.

        Args:
            tensor: of any shape.
        """
        return torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype).to(tensor)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Return the weights of two or more dimensions: those of linear layers, convolutions."""
        owner = {n: self.module.get_submodule(n.rpartition(".")[0]) for n in self.theta}
        products = {n for n, part in owner.items() if not isinstance(part, NO_PRODUCT)}
        return {n: w for n, w in self.theta.items() if w.dim() > 1 and n in products}

    def f(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return f(inputs; theta), (B, ...), without a graph.

        Args:
            inputs: the parents' states, (B, ...) each.
        """
        with torch.no_grad():
            return self._run([x.detach() for x in inputs], self.theta)

    def vjp(
        self,
        inputs: Sequence[Tensor],
        cotangent: Tensor,
        feedback: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Return (cotangent^T df/dinput per parent, cotangent^T df/dtheta by weight) at `inputs`.

        The module runs once more, with today's weights and the random numbers of the sample's
        forward pass.

        Args:
            inputs: as `forward` got them.
            cotangent: like h.
            feedback: matrices by weight, through which the cotangent goes to the inputs of linear
                layers and convolutions in place of the weights:
                    dL/dx = B^T dL/d(W x),        dL/dW = dL/d(W x) x^T

        Raises:
            GraphError: a weight in `feedback` is of no linear layer or convolution.
        """
        pairs = zip(inputs, self.wanted, strict=True)
        leaves = [x.detach().requires_grad_(want and x.is_floating_point()) for x, want in pairs]
        theta = {name: t.detach().requires_grad_() for name, t in self.theta.items()}
        other = feedback if feedback and any(self.wanted) else {}
        by_weight = {id(theta[name]): (name, b) for name, b in other.items()}
        with torch.enable_grad(), _Feedback(by_weight) as used:
            h = self._run(leaves, theta)
        unused = [name for key, (name, _) in by_weight.items() if key not in used.seen]
        if unused:
            where = f"block {self.name!r}: {unused[0]!r} is of no linear layer or convolution"
            raise GraphError(f"{where}, so no other matrix can take its place on the way back")
        wrt = [x for x in leaves if x.requires_grad] + list(theta.values())
        pulled: Sequence[Tensor] = [torch.zeros_like(w) for w in wrt]
        if h.requires_grad:
            pulled = torch.autograd.grad(h, wrt, cotangent, materialize_grads=True)
        each = iter(pulled)
        messages = [next(each) if x.requires_grad else None for x in leaves]
        return messages, dict(zip(theta, each, strict=True))

    def row_jacobians(
        self, inputs: Sequence[Tensor], cotangents: Tensor, *, weights: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return cotangents^T df/dh (B, K, n) of the block's own state h, and cotangents^T
        df/dtheta by weight (B, K, ...), of each row of a sequence alone.

        Args:
            inputs: as `forward` got them.
            cotangents: K of them, (K, n).
            weights: False to leave the second out.
        """
        place = self.own or 0

        def pulled(*row: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            def f(h: Tensor, by_name: Mapping[str, Tensor]) -> Tensor:
                arguments = [*row[:place], h, *row[place + 1 :]]
                return self._run([x[None] for x in arguments], {**self.theta, **by_name})[0]

            pull = torch.func.vjp(f, row[place], self.theta if weights else {})[1]
            result: tuple[Tensor, dict[str, Tensor]] = torch.func.vmap(pull)(cotangents)
            return result

        rows: tuple[Tensor, dict[str, Tensor]] = torch.func.vmap(pulled)(*inputs)
        return rows

    def _run(self, inputs: Sequence[Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        values = dict(theta)
        if not self._first:  # buffers (of BatchNorm, say) have moved in the forward pass
            values |= {name: b.clone() for name, b in self.module.named_buffers()}
        self._first = False
        with self.random(f"module {self.sample} {self.tick}"):
            inputs = [x.clone() for x in inputs] if self.copies else inputs
            output = functional_call(self.module, values, tuple(self.join(inputs)))
        if not isinstance(output, Tensor):
            raise GraphError(f"block {self.name!r} returned {type(output).__name__}, not a tensor")
        return output


class _Feedback(TorchFunctionMode):
    """Sends cotangents of products through other matrices: (name, B) by the weight's identity."""

    def __init__(self, matrices: Mapping[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self._matrices = matrices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = id(args[1]) if func in PRODUCTS and len(args) > 1 else 0
        if key not in self._matrices:
            return func(*args, **kwargs)
        self.seen.add(key)
        x, w, *rest = args
        out = func(x.detach(), w, *rest, **kwargs)
        if not x.requires_grad:
            return out
        kwargs = {**kwargs, "bias": None} if "bias" in kwargs else kwargs
        back = func(x, self._matrices[key][1], *([None, *rest[1:]] if rest else []), **kwargs)
        return out + (back - back.detach())  # adds nothing to the value
