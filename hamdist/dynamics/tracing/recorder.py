"""The operations of a model, recorded while it runs on plain tensors.

torch.fx runs a model on stand-ins, which fail at `isinstance(x, Tensor)`, at
`torch.arange(x.shape[1])` or `assert x.shape[1] <= 128`. Here it runs on real tensors under a
`TorchFunctionMode`, which sees every call of torch; numbers that belong to the batch show when two
runs with other batches differ (trace.py). A module is one step where it is torch's own, or where
it was asked to stay whole.

What cannot be followed raises `Unfollowed`: a value of a tensor that decides what happens next (a
bool, a number, numpy), a call that torch does not show (an autograd.Function, a scripted
function), a weight that is not registered, something that is left behind in the model.
B: batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from hamdist.dynamics.tracing.program import (
    CONSTANT,
    DeviceRef,
    Op,
    Recording,
    TakenOp,
    is_constant,
    is_weight,
    value_of,
)
from hamdist.dynamics.tracing.recorded_calls import (
    TorchCall,
    Unfollowed,
    address_of,
    as_call,
    autocast_state,
    backward_of,
    is_plain,
    is_stateful,
    line_here,
    line_of,
    masks_stay,
    other_objects,
    without_others,
)
from hamdist.dynamics.user_modules.hooks import hook_of
from hamdist.dynamics.user_modules.python_state import SETS_REQUIRES_GRAD
from hamdist.dynamics.user_modules.structure import (
    Path,
    filled,
    getter,
    parts_of,
    paths_of_tensors,
    tensors_in,
)
from hamdist.errors import GraphError

# What may be asked of a tensor without reading its values.
# fmt: off
ABOUT = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset",
    "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_conj", "is_neg",
    "is_inference", "is_pinned", "is_shared", "is_same_size", "is_set_to", "is_tensor",
    "element_size", "get_device", "data_ptr", "type", "__len__", "__hash__", "__format__",
    "__repr__", "has_names", "result_type", "is_storage", "is_distributed", "is_coalesced",
    "untyped_storage", "storage", "retain_grad",
})
_SETTERS = ("_set_grad_enabled", "_set_autocast", "set_autocast")


def record(
    model: nn.Module, inputs: Mapping[str, Tensor], call: Callable[..., Any], whole: set[str]
) -> Recording:
    """Record one run of `call(model, inputs)`.

    model: one that `watch` prepared. whole: modules that stay one step. Raises Unfollowed.
    """
    recorder = _Recorder(model, inputs, whole)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in model.modules():
        if type(part).__mro__[1].__name__ == "_Watched":
            object.__setattr__(part, "_hamdist_recorder", recorder)
    try:
        with masks_stay(), recorder:
            output = call(model, inputs)
    except Unfollowed:
        raise
    except Exception as error:  # a user's forward may raise anything
        if recorder.failure is not None:
            raise recorder.failure from None
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"it raised {type(error).__name__}: {first}"
        raise Unfollowed(reason, recorder.inner_at_failure or "", line_of(error)) from error
    finally:
        for part in model.modules():
            vars(part).pop("_hamdist_recorder", None)
        changed = learned ^ {name for name, p in model.named_parameters() if p.requires_grad}
        if changed:
            raise GraphError(SETS_REQUIRES_GRAD.format(min(changed)))
    if recorder.failure is not None:
        raise recorder.failure
    return recorder.finished(output)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], whole: set[str]) -> None:
        super().__init__()
        self._names = {id(part): name for name, part in model.named_modules()}
        self._whole = whole
        self._stack: list[str] = []
        self._inside = 0  # steps under way
        self.failure: Unfollowed | None = None
        self.inner_at_failure: str | None = None
        self._graph = fx.Graph()
        self._ops: list[TakenOp] = []
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._graded: dict[int, object] = {}  # `backward_of` it when it was made
        self._constants: list[Tensor] = []
        self._origin: dict[int, fx.Node | int] = {}
        self._writers: dict[int, set[int]] = {}
        self._readers: dict[int, set[int]] = {}
        self._varying: set[int] = set()  # memory that was written to from what varies
        self._autocast = autocast_state()
        self._learned = {name for name, _ in model.named_parameters()}
        placeholders = [self._graph.placeholder(name) for name in inputs]
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._learn(tensor, self._graph.get_attr(name))
        self._registered = set(self._nodes)
        for node, tensor in zip(placeholders, inputs.values(), strict=True):
            self._learn(tensor, node)

    # -- what torch shows -----------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func.__self__.__name__, args[0])
        weight = name == "requires_grad_" and id(args[0]) in self._registered
        if name.startswith(_SETTERS) or weight:
            return func(*args, **kwargs)
        if name in ("__set__", "backward", "set_", "set_data") or name.startswith("register_"):
            raise self._fails(f"it calls {name} on a tensor")
        call = as_call(func, name, args, kwargs)
        return self._take(call, args, kwargs, lambda: func(*args, **kwargs), name)

    def _attribute(self, name: str, tensor: Tensor) -> Any:
        if name == "grad_fn":
            raise self._fails("it reads grad_fn of a tensor, whose hooks are not followed")
        value = getattr(tensor, name)
        if not isinstance(value, Tensor):
            return value
        call = TorchCall("call_function", getattr, (tensor, name), {})
        return self._take(call, (tensor,), {}, lambda: value, name)

    def module(
        self, part: nn.Module, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if self._inside:
            return run(*args, **kwargs)
        name = self._names[id(part)]
        if name in self._whole or (name and part._hamdist_one_step):
            self._check_weights(part)
            call = TorchCall("call_module", name, args, kwargs)
            return self._take(call, args, kwargs, lambda: run(*args, **kwargs), name, part=part)
        self._check_backward((args, kwargs))
        self._stack.append(name)
        hook = hook_of(part)
        if hook is not None:
            raise self._fails(f"it has a {hook}")
        try:
            out = run(*args, **kwargs)
            self._check_backward(out)
            return out
        except Exception:
            if self.inner_at_failure is None:
                self.inner_at_failure = name
            raise
        finally:
            self._stack.pop()

    def _check_weights(self, part: nn.Module) -> None:
        """Fail where other tensors have taken the places of a module's weights for this call."""
        with self._a_step():
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                if id(tensor) not in self._registered:
                    raise self._fails(f"it calls a module with another {name!r} (functional_call)")

    @property
    def _innermost(self) -> str:
        """Return the innermost active module."""
        return self._stack[-1] if self._stack else ""

    def _fails(self, reason: str) -> Unfollowed:
        """Return the failure, and keep it in case the model catches it."""
        if self.failure is None:
            self.failure = Unfollowed(reason, self._innermost, line_here())
        return self.failure

    def _check_backward(self, value: Any) -> None:
        """Fail where an autograd.Function has made a tensor since the last step."""
        with self._a_step():
            for tensor in tensors_in(value):
                if id(tensor) in self._nodes and backward_of(tensor) != self._graded[id(tensor)]:
                    raise self._fails(
                        "it uses an autograd.Function, whose backward is not followed"
                    )

    # -- steps ----------------------------------------------------------------------------------

    @contextmanager
    def _a_step(self) -> Iterator[None]:
        """Context inside of which calls are no steps of the model."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def _take(
        self,
        call: TorchCall,
        args: Any,
        kwargs: dict[str, Any],
        run: Callable[[], Any],
        name: str,
        part: nn.Module | None = None,
    ) -> Any:
        with self._a_step():
            inputs = list(tensors_in((args, kwargs)))
            arguments = self._template(call.args), self._template(call.kwargs)
            node = self._graph.create_node(call.op, call.target, *arguments)
            if autocast_state() != self._autocast:
                raise self._fails("it switches autocast on or off")
            versions = [t._version for t in inputs]
            chance = torch.get_rng_state()
            out = run()
            random = not torch.equal(torch.get_rng_state(), chance)
            written = [t for t, v in zip(inputs, versions, strict=True) if t._version != v]
            outputs = list(paths_of_tensors(out))
            varies = random or self._varies(node) or (part is not None and is_stateful(part))
            if not outputs and not written:
                about = part is not None or not inputs or name in ABOUT
                if not about and varies:
                    raise self._fails(f"what it does depends on values of a tensor ({name})")
                if part is None and not random:
                    self._graph.erase_node(node)
                    return out
            if part is not None or inputs or outputs:
                for odd in other_objects(out):
                    raise self._fails(
                        f"{name} returns a {type(odd).__name__}, which is not followed"
                    )
            self._note(node, inputs, written, outputs, random=random, varies=varies)
            return out

    def _note(
        self,
        node: fx.Node,
        inputs: list[Tensor],
        written: list[Tensor],
        outputs: list[tuple[Path, Tensor]],
        *,
        random: bool,
        varies: bool,
    ) -> None:
        k = len(self._ops)
        recorded: TakenOp = Op(
            node, torch.is_grad_enabled(), self._innermost, line_here(), tuple(self._stack),
            dict(outputs), {}, random, varies, set(), set(), set(),
        )  # fmt: skip
        self._ops.append(recorded)
        for tensor in inputs:
            memory = address_of(tensor)
            recorded.reads |= self._writers.get(memory, set())
            if memory in self._varying:
                recorded.varies = True
            self._readers.setdefault(memory, set()).add(k)
        for tensor in written:
            memory = address_of(tensor)
            origin = self._origin.get(memory)
            if is_constant(origin):
                raise self._fails("it writes to a tensor that outlives the call")
            if is_weight(origin) and origin.target in self._learned:
                raise self._fails(f"it changes its weight {origin.target!r}")
            recorded.writes.add(memory)
            recorded.reads |= self._readers.get(memory, set()) - {k}
            self._writers.setdefault(memory, set()).add(k)
            self._graded[id(tensor)] = backward_of(tensor)
            if recorded.varies:
                self._varying.add(memory)
        for path, tensor in outputs:
            memory = address_of(tensor)
            recorded.memory.add(memory)
            self._origin.setdefault(memory, k)
            result = node
            for key in path:
                result = self._graph.call_function(getter(key), (result, key))
            result.meta["value"] = (k, path)
            recorded.nodes[path] = result
            self._nodes[id(tensor)] = (tensor, result)
            self._graded[id(tensor)] = backward_of(tensor)

    def _learn(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = (tensor, node)
        self._graded[id(tensor)] = backward_of(tensor)
        self._origin.setdefault(address_of(tensor), node)

    def _varies(self, node: fx.Node) -> bool:
        values = [(input_node, value_of(input_node)) for input_node in node.all_input_nodes]
        return any(
            not is_constant(input_node) if value is None else self._ops[value[0]].varies
            for input_node, value in values
        )

    # -- templates ------------------------------------------------------------------------------

    def _template(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        kind = type(value)
        parts = parts_of(value)
        if parts is not None:
            return filled(value, [self._template(part) for _, part in parts])
        if kind is slice:
            return slice(*(self._template(v) for v in (value.start, value.stop, value.step)))
        if kind is torch.device and value.type == "cpu":
            return DeviceRef()
        if isinstance(value, torch.Generator):
            raise self._fails("it uses a random generator of its own")
        if not is_plain(value):
            raise self._fails(f"it passes a {kind.__name__} on, which may hold tensors")
        return value

    def _tensor(self, tensor: Tensor) -> fx.Node:
        entry = self._nodes.get(id(tensor))
        if entry is not None:
            self._check_backward(tensor)
            return entry[1]
        if tensor.requires_grad:
            origin = "a weight that is not registered" if tensor.is_leaf else "an operation unseen"
            raise self._fails(f"it uses {origin} (autograd.Function, compiled or foreign code)")
        if tensor.layout != torch.strided:
            raise self._fails("it uses a sparse tensor that it keeps beside its weights")
        node = self._graph.get_attr(CONSTANT.format(len(self._constants)))
        self._constants.append(tensor)
        self._learn(tensor, node)
        return node

    def finished(self, output: Any) -> Recording:
        """Return the recording. Of the output what can be learned: a cache, or another object that
        is neither a tensor nor a plain value, is left out where there are tensors beside it.
        """
        learnable = without_others(output)
        for odd in () if any(paths_of_tensors(learnable)) else other_objects(output):
            raise Unfollowed(
                f"the model returns a {type(odd).__name__}; return tensors, or a tuple or dict of "
                "them", "", "",
            )  # fmt: skip
        self._graph.output(self._template(learnable))
        return Recording(self._graph, self._constants, self._origin, self._ops)
