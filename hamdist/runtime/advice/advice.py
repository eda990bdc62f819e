"""Warnings about a run that can go on, but not as its user may expect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from hamdist.config import (
    DeviceSignals,
    Encryption,
    EngineKind,
    EngineSettings,
    Memory,
    Moves,
    Order,
    Reset,
    Settings,
    TargetOf,
    TransportKind,
)
from hamdist.dynamics.blocks.dissipation import dissipation_warnings
from hamdist.dynamics.graph.inputs import INPUT, by_parent
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.levels import make_locality
from hamdist.dynamics.user_modules.python_state import weights_of
from hamdist.dynamics.vjp.layer_inputs import LayerInputs
from hamdist.runtime.placement.assign_blocks import Costs, split
from hamdist.runtime.placement.requirements import idle_block_settings
from hamdist.runtime.placement.step_costs import example_sample
from hamdist.runtime.plan.dtypes import block_settings
from hamdist.runtime.plan.microbatches import microbatch_warnings, row_warnings
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.threads import cores
from hamdist.runtime.results.result import Outcome
from hamdist.runtime.signals.edge_codecs import compression_warnings
from hamdist.runtime.transport.gpu_ring import Refusal
from hamdist.streams.live import live_of
from hamdist.streams.replay import drops, replays
from hamdist.streams.sample import Stream
from hamdist.streams.wrappers.derived import WithoutSample

# Samples of one sequence from which on it looks as if the ends had been forgotten.
LONG_SEQUENCE = 100


def before(plan: Plan, settings: Settings) -> list[str]:
    """Return the warnings before the run."""
    notes = [text for is_so, text in _without_effect(plan, settings) if is_so]
    if plan.engine.kind is EngineKind.INPROCESS:
        notes += _no_links(settings)
    else:
        notes += open_endpoints(plan.engine)
    if plan.engine.address is None:
        notes += thread_warnings(plan.engine.processes(), plan.engine.threads, cores())
    notes += compression_warnings(plan.channels, plan.graph, plan.engine)
    notes += _late(plan, settings)
    knobs = make_locality(settings.level, settings.locality)
    auto = knobs.microbatches == "auto"
    sample = example_sample(plan.spec)
    inputs = {INPUT: sample.u} if sample.inputs is None else by_parent(sample.inputs)
    of_plan = plan.knobs, plan.graph, plan.spec, inputs, plan.ignore_index
    notes += microbatch_warnings(*of_plan, auto=auto)
    notes += _losses(plan)
    notes += _as_they_are(plan)
    if isinstance(plan.schedule, HoldSchedule):
        notes += dissipation_warnings(plan.graph, plan.dynamics)
        notes += reset_warnings(plan, plan.schedule)
    return notes


def _without_effect(plan: Plan, settings: Settings) -> Iterator[tuple[object, str]]:
    """Yield (it is so, what to say of it)."""
    engine, d, beta = plan.engine, plan.dynamics, settings.dynamics.beta
    yield (
        beta is not None and "lr" in settings.learning.model_fields_set,
        f"learning.lr {settings.learning.lr:g} has no effect: dynamics.beta {beta or 0.0:g} is the "
        "rate of the weights",
    )
    yield (
        engine.kind is not EngineKind.INPROCESS
        and engine.spares
        and not (plan.snapshot_policy and plan.snapshot_policy.section.recover),
        f"engine.spares {engine.spares} has no effect: no lost actor is replaced without "
        "snapshots (snapshots.every or snapshots.seconds) and snapshots.recover",
    )
    blocks = plan.graph.blocks.values()
    yield (
        not any(b.rule or any(p.requires_grad for p in b.module.parameters()) for b in blocks),
        "no weight of the model learns: all are frozen (requires_grad is False)",
    )
    idle = idle_block_settings(block_settings(plan.graph, engine).values())
    yield (
        engine.kind is EngineKind.INPROCESS and idle,
        f"engine.blocks: {', '.join(idle)} {'means' if len(idle) == 1 else 'mean'} nothing in one "
        "process; use engine.kind 'ray', or leave them out",
    )
    by_layer = plan.knobs.hold and plan.knobs.moves is not Moves.ALL and d.tau is not None
    step = d.tau(0) * min(d.speeds()) if by_layer and d.tau is not None else 1.0
    yield (
        abs(step - 1) >= 1e-9,
        f"moves 'layer-by-layer' with c tau = {step:g}: a state moves once a sample and does not "
        "get all the way, so h is no feed-forward pass (HL Eq. 10); use dynamics.c = 1/tau",
    )


def _late(plan: Plan, settings: Settings) -> list[str]:
    """Return the cost of labels that come late, as warnings."""
    late, stream = plan.spec.patience, settings.stream
    if late and not plan.spec.live:
        nbytes = sum(math.prod(plan.shapes[r][0]) * plan.shapes[r][1].itemsize
                   for r in plan.graph.readouts)  # fmt: skip
        then = "shown again when its label comes, to learn from: two passes, its input waits, too"
        if plan.spec.kept:
            then = f"learned with the trace of that time: every block keeps {late} samples more"
            if plan.metrics.alignment is not None:  # (a label comes beside another sample)
                then += "; metrics.alignment, which compares passes, has no figures then"
        return [
            f"labels come up to {late} samples late: a sample is scored by its prediction from "
            f"when it came (as many predictions wait, {late * nbytes / 1024:.1f} KiB), and {then}"
        ]
    if stream.late_targets and not stream.again:
        return [
            "samples wait for their labels before they are predicted (stream.relearn: wait, or a "
            "pace): prequential scores are as if labels came at once"
        ]
    return []


def _losses(plan: Plan) -> list[str]:
    """Warn where the choice of learned outputs is implicit, and of weights that do not learn."""
    notes = []
    readouts = plan.graph.unsliced.readouts
    if len(readouts) > 1 and plan.spec.targets is None and plan.graph.unsliced.was_cut:
        notes.append(
            f"the model returns {len(readouts)} outputs and the stream has one target, with which "
            f"{', '.join(map(repr, readouts))} are all learned; leave one out by naming the losses "
            f"of the others, loss={{{readouts[0]!r}: 'cross-entropy'}}"
        )
    for name in readouts:
        notes += row_warnings(plan.graph, name, plan.shapes[name], plan.spec)
        weights = weights_of(plan.graph.blocks[name].loss)
        if weights:
            notes.append(
                f"the loss of {name!r} has weights of its own, which are not learned: "
                f"{', '.join(weights)}; make them weights of the model, or freeze them with "
                "requires_grad_(False)"
            )
    return notes


def of_resumed(stream: Stream) -> list[str]:
    """Return warnings about the stream of a resumed run."""
    if replays(stream):
        return []
    if drops(stream):
        return [
            "the stream drops samples that come late (stream.pace.late 'drop'): the run goes on "
            "behind the last one that it was given, but which ones are dropped depends on the "
            "clock, so the result is not that of a run that was never stopped"
        ]
    return [
        "the stream does not give the same samples again (a DataLoader or an iterator is not sure "
        "to): the run goes on with those that it gives now, from the first one on, so the result "
        "is that of a run that was never stopped only if these are the samples that follow; a "
        "list, from_iterable(loader) of a loader with a seeded order, or a class with "
        "samples_from(n) is gone on with where it was left"
    ]


def _no_links(settings: Settings) -> list[str]:
    """Warn if settings of links have no effect in one process."""
    engine = settings.engine
    idle = {
        "partition.delays 'auto' in one process, which has no links: all delays are 1; give those "
        "of a run on Ray (its settings.yaml) to repeat it here": settings.partition.delays
        == "auto",
        f"engine.link_delay {engine.link_delay:g} has no effect in one process: it makes messages "
        "between actors late": engine.link_delay,
        f"engine.ports {engine.ports!r} has no effect in one process": engine.ports is not None,
        f"engine.device_signals {engine.device_signals.value!r} has no effect in one process, "
        "whose signals stay where they are": engine.device_signals is not DeviceSignals.AUTO,
    }
    return [text for text, is_set in idle.items() if is_set]


def open_endpoints(engine: EngineSettings) -> list[str]:
    """Warn if others in the network can read signals and send some."""
    by_tcp = engine.transport is TransportKind.TCP or (
        engine.transport is TransportKind.AUTO and engine.address is not None
    )
    if engine.encryption is not Encryption.OFF or not by_tcp:
        return []
    return [
        "engine.encryption 'off': whoever reaches the ports of this run can read its signals and "
        "send others; leave it at 'auto' unless you trust everybody in the network"
    ]


def gpu_signal_notes(engine: EngineSettings, shared: int, refusals: Sequence[Refusal]) -> list[str]:
    """Warn, once for each reason, if signals between GPUs of one host go through host memory.

    `shared` is the number of channels that were tested before the start.
    """
    if engine.device_signals is DeviceSignals.IPC and not shared:
        return [
            "engine.device_signals 'ipc' has no effect: no two actors of one host have CUDA blocks "
            "that exchange signals by shared memory"
        ]
    channels: dict[str, list[str]] = {}
    for channel, reason in refusals:
        channels.setdefault(reason, []).append(channel)
    notes = []
    for reason, refused in channels.items():
        more = "" if len(refused) == 1 else f", and {len(refused) - 1} more like it,"
        notes.append(
            f"signals between GPUs: {refused[0]}{more} went through host memory: {reason}; "
            "engine.device_signals 'host' does so without a word"
        )
    return notes


def unmeasured_notes(reason: str, places: bool, delays: bool) -> list[str]:
    """Warn that the steps of the blocks could not be measured."""
    notes = []
    if places:
        notes.append(
            "the blocks are spread by their parameters: their steps could not be measured "
            f"({reason})"
        )
    if delays:
        notes.append(
            f"partition.delays 'auto': all delays are 1, for the steps of the blocks could not be "
            f"measured ({reason}); give them as numbers"
        )
    return notes


def _as_they_are(plan: Plan) -> list[str]:
    """Warn if `learning.inputs` has no effect."""
    names = []
    for name, block in plan.graph.blocks.items():
        linear = any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in block.module.modules())
        if plan.dynamics.of(name).inputs is None or not linear:
            continue
        theta = [p for p in block.module.parameters() if p.requires_grad]
        rewinds = plan.knobs.memory is Memory.REVERSIBLE
        if rewinds or not LayerInputs(block.module, theta).layers:
            names.append(name)
    if not names:
        return []
    return [
        f"learning.inputs has no effect on {', '.join(names)}: it needs linear layers or "
        "convolutions with weights and a bias of their own, and another memory than 'reversible'"
    ]


def thread_warnings(processes: int, threads: int, processors: int, host: str = "") -> list[str]:
    """Warn if a host runs more threads than it has processors; `host` is its name, if several."""
    if processes * threads <= processors:
        return []
    where = f"of {host} " if host else ""
    kind = "actors" if processes > 1 else "process"
    return [
        f"{processes} {kind} of {threads} thread(s) on {processors} processor(s) {where}wait for "
        f"each other: use engine.threads 1, and engine.actors 'auto' or at most {processors}"
    ]


def placement_notes(plan: Plan, placement: list[list[str]], costs: Costs | None) -> list[str]:
    """Warn if `auto` has chosen one process."""
    if plan.engine.actors != "auto" or plan.engine.placement is not None or len(placement) > 1:
        return []
    if len(plan.graph.blocks) == 1:
        reason = "the network is one block"
    elif costs is None:
        reason = "there is one processor for it"
    elif costs.in_flight < 2:
        reason = (
            f"at speed {plan.schedule.c} one sample is in the network at a time, so blocks take "
            "turns"
        )
    else:
        two = costs.of(split(costs, 2))
        reason = (
            f"its blocks work {1e6 * sum(costs.seconds):,.0f} µs a sample, spread over two actors "
            f"a sample would take {1e6 * two:,.0f} µs, signals included"
        )
    return [
        f"engine.actors 'auto' chose one actor: {reason}; --engine inprocess is as fast, and needs "
        "no Ray"
    ]


def after(plan: Plan, outcome: Outcome) -> list[str]:
    """Return the warnings after the run: on smooth streams, and if next to nothing was learned."""
    updates = max((block.updates for block in outcome.blocks.values()), default=0)
    notes = smoothness_warnings(plan, outcome.smoothness)
    if outcome.samples and not any(outcome.windows.values()):
        notes.append("no sample had a target when it reached a readout, so nothing was learned")
    if plan.knobs.sequence and updates <= 1 and outcome.samples >= LONG_SEQUENCE:
        notes.append(
            f"the whole run was one sequence of {outcome.samples} samples, so the weights moved "
            "once, at its end: mark the last sample of every sequence (Sample.end), use a stream "
            "that does (source 'sequences' with sequences.view 'tokens'), or another level"
        )
    return notes


def end_of_stream(plan: Plan, outcome: Outcome, stream: Stream) -> list[str]:
    """Warn if the stream ended before the run had all its samples."""
    samples = plan.skip + outcome.samples + isinstance(stream, WithoutSample)
    live = live_of(stream)
    asked = outcome.interrupted or outcome.stopped or (live is not None and not live.ran_out)
    if plan.steps is None or asked or samples >= plan.steps:
        return []
    return [
        f"the stream ended after {samples:,} of {plan.steps:,} samples (steps): go through it more "
        "often (epochs=, of hamdist.streams.from_loader or from_iterable), or ask for fewer steps"
    ]


def reset_warnings(plan: Plan, schedule: HoldSchedule) -> list[str]:
    """Warn if states are cleared before they can have an effect."""
    notes = []
    late = max(schedule.target_lag(r) for r in plan.graph.readouts)
    reset, c = plan.dynamics.reset, schedule.c
    by_sample = plan.knobs.target is TargetOf.SAMPLE
    if reset.h is Reset.SEQUENCE and by_sample and c <= late:
        notes.append(
            f"dynamics.reset.h 'sequence' with speed {c}: a prediction stands at the readout "
            f"{late} ticks after its sample, so nothing is learned of the last {-(-late // c)} "
            f"sample(s) of a sequence; use locality.speed {late + 1} or more"
        )
    needed = plan.graph.depth + 1 - (plan.knobs.order is Order.SEQUENTIAL)
    if reset.z is Reset.SAMPLE and c < needed:
        notes.append(
            f"dynamics.reset.z 'sample' with speed {c}: costates are cleared before they have come "
            f"back to the first blocks, whose weights will not move; use locality.speed {needed} "
            "or more"
        )
    return notes


def smoothness_warnings(plan: Plan, frames: float | None) -> list[str]:
    """Warn if a level without memory meets a stream that changes too fast for it.

    Measured on prototypes: such a level equals backpropagation once a sample's S c ticks are 2.5
    times the round trip of 2D ticks, and is worse than training the last block alone below one
    round trip.
    """
    trip = 2 * plan.graph.depth
    c = plan.schedule.c
    if not plan.knobs.hold or frames is None or not trip or c > trip:
        return []
    ticks = frames * c
    if ticks >= 2 * trip:
        return []
    worse = (
        "training the last block alone would do better"
        if ticks < trip
        else "expect it to lose some points against backpropagation"
    )
    return [
        "the stream is not smooth enough for a level without memory: its samples decorrelate "
        f"within about {max(1, round(ticks))} tick(s), while a signal's round trip takes {trip}; "
        f"{worse}. Use level 'trace', a smooth stream (stream.smooth), a higher locality.speed, "
        "or fewer blocks"
    ]
