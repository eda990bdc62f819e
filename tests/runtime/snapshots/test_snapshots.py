"""Oracle: the run that was never stopped. A run that goes on from any of its snapshots ends with
the same bits, at every level, in both engines."""

from __future__ import annotations

import importlib
import itertools
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import FunctionType

import pytest
import torch
from dynamics.tracing.test_any_network import NETWORKS, made
from runtime.engines.test_engines_equal import (
    CYCLIC,
    LEVELS,
    assert_equal,
    learned,
    samples_for,
    settings,
)
from runtime.engines.test_recipe_engines import RECIPES
from runtime.engines.test_sequence_engines import PortableText, network
from runtime.engines.test_sequence_engines import settings as sequence_settings
from runtime.networks import (
    BATCH,
    FEATURES,
    PortableStream,
    batches,
    chain,
    cycle_graph,
    seeded,
    stream,
)
from runtime.networks import skip_graph as skips
from torch import nn

import hamdist
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.user_modules.code_digest import code_digests
from hamdist.errors import HamdistWarning, SnapshotError
from hamdist.runtime.train.train import train
from hamdist.streams import Withhold, from_iterable

ITEMS = 24
ALONE = {"kind": "inprocess"}


def folders(path):
    return sorted(p for p in path.iterdir() if (p / "manifest.json").exists())


def goes_on(run, path, every, engine=ALONE, others=(ALONE,)):
    """run(engine, resume, **fields). The run whole, with snapshots, and on from some of them."""
    whole = run(ALONE, None)
    kept = {"path": str(path), "every": every, "keep": 1000}
    assert_equal(whole, run(engine, None, snapshots=kept))
    found = folders(path)
    assert len(found) >= 2
    for other in others:
        for folder in {found[len(found) // 2], found[-1]}:
            on = {**kept, "path": str(path / "on")}
            assert_equal(whole, run(other, folder, snapshots=on))
            shutil.rmtree(path / "on", ignore_errors=True)
    return whole


def run_of(model, source, items=ITEMS, **given):
    def run(engine, resume, **fields):
        chosen = settings(engine, items, **given, **fields)
        return train(model(), source(items), chosen, resume=resume)

    return run


def few(depth, name):
    """Fewer samples where each stays for many ticks."""
    return min(ITEMS, samples_for(name, depth))


@pytest.mark.parametrize(  # (test_skips has the others)
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "local, sequential")) for n in LEVELS]
)
def test_chain(name, tmp_path):
    whole = goes_on(run_of(chain, PortableStream, few(4, name), **LEVELS[name]), tmp_path, 11)
    assert learned(whole, chain)


@pytest.mark.parametrize("name", LEVELS)
def test_skips(name, tmp_path):
    if name == "local, sequential":
        pytest.skip("it has two readouts without states")
    goes_on(run_of(skips, PortableStream, few(5, name), **LEVELS[name]), tmp_path, 13)


@pytest.mark.parametrize("name", sorted(CYCLIC))
def test_cycles(name, tmp_path):
    goes_on(run_of(cycle_graph, PortableStream, few(3, name), **LEVELS[name]), tmp_path, 5)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, tmp_path):
    """Averages, heads, gates, whitened inputs, predicted weights."""
    whole = goes_on(run_of(chain, PortableStream, **RECIPES[name]), tmp_path, 13)
    assert learned(whole, chain)


def test_sequences_by_an_optimiser(tmp_path):
    def run(engine, resume, **fields):
        learning = {"optimizer": "adam", "lr": 0.01}
        chosen = sequence_settings(engine, learning=learning, **fields)
        return train(network("lstm"), PortableText(words=False), chosen, resume=resume)

    goes_on(run, tmp_path, 29)


@pytest.mark.parametrize("truncation", [None, 3])
@pytest.mark.parametrize("name", ["tangle", "lstm"])
def test_sequences(name, truncation, tmp_path):
    """In the midst of a sequence, on its way forward or back, as well."""

    def run(engine, resume, **fields):
        chosen = sequence_settings(engine, truncation=truncation, **fields)
        source = PortableText(words=name == "tangle")
        return train(network(name), source, chosen, resume=resume)

    goes_on(run, tmp_path, 29)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, tmp_path):
    """What autograd's graphs keep of samples under way: convolutions, norms with statistics,
    attention, recurrent cells, several inputs and outputs."""
    build, item, classes = NETWORKS[name]
    loss = {"kind": "cross-entropy", "angle": "mse"} if name == "two by two" else None

    def run(engine, resume, **fields):
        return hamdist.train(
            made(build),
            from_iterable([item(n) for n in range(6)], classes=classes),
            loss=loss,
            engine=engine,
            dtype="float64",
            learning={"lr": 0.05},
            level="trace",
            partition={"blocks": 3},
            seed=4,
            resume=resume,
            **fields,
        )

    goes_on(run, tmp_path, 3)


class Sigmoid(torch.autograd.Function):
    """Keeps one thing as it should be, and another as an attribute."""

    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        ctx.above = x > 0
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y) * ctx.above


class Own(nn.Module):
    def forward(self, x):
        return Sigmoid.apply(x)


def odd():
    """Random masks, running statistics, a user's autograd function, a normalised weight."""
    return seeded(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 8)),
            nn.BatchNorm1d(8),
            nn.Dropout(0.4),
            Own(),
            nn.Linear(8, 8),
            nn.RReLU(),
            nn.Linear(8, 3),
        )
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"locality": {"memory": "trace+weights"}},
        {"learning": {"lr": 0.02, "momentum": 0.8, "adaptive": {}}},
        {"engine_": {"compress": {"block0->*": "int8", "*": "delta"}, "feedback": "on"}},
        {"engine_": {"compress": "codebook"}},
        {"engine_": {"blocks": {"block1": {"autocast": "bf16"}}}},
        {"engine_": {"step": "autograd"}},
        {"partition": {"blocks": 4, "delay": 3}},
        {
            "level": "pipeline",
            "locality": {"microbatches": 2},
            "partition": {"blocks": 3, "delay": 2},
            "engine_": {"compress": {"block0->*": "int4", "*": "delta"}, "feedback": "on"},
        },
    ],
    ids=lambda fields: ", ".join(fields) or "plain",
)
@pytest.mark.parametrize("build", [odd, chain])
def test_knobs(build, fields, tmp_path):
    given = {"level": "trace", "partition": {"blocks": 3}, **fields}
    more = given.pop("engine_", {})

    def run(engine, resume, **kept):
        chosen = settings({**engine, **more}, ITEMS, **given, **kept)
        return train(build(), PortableStream(ITEMS), chosen, resume=resume)

    goes_on(run, tmp_path, 5)


def test_a_users_loss_with_random_numbers(tmp_path):
    def loss(y, target):
        return nn.functional.cross_entropy(nn.functional.dropout(y, 0.3), target)

    def run(engine, resume, **fields):
        chosen = settings(engine, ITEMS, level="trace", **fields)
        return train(chain(), PortableStream(ITEMS), chosen, loss=loss, resume=resume)

    goes_on(run, tmp_path, 5)


class Aged(nn.Module):
    """A loss that keeps numbers, a list and a buffer; scale: of it, which stays."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.calls, self.means, self.scale = 0, [], scale
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, y, target):
        self.calls += 1
        self.means = [*self.means[-2:], float(y.mean())]
        self.seen += y.detach().abs().mean().to(self.seen)
        weight = 1 + 1 / self.calls + sum(self.means) + self.seen / self.calls
        return self.scale * weight * (y - target).square().mean()


class AgedObject(Aged):
    """The same, inside an object that is no module."""

    def __new__(cls):
        return partial(Aged.__call__, Aged())


@pytest.mark.parametrize("level", ["trace", "bptt", "bptt in chunks"])
@pytest.mark.parametrize("loss", [Aged, AgedObject])
def test_a_users_loss_that_keeps_state(loss, level, tmp_path):
    """At bptt in the midst of a sequence, whose slopes are made anew."""
    graph = network("lstm")
    blocks = [replace(b, loss=b.loss and loss()) for b in graph.blocks.values()]

    def run(engine, resume, **fields):
        truncation = 3 if "chunks" in level else None
        chosen = sequence_settings(engine, truncation=truncation, **fields)
        if level == "trace":
            chosen = settings(engine, ITEMS, level="trace", loss="mse", **fields)
            y = [(u, torch.eye(3)[y].to(u)) for u, y in batches(ITEMS)]
            source = from_iterable(y, outputs=3)
            return train(chain(), source, chosen, loss=loss(), resume=resume)
        return train(Graph(blocks), PortableText(words=False), chosen, resume=resume)

    goes_on(run, tmp_path, 5 if level == "trace" else 29)


def test_what_a_loss_is_made_with_is_the_new_runs(tmp_path):
    source = from_iterable([(u, torch.eye(3)[y].to(u)) for u, y in batches(ITEMS)], outputs=3)

    def run(loss, resume=None, **fields):
        chosen = settings(ALONE, ITEMS, level="trace", **fields)
        return train(chain(), source, chosen, loss=loss, resume=resume)

    run(Aged(), snapshots={"path": str(tmp_path), "every": 9, "keep": 99})
    ends = [run(Aged(0.0), str(place)) for place in folders(tmp_path)[1:3]]
    first, second = (list(end.model.parameters()) for end in ends)
    assert not all(map(torch.equal, first, second))  # (each stands where it began)


@pytest.mark.parametrize(
    "slices", [{"block1": 3}, {"block0": 2, "block1": 2}], ids=lambda s: ", ".join(s)
)
def test_slices(slices, tmp_path):
    run = run_of(chain, PortableStream, level="trace", partition={"slices": slices})
    goes_on(run, tmp_path, 5)


def test_batch_one_by_the_c_code(tmp_path):
    """Chains of linear layers on one row."""

    def build():
        return seeded(
            lambda: nn.Sequential(
                nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
            )
        )

    rows = [(u[:1], y[:1]) for u, y in batches(ITEMS)]

    def run(engine, resume, **fields):
        chosen = settings(engine, ITEMS, level="trace", partition={"blocks": 2}, **fields)
        return train(build(), from_iterable(rows, classes=3), chosen, resume=resume)

    goes_on(run, tmp_path, 5)


@pytest.mark.usefixtures("two_threads")
def test_as_many_threads_as_the_engine_has(tmp_path):
    """Whatever the program's: a restored block computes its kept outputs once more."""
    goes_on(run_of(chain, PortableStream, level="trace"), tmp_path, 7)


@pytest.mark.filterwarnings("ignore::hamdist.errors.ChoiceWarning")
@pytest.mark.parametrize("level", ["auto", "trace"])
@pytest.mark.parametrize(
    "derived", [lambda s: s, lambda s: Withhold(s, 0.3, 1)], ids=["itself", "with targets withheld"]
)
def test_a_list_is_read_again(level, derived, tmp_path):
    """Also where its first samples have been looked at."""

    def run(engine, resume, **fields):
        chosen = settings(engine, ITEMS, level=level, **fields)
        return train(chain(), derived(stream(ITEMS)), chosen, resume=resume)

    goes_on(run, tmp_path, 5)


@pytest.mark.parametrize("again", [list, iter], ids=["a longer list", "an iterator with the rest"])
def test_a_stream_that_was_over_and_has_more(again, tmp_path):
    """At level backprop, by plain steps, with the weights of the run that never stopped."""

    def run(items, **given):
        chosen = settings(ALONE, None, level="backprop", snapshots=kept)
        return train(chain(), from_iterable(items, classes=3), chosen, **given)

    kept = {"path": str(tmp_path), "every": 3, "keep": 1000}
    items = batches(12)
    whole = run(items)
    shutil.rmtree(tmp_path)
    first = run(items[:7])
    assert_equal(first, run(items[:7], resume=folders(tmp_path)[-1]))
    with pytest.warns(UserWarning, match="its stream was over, and the samples differ"):
        on = run(again(items if again is list else items[7:]), resume=folders(tmp_path)[-1])
    assert on.samples == 5
    new, old = on.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old)


# -- another cut of the same network -----------------------------------------------------------


def test_another_partition_takes_over_the_weights(tmp_path):
    """By hand: the first run's weights at that time, and then a run of its own on the rest."""
    first = run_of(chain, PortableStream, level="backprop", partition={"blocks": 2})
    kept = {"path": str(tmp_path / "a"), "every": 4, "keep": 1000}
    first(ALONE, None, snapshots=kept)
    folder = folders(tmp_path / "a")[3]
    import json

    samples = json.loads((folder / "manifest.json").read_text())["samples"]
    # At level backprop with c = 3 ticks a sample, the weights have moved for whole samples.
    before = run_of(chain, PortableStream, level="backprop", partition={"blocks": 2})
    short = train(
        chain(),
        PortableStream(ITEMS),
        settings(ALONE, samples - 1, level="backprop", partition={"blocks": 2}),
    )
    rest = batches(ITEMS)[samples:]
    for blocks in (3, 5):
        chosen = settings(ALONE, ITEMS, level="backprop", partition={"blocks": blocks})
        with pytest.warns(UserWarning, match="its weights and its place in the stream"):
            on = train(chain(), PortableStream(ITEMS), chosen, resume=folder)
        assert on.samples == ITEMS - samples
        by_hand = train(
            _current(short, folder, before),
            from_iterable(rest, classes=3),
            settings(ALONE, len(rest), level="backprop", partition={"blocks": blocks}),
        )
        old, new = by_hand.model.state_dict(), on.model.state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old)


def _current(short, folder, before):
    """The model with the snapshot's weights, read from its files by safetensors alone."""
    from safetensors import safe_open

    model = chain()
    state = model.state_dict()
    found = []
    for file in sorted(folder.glob("block-*.safetensors")):
        with safe_open(file, "pt") as opened:
            found += [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118
    for key, value in state.items():
        fitting = [t for t in found if t.shape == value.shape]
        near = min(fitting, key=lambda t: float((t - short.model.state_dict()[key]).norm()))
        state[key] = near
    model.load_state_dict(state)
    return model


# -- files -------------------------------------------------------------------------------------


def small(path):
    run = run_of(chain, PortableStream, 8, level="trace")
    run(ALONE, None, snapshots={"path": str(path), "every": 4, "keep": 1000})
    return run, folders(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    run, found = small(tmp_path)
    for kind in ("block-1.*.safetensors", "manifest.json"):
        (file,) = found[-1].glob(kind)
        name = file.name
        data = file.read_bytes()
        for length in range(0, len(data), 37):
            file.write_bytes(data[:length])
            with pytest.raises(SnapshotError, match=name):
                train(chain(), PortableStream(8), settings(ALONE, 8), resume=found[-1])
        file.write_bytes(data)
    run(ALONE, found[-1], snapshots={"path": str(tmp_path / "on")})


def test_an_altered_file_is_named_and_the_snapshot_before_is_used(tmp_path):
    run, found = small(tmp_path)
    whole = run(ALONE, None)
    (file,) = found[-1].glob("block-2.*")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=r"block-2.*.safetensors: altered.*before it is used"):
        assert_equal(whole, run(ALONE, tmp_path))


def test_another_runs_snapshots_are_not_mixed_with(tmp_path):
    run, found = small(tmp_path)
    with pytest.raises(SnapshotError, match="another run's snapshots lie there"):
        run(ALONE, None, snapshots={"path": str(tmp_path)})
    chosen = settings(ALONE, 8, level="backprop", snapshots={"path": str(tmp_path), "every": 2})
    with pytest.warns(UserWarning, match="its weights and its place"):
        on = train(chain(), PortableStream(8), chosen, resume=found[0])
    assert all(f"from-{found[0].name}/" in name for name in on.snapshots)


def test_a_file_system_by_url(tmp_path):
    """fsspec's: of a cloud, or as here of this process's memory."""
    import fsspec

    run = run_of(chain, PortableStream, 8, level="trace")
    kept = {"path": f"memory://{tmp_path.name}/a", "every": 4, "keep": 2}
    whole = run(ALONE, None, snapshots=kept)
    assert [name.rpartition("/")[0] for name in whole.snapshots] == [kept["path"]] * 2
    assert len(fsspec.filesystem("memory").ls(f"/{tmp_path.name}/a")) == 2
    assert_equal(whole, run(ALONE, kept["path"]))
    folder = f"/{tmp_path.name}/a/{whole.snapshots[-1].rpartition('/')[2]}"
    found = fsspec.filesystem("memory").ls(folder, detail=False)
    fsspec.filesystem("memory").pipe_file(next(f for f in found if "block-0" in f), b"damaged")
    with pytest.warns(UserWarning, match="block-0"):
        assert_equal(whole, run(ALONE, kept["path"]))


def test_no_snapshot(tmp_path):
    with pytest.raises(SnapshotError, match="no snapshots there"):
        train(chain(), PortableStream(8), settings(ALONE, 8), resume=tmp_path / "none")


def test_only_the_latest_are_kept(tmp_path):
    run = run_of(chain, PortableStream, level="trace")
    result = run(ALONE, None, snapshots={"path": str(tmp_path), "every": 4, "keep": 2})
    found = [str(p) for p in folders(tmp_path)]
    assert len(found) == 2
    assert result.snapshots == found
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.split("/")[-1] for p in found)


def test_what_nobody_finished_takes_no_place(tmp_path):
    """An actor was lost while it wrote: such a folder is no snapshot, and goes with the next."""
    run = run_of(chain, PortableStream, level="trace")
    left = tmp_path / "tick-000000000010"
    left.mkdir(parents=True)
    (left / "block-0.0.1.safetensors").write_bytes(b"half")
    run(ALONE, None, snapshots={"path": str(tmp_path), "every": 4, "keep": 2})
    assert len(folders(tmp_path)) == 2
    assert not left.exists()


def test_another_model(tmp_path):
    _, found = small(tmp_path)
    with pytest.raises(SnapshotError, match="weights"):
        train(chain(width=5), PortableStream(8), settings(ALONE, 8), resume=found[0])


ROTATED = {"adaptive": {}, "inputs": {"rule": "rotated", "refresh": 4}}
LEARNING = {
    "plain": {},
    "average": {"average": 0.9},
    "average of a block": {"blocks": {"block1": {"average": 0.5}}},
    "whitened": {"inputs": "whitened"},
    "rotated": ROTATED,
    "heads": {"heads": {"weight": 0.3}},
    "heads without norm": {"heads": {"norm": False}},
    "a head": {"blocks": {"block1": {"heads": 0.5}}},
    "adam": {"optimizer": "adamw"},
    "amsgrad": {"optimizer": {"name": "adamw", "amsgrad": True}, "average": 0.9},
    "rmsprop": {"optimizer": {"name": "rmsprop"}},
    "rmsprop, centred": {"optimizer": {"name": "rmsprop", "centered": True, "momentum": 0.5}},
}


def test_learning_that_changes_its_state_goes_on_or_takes_over_the_weights(tmp_path):
    """The run goes on, says so, and takes snapshots; each beside its neighbours in the list."""

    def run(name, resume=None, **fields):
        given = {"partition": {"blocks": 3}, "learning": {"lr": 0.01, **LEARNING[name]}, **fields}
        return train(
            chain(), stream(12), settings(ALONE, 12, level="trace", **given), resume=resume
        )

    for name in LEARNING:
        run(name, snapshots={"path": str(tmp_path / name), "every": 5, "keep": 9})
    pairs = [*itertools.pairwise([*LEARNING, "plain"])]
    for before, after in [*pairs, *(pair[::-1] for pair in pairs)]:
        path = tmp_path / f"{before}, {after}"
        kept = {"path": str(path), "every": 3, "keep": 9}
        told = "the run goes on with other settings|was taken of another run"
        with pytest.warns(HamdistWarning, match=told):
            result = run(after, str(folders(tmp_path / before)[0]), snapshots=kept)
        assert all(p.isfinite().all() for p in result.model.parameters())
        assert len(folders(path)) > 1


def test_other_settings_are_told(tmp_path):
    _, found = small(tmp_path)
    chosen = settings(ALONE, 8, level="trace", learning={"lr": 0.01})
    with pytest.warns(UserWarning, match="other settings than before: learning"):
        train(chain(), PortableStream(8), chosen, resume=found[0])
    assert BATCH == 4


RULE = """
from functools import cached_property

import hamdist
from torch import nn

FAR, NEAR, UNUSED = 1.0, 1.0, 1.0
WIDE = 1.0
SHARES = {"message": [1.0]}

def times(by):
    def scaled(value, more=1.0):
        return value * by * more * FAR
    return scaled

TIMES = times(1.0)

class Scaled(hamdist.Rule):
    def __init__(self, factor=1.0):
        self.factor = factor

    def backward(self, block, kept, message):
        return block.vjp(kept, TIMES(message) * SHARES["message"][0])  # CODE

class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.layers, self.scale = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), scale

    @cached_property
    def width(self):
        return WIDE

    def forward(self, u):
        return self.layers(u) * NEAR * self.scale * self.width

def loss(prediction, target):
    return nn.functional.cross_entropy(prediction * FAR, target)

class Late(hamdist.OwnLevel):
    def ticks(self, graph):
        return 2 * graph.depth + 2

    def events(self, graph):
        for block, depth in graph.depths.items():
            yield depth, block, "F", 0
            yield 2 * graph.depth - depth + LATE * (depth == 0), block, "B", 0
"""


def test_code_without_source_is_the_same_in_every_process():
    """The elements of a set come in another order there; here, in that of putting them in."""

    def one_of(x):
        return x in {0, 8}

    digests, code = [], one_of.__code__
    for order in ([0, 8], [8, 0]):
        constants = [frozenset(order) if isinstance(c, frozenset) else c for c in code.co_consts]
        same = code.replace(co_consts=tuple(constants), co_filename="<stdin>")
        loss = FunctionType(same, {"__name__": "__main__"})
        digests.append(code_digests({"the loss": loss}))
    assert digests[0] == digests[1] != {}


RULE_CHANGED = r"of the rule of \* have changed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("# CODE", "# other"), RULE_CHANGED),
        (("factor=1.0", "factor=2.0"), RULE_CHANGED),
        (("more=1.0", "more=2.0"), RULE_CHANGED),
        (("times(1.0)", "times(2.0)"), RULE_CHANGED),
        (('"message": [1.0]', '"message": [2.0]'), RULE_CHANGED),
        (("FAR, NEAR, UNUSED = 1.0", "FAR, NEAR, UNUSED = 2.0"), f"the loss, {RULE_CHANGED[3:]}"),
        (("UNUSED = 1.0, 1.0", "UNUSED = 1.0, 2.0"), "constants of the model have"),
        (("scale=1.0", "scale=2.0"), "constants of the model have"),
        (("WIDE = 1.0", "WIDE = 2.0"), "constants of the model have"),
        (("1.0, 1.0, 1.0", "1.0, 1.0, 2.0"), None),
        (("LATE", "1"), r"another run \(round differ\)"),
        (("import", "import"), None),
    ],
)
def test_code_that_has_changed_is_told(change, said, tmp_path, user_file, monkeypatch, recwarn):
    """Of the same name: a rule goes on otherwise, with a warning; other rounds begin anew."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend("")
    kept = {"path": str(tmp_path / "snapshots"), "every": 5}
    for steps, text in ((8, RULE), (12, RULE.replace(*change))):
        name = user_file(text.replace("LATE", "0"))
        sys.modules.pop(name.removesuffix(".py"), None)
        code = importlib.import_module(name.removesuffix(".py"))
        fields = {"rules": {"*": f"{name}:Scaled"}, "snapshots": kept, "engine": ALONE}
        resume = kept["path"] if steps == 12 else None
        fields |= {"loss": code.loss, "level": f"{name}:Late"}
        on = hamdist.train(code.Net(), PortableStream(12), steps=steps, resume=resume, **fields)
    told = [text for text in on.warnings if re.search(said or "code or|another run", text)]
    assert len(told) == (0 if said is None else 1), on.warnings
