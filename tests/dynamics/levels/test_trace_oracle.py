"""Oracle: the travelling pulse written out with matrices for Linear + tanh, Linear + tanh, Linear.

No autograd, no schedule, no blocks: loops over ticks after time-and-signals.md ("pulse").
"""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import Network, mlp, relative, samples, settings
from torch.nn import Sequential

from hamdist.dynamics.objective.losses import mse
from hamdist.errors import LevelError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

SIZES = [4, 5, 6, 2]
D = 2


def simulate(
    model: Sequential,
    items,
    *,
    c,
    lr,
    momentum=0.0,
    stash=False,
    scales=(1, 1, 1),
    predict=False,
    group=1,
):
    """Weights after all samples, and the loss of every sample that has a target.

    At tick k block l does F of sample n where k = n c + l, then B of n where k = n c + 2 D - l.
    group: samples per step, by the mean of their gradients.
    """
    w = [model[2 * i].weight.detach().clone() for i in range(3)]
    b = [model[2 * i].bias.detach().clone() for i in range(3)]
    v = [(torch.zeros_like(w[i]), torch.zeros_like(b[i])) for i in range(3)]  # momentum
    h = {(-1, n): u for n, (u, _) in enumerate(items)}
    message, kept, losses = {}, {}, []
    sums = [(0.0, 0.0)] * 3

    def step(i, n, delta, x):
        """delta: dL/d(pre-activation), x: the input that it meets."""
        sums[i] = (sums[i][0] + delta.T @ x / group, sums[i][1] + delta.sum(0) / group)
        if (n + 1) % group:
            return
        v[i] = (momentum * v[i][0] + sums[i][0], momentum * v[i][1] + sums[i][1])
        sums[i] = (0.0, 0.0)
        w[i] = w[i] - lr * scales[i] * v[i][0]
        b[i] = b[i] - lr * scales[i] * v[i][1]

    for k in range(len(items) * c + 2 * D + 1):
        for i in (0, 1):
            n, rest = divmod(k - i, c)
            if rest == 0 and 0 <= n < len(items):  # forward
                x = h[i - 1, n]
                ahead = lr * scales[i] * (2 * (D - i) // c) if predict else 0.0
                used, offset = w[i] - ahead * v[i][0], b[i] - ahead * v[i][1]
                h[i, n] = torch.tanh(x @ used.T + offset)
                kept[i, n] = (x, h[i, n], used)
            n, rest = divmod(k - (2 * D - i), c)
            if rest == 0 and 0 <= n < len(items):  # backward
                x, out, used = kept.pop((i, n))
                if message[i + 1, n] is None:
                    message[i, n] = None
                    continue
                delta = message[i + 1, n] * (1 - out**2)
                message[i, n] = delta @ (used if stash else w[i])
                step(i, n, delta, x)
        n, rest = divmod(k - D, c)
        if rest == 0 and 0 <= n < len(items):  # the readout
            x, target = h[1, n], items[n][1]
            message[2, n] = None
            if target is not None:
                error = x @ w[2].T + b[2] - target
                losses.append(float(0.5 * error.square().sum() / len(x)))
                delta = error / len(x)
                message[2, n] = delta @ w[2]
                step(2, n, delta, x)
    assert not kept
    return [t for pair in zip(w, b, strict=True) for t in pair], losses


def check(items, config, **oracle):
    model = mlp(SIZES)
    result = train(model, from_iterable(items, outputs=2), config, loss=mse)
    expected, losses = simulate(model, items, **oracle)
    assert relative(result.model.parameters(), expected) <= 1e-12
    found = [window.mean_loss for window in result.windows["block2"]]
    assert found == pytest.approx(losses, rel=1e-12)
    return expected


def trace(c, lr, *, memory="trace", locality=None, dynamics=None, momentum=0.0):
    return settings(
        "trace",
        locality={"speed": c, "memory": memory, **(locality or {})},
        learning={"lr": lr, "momentum": momentum},
        dynamics=dynamics or {},
        metrics={"window": 1},
    )


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("memory", ["trace", "trace+weights"])
@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_trace(c, memory, momentum):
    items = samples(60, 3, 4, 2)
    config = trace(c, 0.1, memory=memory, momentum=momentum)
    check(items, config, c=c, lr=0.1, momentum=momentum, stash=memory == "trace+weights")


def test_the_cases_differ():
    """The oracle tells the memories, the speeds and SGD apart, or the test above says little."""
    items = samples(60, 3, 4, 2)
    made = [
        simulate(mlp(SIZES), items, c=c, lr=0.1, stash=stash)[0]
        for c, stash in [(1, False), (1, True), (2, False), (2, True), (5, False)]
    ]
    for i, one in enumerate(made):
        assert all(relative(one, other) > 1e-6 for other in made[:i])
    stashed = simulate(mlp(SIZES), items, c=5, lr=0.1, stash=True)[0]
    assert relative(made[-1], stashed) == 0  # nothing is stale at a round trip


@pytest.mark.parametrize("memory", ["trace", "trace+weights"])
@pytest.mark.parametrize(("group", "c"), [(2, 1), (3, 1), (5, 1), (3, 2)])
def test_accumulate(group, c, memory):
    """A block moves once for `group` messages, by the mean of their gradients."""
    items = samples(60, 3, 4, 2)
    config = trace(c, 0.1, memory=memory, momentum=0.6, locality={"accumulate": group})
    oracle = {"c": c, "lr": 0.1, "momentum": 0.6, "stash": memory == "trace+weights"}
    expected = check(items, config, **oracle, group=group)
    assert relative(simulate(mlp(SIZES), items, **oracle)[0], expected) > 1e-4


@pytest.mark.parametrize(("group", "delays"), [(2, (2, 1, 0)), (4, (1, 1, 0)), (5, (1, 1, 0))])
def test_accumulated_steps_are_scaled_by_their_delay_in_steps(group, delays):
    items = samples(60, 3, 4, 2)
    recipe = {"compensation": "delay-scaled", "delay_power": 1.0, "accumulate": group}
    scales = [1 / (1 + d) for d in delays]
    check(items, trace(1, 0.1, locality=recipe), c=1, lr=0.1, scales=scales, group=group)


@pytest.mark.parametrize(("c", "delays"), [(1, (4, 2, 0)), (2, (2, 1, 0)), (3, (1, 0, 0))])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_delay_scaled_steps(c, delays, power):
    """The step of a block is divided by (1 + samples that its messages lag)^power."""
    items = samples(60, 3, 4, 2)
    config = trace(c, 0.1, locality={"compensation": "delay-scaled", "delay_power": power})
    scales = [(1 + d) ** -power for d in delays]
    check(items, config, c=c, lr=0.1, scales=scales)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("c", [1, 2, 5])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_predicted_weights(c, momentum, tau):
    """A sample passes with the weights that are expected for its message: d steps along omega."""
    items = samples(60, 3, 4, 2)
    config = trace(
        c,
        0.05,
        memory=None,
        momentum=momentum,
        locality={"compensation": ["weight-prediction", "delay-scaled"], "delay_power": 0.5},
        dynamics={"tau": tau},
    )
    scales = [(1 + 2 * (D - i) // c) ** -0.5 for i in range(3)]
    oracle = {"c": c, "lr": 0.05, "momentum": momentum, "stash": True, "scales": scales}
    predicted = check(items, config, **oracle, predict=True)
    stashed = simulate(mlp(SIZES), items, **oracle)[0]
    assert (relative(predicted, stashed) > 1e-4) == (c < 5)


def test_predicted_weights_are_kept():
    config = trace(1, 0.1, locality={"compensation": "weight-prediction"})  # memory 'trace'
    with pytest.raises(LevelError, match=r"memory 'trace\+weights'"):
        train(mlp(SIZES), from_iterable(samples(3, 3, 4, 2)), config, loss=mse)


def test_tau_is_a_unit_of_time():
    items = samples(60, 3, 4, 2)
    check(items, trace(1, 0.1, dynamics={"tau": 0.25}), c=1, lr=0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_missing_targets(momentum):
    items = [(u, None if n % 4 == 2 else y) for n, (u, y) in enumerate(samples(40, 3, 4, 2))]
    check(items, trace(1, 0.1, momentum=momentum), c=1, lr=0.1, momentum=momentum)


def test_uneven_batches():
    items = [(u[: 1 + n % 3], y[: 1 + n % 3]) for n, (u, y) in enumerate(samples(40, 3, 4, 2))]
    check(items, trace(1, 0.1), c=1, lr=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("c", [1, 2, "inf"])
def test_after_n_samples_every_block_has_made_n_updates(c, count):
    """The messages that are under way when the stream ends are still worked off."""
    items = samples(count, 3, 4, 2)
    config = trace(c, 0.1)
    network = Network(_graph(config), config, items).run()
    for node in network.nodes.values():
        assert node.block.weights.updates == count
        assert node.tick is None
        assert not getattr(node.block, "trace", {})
    check(items, config, c=5 if c == "inf" else c, lr=0.1)


def test_steps_end_the_stream():
    items = samples(30, 3, 4, 2)
    config = trace(1, 0.1).model_copy(update={"steps": 11})
    result = train(mlp(SIZES), from_iterable(items), config, loss=mse)
    assert result.samples == 11
    expected, _ = simulate(mlp(SIZES), items[:11], c=1, lr=0.1)
    assert relative(result.model.parameters(), expected) <= 1e-12


@pytest.mark.parametrize(("c", "stored"), [(1, [5, 3]), (2, [3, 2]), ("inf", [1, 1])])
def test_a_trace_never_holds_more_than_the_schedule_says(c, stored):
    config = trace(c, 0.1)
    most = {"block0": 0, "block1": 0, "block2": 0}

    def after(node, event):
        most[node.name] = max(most[node.name], len(getattr(node.block, "trace", ())))

    network = Network(_graph(config), config, samples(20, 3, 4, 2)).run(after=after)
    # right after a forward: all that the block keeps
    assert [most["block0"], most["block1"]] == stored
    assert [network.plan.schedule.stored(f"block{i}") for i in (0, 1)] == stored


def _graph(config):
    from hamdist.runtime.train.prepare import as_graph

    return as_graph(mlp(SIZES), config, from_iterable(samples(1, 3, 4, 2)).spec, mse)
