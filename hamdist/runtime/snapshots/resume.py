"""Resuming from a snapshot: the same run where it fits, its weights where it does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.config import Decay, HeadsSettings, LearningSettings, Settings
from hamdist.dynamics.graph.graph import INPUT, OUTPUT_KEY, BlockSpec, Graph
from hamdist.dynamics.graph.merged import merged_module
from hamdist.dynamics.graph.patterns import fitting
from hamdist.dynamics.saved_state.stateful import Packing
from hamdist.dynamics.updates.learning_rate import StepCourse
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import GraphError, SnapshotError
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.portable import other_bits
from hamdist.runtime.process.switches import other_switches
from hamdist.runtime.snapshots.catalogue import fingerprint
from hamdist.runtime.storage.snapshot_files import STATE_FORMATS, Snapshot, settings_of
from hamdist.streams.replay import drops, next_sample, replays, samples_from
from hamdist.streams.sample import Stream
from hamdist.streams.wrappers.derived import WithoutSample

MAY_CHANGE = ("learning", "dynamics", "stream", "steps")


_OF_METRICS = ("window", "limit", "record", "record_every")


def differences(snapshot: Snapshot, plan: Plan, settings: Settings) -> list[str]:
    """Return what keeps `plan` from continuing with the snapshot's state.

    The list is empty if the snapshot is of the same network at the same level.
    """
    now, before = _set_knobs(fingerprint(plan, settings)), _set_knobs(snapshot.manifest.network)
    for network, learning in ((now, settings.learning), (before, earlier(snapshot).learning)):
        network |= _state_forms(learning, plan.graph.blocks)
    if snapshot.manifest.format not in STATE_FORMATS:
        return ["the format of states"]
    return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


def _state_forms(learning: LearningSettings, blocks: Iterable[str]) -> dict[str, Any]:
    """Return what decides of which blocks the state has statistics of inputs, and heads."""
    heads = learning.heads or HeadsSettings()
    forms: dict[str, Any] = {"learning.inputs": [], "learning.heads": [heads.norm, heads.readout]}
    for block in blocks:
        pattern = fitting(block, learning.blocks)
        own = None if pattern is None else learning.blocks[pattern]
        for name in ("inputs", "heads"):
            here = own and getattr(own, name)
            chosen = getattr(learning, name) if here is None else here
            forms[f"learning.{name}"].append(chosen not in (None, "off"))
    return forms


def _set_knobs(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint without knobs left to the level, of which later versions have more, and
    with those settings of metrics alone that are in the state. (`round` is new; `other_code`.)
    """
    knobs = {name: v for name, v in network.get("locality", {}).items() if v is not None}
    metrics = {name: network.get("metrics", {}).get(name) for name in _OF_METRICS}
    new = {"round": network.get("round", {}), "code": None}
    return {**network, "locality": knobs, "metrics": metrics, **new}


def other_code(snapshot: Snapshot, now: Mapping[str, str]) -> list[str]:
    """Return a warning if the user's code is another one than that of the snapshot's run.

    now: its digests (user_modules/code_digest.py). Earlier versions have others, of rules alone.
    """
    then = snapshot.manifest.network.get("code", {})
    names = [name for name in now if then.get(name, now[name]) != now[name]]
    if not names:
        return []
    return [
        f"the code or the constants of {', '.join(names)} have changed since "
        f"{snapshot}: the numbers are not those of a run that was never stopped"
    ]


def outside(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Warn of functions whose constants have others' digests than before the run (in this process;
    those of actors are gone)."""
    return [
        f"{name} has changed what it refers to outside of itself, as a global: no snapshot holds "
        "that, each actor has its own, and a next run begins with it; keep it in "
        f"{'block.memory' if name.startswith('the rule of ') else 'an object (self)'}"
        for name in before
        if now.get(name) != before[name]
    ]


def changed(snapshot: Snapshot, settings: Settings) -> list[str]:
    """Return the settings that differ from the snapshot's run without preventing a resume."""
    now = settings.model_dump(mode="json")
    return [name for name in MAY_CHANGE if snapshot.manifest.settings.get(name) != now[name]]


def other_bits_than(snapshot: Snapshot, plan: Plan) -> list[str]:
    """Return warnings if this process does not compute the same bits as the snapshot's run.

    Raises SnapshotError where `engine.bits` asks for equal ones.
    """
    then, here = snapshot.manifest, plan.arithmetic
    reasons = other_switches(then.switches, plan.switches)
    unlike = [(there, here.unlike(there)) for there in then.arithmetic]
    if unlike and all(names for _, names in unlike):
        kinds = [f"on {there} ({', '.join(names)})" for there, names in unlike]
        reasons += [f"this process is on {here}, that of the snapshot was {', or '.join(kinds)}"]
    if not reasons:
        return []
    return [other_bits(f"{snapshot}: {', '.join(reasons)}", plan.engine.bits, SnapshotError)]


def identity(stream: Stream, example: Mapping[str, Tensor] | None) -> dict[str, str]:
    """Return the identity of a stream: its class, its shape, its length and its first sample.

    example: the first sample's inputs by name, where they are known (train.py). A stream from which
    a later sample was taken out keeps its identity.
    """
    stream = stream.unaltered if isinstance(stream, WithoutSample) else stream
    spec = stream.spec
    facts = {
        "class": f"{type(stream).__module__}.{type(stream).__qualname__}",
        "inputs": f"{spec.u_dtype} {tuple(spec.u_shape)}",
    }
    if isinstance(stream, Sized):
        facts["length"] = str(len(stream))
    if example is not None:
        data, packing = hashlib.sha256(), Packing()
        text = json.dumps(packing.packed({n: u.contiguous() for n, u in example.items()}))
        data.update(text.encode())
        for tensor in packing.tensors:
            data.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        facts["first sample"] = data.hexdigest()[:16]
    return facts


def other_stream(snapshot: Snapshot, now: Mapping[str, str]) -> list[str]:
    """Return a warning if the stream is not the one of the snapshot's run.

    Of a class only the name counts: later versions may have it in another module.
    """
    before = snapshot.manifest.stream
    names = [name for name in before if name in now and before[name] != now[name]]
    if "class" in names and _bare(before["class"]) == _bare(now["class"]):
        names.remove("class")
    if not names:
        return []
    each = "; ".join(f"{name}: {before[name]}, now {now[name]}" for name in names)
    return [
        f"the stream is not that of {snapshot} ({each}): its place in it is that of another one"
    ]


def _bare(class_name: str) -> str:
    """Return the name of a class without its module."""
    return class_name.rpartition(".")[2]


def origin(snapshot: Snapshot) -> str:
    """Return a line that says which run is resumed, and from where."""
    then = snapshot.manifest
    when = f", written at {then.time}" if then.time else ""
    return f"going on from {snapshot}: run {then.run}, {then.samples} samples{when}"


def ended(snapshot: Snapshot, settings: Settings, stream: Stream) -> str:
    """Return what was over at the snapshot, though a run by `settings` has more; else nothing.

    A stream that does not give the same samples again has more, unless its next ones are the
    clock's; where somebody talks to the run, or labels come late, emissions decide.
    """
    node, skip = snapshot.state(INPUT)["node"], snapshot.manifest.skip
    before, steps = snapshot.manifest.settings.get("steps"), settings.steps
    if node["tick"] is not None:
        return ""
    if before is not None and (steps is None or steps > before):
        return "its steps were over, and steps"
    over = steps is not None and skip + node["samples"] >= steps
    if over or stream.spec.patience or drops(stream):
        return ""
    n = skip + node["drawn"]
    if replays(stream) and next_sample(samples_from(stream, n, node["passed"]), n) is None:
        return ""
    return "its stream was over, and the samples"


def bent_course(snapshot: Snapshot, settings: Settings) -> list[str]:
    """Return a warning if the step size falls over other steps than before."""
    before, n = snapshot.manifest.settings.get("steps"), snapshot.manifest.samples
    decay = settings.learning.decay
    if decay is Decay.NONE or before in (None, settings.steps):
        return []
    old, new = (StepCourse(settings.learning, steps)(n) for steps in (before, settings.steps))
    return [
        f"learning.decay {decay.value!r} now falls over {settings.steps} samples, before over "
        f"{before}: at sample {n} the step size goes from {old:.3g} to {new:.3g} of learning.lr; "
        "for the course of one long run give the first run its steps, and end it by Ctrl-C"
    ]


def weights_of(snapshot: Snapshot, graph: Graph, *, averaged: bool = False) -> nn.Module:
    """Return the whole module of `graph` with the weights of a snapshot of it.

    averaged: the moving averages, in the blocks that have some. Raises SnapshotError if they do not
    fit.
    """
    states = {
        name: _weights(snapshot.state(name), block, graph.foreign_weights(name), averaged=averaged)
        for name, block in graph.blocks.items()
    }
    try:
        return merged_module(graph, states, None)
    except (GraphError, RuntimeError, KeyError) as error:
        raise SnapshotError(f"{snapshot}: its weights do not fit the model: {error}") from None


def _weights(
    state: Mapping[str, Any], spec: BlockSpec, shared: set[str], *, averaged: bool
) -> dict[str, Tensor]:
    """Return the weights of a block by name; those in `shared` belong to another block."""
    try:
        block = state["node"]["block"]
        tensors = {k: t for k, t in _of_cell(block["cell"]).items() if k not in shared}
        if averaged:
            tensors |= _averages(block["weights"], spec.module, shared)
        if block.get("output") is not None and spec.output is not None:
            output_tensors = _of_cell(block["output"])
            if averaged:
                output_tensors |= _averages(block["output_weights"], spec.output, set())
            tensors |= {OUTPUT_KEY + key: tensor for key, tensor in output_tensors.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(
            f"block {spec.name!r} has no weights in the snapshot ({error})"
        ) from None
    return tensors


def _averages(weights: Mapping[str, Any], module: nn.Module, shared: set[str]) -> dict[str, Tensor]:
    """Return the averages of a block's weights that have some, by the parameter's name."""
    average = weights["average"]
    if average is None:
        return {}
    named = [(n, p) for n, p in module.named_parameters() if n not in shared]
    trained = [(name, p.dtype) for name, p in named if p.requires_grad]
    return {
        name: value.to(dtype) for (name, dtype), value in zip(trained, average["_sum"], strict=True)
    }


def _of_cell(cell: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = cell.get("inner", cell)
    inner = inner.get("cell", inner)
    return {**inner["parameters"], **inner["buffers"], **inner["extra"]}


def with_weights(model: nn.Module, learned: nn.Module) -> nn.Module:
    """Return a copy of `model` with the weights of `learned`. Raises SnapshotError."""
    model_copy = copied(model)
    try:
        model_copy.load_state_dict(learned.state_dict())
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise SnapshotError(f"the snapshot's weights are those of another model: {first}") from None
    return model_copy


def graph_with_weights(graph: Graph, snapshot: Snapshot) -> Graph:
    """Return a copy of a hand-built graph with the weights of a snapshot of the same blocks.

    Raises SnapshotError if the blocks or their weights are others.
    """
    graph_copy = graph.copy()
    try:
        for name, block in graph_copy.blocks.items():
            state = _weights(
                snapshot.state(name), block, graph_copy.foreign_weights(name), averaged=False
            )
            block.load_state_dict(state, strict=not graph_copy.foreign_weights(name))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise SnapshotError(f"{snapshot}: it was taken of another graph: {first}") from None
    return graph_copy


def earlier(snapshot: Snapshot) -> Settings:
    """Return the settings of the run that the snapshot was taken of."""
    return settings_of(snapshot.manifest, str(snapshot))
