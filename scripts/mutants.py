"""One-line defects in the core, and for each the tests that have to fail with it (scripts/mutate).

A place is found by its text, which stands once in `hamdist/`; where it lies may change. The tests
are as few as find the defect in seconds.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A defect. text: what stands in the code once; defect: what is put in its place; tests: what
    pytest is given, as words of a command line."""

    name: str
    text: str
    defect: str
    tests: str


MUTANTS = (
    # -- Hamilton's equations of a held sample
    Mutant(
        "hold: messages come to the costate with the wrong sign",
        "arrived = scaled(arrived, -d.sign * tau)",
        "arrived = scaled(arrived, d.sign * tau)",
        "tests/dynamics/levels/test_golden.py",
    ),
    Mutant(
        "hold: the costate does not dissipate",
        "last.moves - tau * d.eta_z",
        "last.moves",
        "tests/dynamics/updates/test_constants.py -k simulation",
    ),
    Mutant(
        "hold: the state moves without its speed c",
        "step = d.c * tick.tau",
        "step = tick.tau",
        "tests/dynamics/levels/test_golden.py",
    ),
    Mutant(
        "hold: the weights' gradient lacks c",
        "self.cell.pull(self._record, scaled(self.z, d.c), inputs=False)",
        "self.cell.pull(self._record, self.z, inputs=False)",
        "tests/dynamics/updates/test_constants.py -k simulation",
    ),
    Mutant(
        "hold: a reset state keeps its value",
        "self.h = self._start",
        "self.h = self.h",
        "tests/dynamics/updates/test_constants.py -k simulation",
    ),
    # -- a sample that travels, and its message
    Mutant(
        "pulse: the costate without tau",
        'self.z = scaled(message, self._tau)\n        self._guard("z", self.z)\n        at_once',
        'self.z = message\n        self._guard("z", self.z)\n        at_once',
        "tests/dynamics/levels/test_trace_oracle.py -k unit_of_time",
    ),
    Mutant(
        "pulse: a message meets the latest activations",
        "record = self.trace.pop(sample, None)",
        "record = self.trace.pop(max(self.trace), None)",
        "tests/dynamics/levels/test_trace_oracle.py",
    ),
    Mutant(
        "pulse: message and state change places on the way to a reversible parent",
        "return torch.stack([message, h])",
        "return torch.stack([h, message])",
        "tests/runtime/engines/test_reversible.py -k training_is_that_of_sgd",
    ),
    Mutant(
        "sequence: the way back begins with the costate of the last one",
        "return arrived if decayed is None else decayed + arrived",
        "return arrived",
        "tests/dynamics/levels/test_sequence_oracle.py tests/dynamics/levels/test_golden.py",
    ),
    # -- how weights move
    Mutant(
        "weights: the second half of the look-ahead step is as large as the first",
        "theta.add_(later[i], alpha=-step * beta * mu)",
        "theta.add_(later[i], alpha=-step * beta)",
        "tests/dynamics/updates/test_recipes.py -k nesterovs",
    ),
    Mutant(
        "weights: squares of Adam's step without correction of their start",
        "1 - adaptive.memory**self._steps)",
        "1)",
        "tests/dynamics/updates/test_weights.py",
    ),
    Mutant(
        "weights: decay makes them grow",
        "stay = [1 - tau * factor * beta * self._decay for beta",
        "stay = [1 + tau * scale * beta * self._decay for beta",
        "tests/dynamics/updates/test_weight_decay.py",
    ),
    Mutant(
        "clip: the network's norm is that of the first block alone",
        "norm = math.sqrt(sum((self._take(*pair, event) for pair in squares), square))",
        "norm = math.sqrt(sum((0 * self._take(*pair, event) for pair in squares), square))",
        "tests/dynamics/updates/test_network_clip.py",
    ),
    Mutant(
        "loop: blocks that lie apart work as neighbours do",
        "return _by_lag if lie_apart(plan.graph, plan.knobs, blocks) else _by_tick",
        "return _by_tick",
        "tests/dynamics/schedule/test_pipeline.py",
    ),
    Mutant(
        "weights: small gradients are clipped, large ones are not",
        "if norm > self._clip else gain",
        "if norm < self._clip else gain",
        "tests/dynamics/updates/test_recipes.py -k clipping",
    ),
    Mutant(
        "weights: predicted one update too short",
        "step = updates * tau * factor",
        "step = (updates - 1) * tau * scale",
        "tests/dynamics/levels/test_trace_oracle.py -k predicted",
    ),
    Mutant(
        "averages: the start has a part in the mean",
        "share = (1 - self._keeps) / (1 - self._fading)",
        "share = 1 - self._keeps",
        "tests/dynamics/updates/test_recipes.py -k average_is",
    ),
    Mutant(
        "whitening: inputs are not centred",
        "x = g.x - self.mean",
        "x = g.x",
        "tests/dynamics/updates/test_whitening.py",
    ),
    Mutant(
        "step size: warm-up begins with zero",
        "factor *= (sample + 1) / of.warmup",
        "factor *= sample / of.warmup",
        "tests/dynamics/updates/test_rates.py",
    ),
    # -- vector-Jacobian products and losses
    Mutant(
        "kernels: a relu passes on what it has cut",
        "d = aten.threshold_backward(d, y, 0)",
        "d = aten.threshold_backward(d, y, -1)",
        "tests/dynamics/vjp/test_closed.py",
    ),
    Mutant(
        "kernels: rows of the padding learn",
        "z_rows = z_rows * (index != self._padding)",
        "z_rows = z_rows * (index == index)",
        "tests/dynamics/vjp/test_closed.py",
    ),
    Mutant(
        "losses: the slope of mse is no mean",
        "return value, lambda phi: apart * (phi / y.shape[0])",
        "return value, lambda phi: apart * phi",
        "tests/dynamics/levels/test_local_oracle.py tests/dynamics/objective/test_metrics.py",
    ),
    Mutant(
        "metrics: ignored classes count as rows",
        "return int(((guess == target) & has_target).sum()), int(has_target.sum())",
        "return int(((guess == target) & known).sum()), known.numel()",
        "tests/samples/test_batches.py -k ignored_targets",
    ),
    # -- when
    Mutant(
        "schedule: messages come back one tick late",
        "back = 2 * graph.depth - depth",
        "back = 2 * graph.depth - depth + 1",
        "tests/dynamics/schedule/test_schedule_tables.py",
    ),
    Mutant(
        "schedule: a stamp names one update too many",
        "version = self.sample_of(come) // self.group",
        "version = (self.sample_of(come) + 1) // self.group",
        "tests/dynamics/schedule/test_schedule_tables.py",
    ),
    Mutant(
        "schedule: a bundle may be as long as the edge's delay and one",
        "return ALONE if self._own_rounds else Bundle(max(1, edge.delay // spacing), spacing)",
        "return ALONE if self._own_rounds else Bundle(max(1, edge.delay // spacing + 1), spacing)",
        "tests/dynamics/schedule/test_schedule_tables.py "
        "tests/runtime/placement/test_links.py -m 'not ray'",
    ),
    # -- signals
    Mutant(
        "compression: errors are fed back with the wrong sign",
        "self.error = v - decoded",
        "self.error = decoded - v",
        "tests/runtime/signals/test_compress.py",
    ),
    Mutant(
        "compression: int4 turns back by another rotation",
        "* scale, self.seed)",
        "* scale, self.seed + 1)",
        "tests/runtime/signals/test_compress.py",
    ),
    Mutant(
        "compression: a delta goes on from zero after a snapshot",
        "self._decoders[number] = Decoder(channel.codec, received)",
        "self._decoders[number] = Decoder(channel.codec)",
        "tests/runtime/snapshots/test_snapshots.py",
    ),
    Mutant(
        "compression: int8 rounds down",
        "return quotients.round_()",
        "return quotients.floor_()",
        "tests/runtime/signals/test_compress.py",
    ),
    Mutant(
        "mail: the stamp of a signal is not looked at",
        "if signal is None or signal.stamp != stamp:",
        "if signal is None:",
        "tests/runtime/nodes/test_mail.py",
    ),
    Mutant(
        "mail: a signal that is not contiguous goes as it is",
        "tensor = tensor.contiguous()",
        "tensor = tensor",
        "tests/runtime/signals/test_signal.py",
    ),
    Mutant(
        "metrics: joined windows count windows for samples",
        "samples=sum(w.samples for w in windows),",
        "samples=len(windows),",
        "tests/dynamics/objective/test_metrics.py",
    ),
    Mutant(
        "late labels: scored with the prediction of the latest sample",
        "return self._asked.pop(emission.number, None)",
        "return self._asked.pop(max(self._asked), None)",
        "tests/samples/test_late_labels.py -m 'not ray'",
    ),
)
