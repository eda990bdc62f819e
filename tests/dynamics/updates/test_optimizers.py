"""Oracle: torch.optim on the whole model, in float64; and the steps of `learning`, which have
oracles of their own (test_recipes.py)."""

from __future__ import annotations

import copy
import importlib
import linecache
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from dynamics.helpers import mlp, relative, samples, settings
from dynamics.sequences import text
from torch import nn, optim

import hamdist
from hamdist.config import Level, Settings
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import HamdistError, HamdistWarning, LevelError, SettingsError
from hamdist.streams import from_iterable
from hamdist.study.run.baseline import train_centralised

F64 = torch.float64


def net():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        parts = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()]
        return nn.Sequential(*parts, nn.Linear(6, 2)).to(F64)


ITEMS = samples(30, 3, 4, 2)


def source(items=ITEMS):
    return from_iterable(items, outputs=2)


def train(model=net, items=ITEMS, level="backprop", **given):
    return hamdist.train(
        model(), source(items), loss=mse, level=level, dtype="float64", steps=len(items), **given
    )


def by_hand(make, scheduler=None, *, model=net, items=ITEMS, clip=None):
    """make: the optimisers of named parameters. Samples whose target is None only count."""
    own = model()
    optimisers = make({n: p for n, p in own.named_parameters() if p.requires_grad})
    schedulers = [scheduler(one) for one in optimisers] if scheduler else []
    for u, y in items:
        if y is not None:
            own.zero_grad()
            mse(own(u), y).backward()
            for layer in own if clip else ():
                g = [p.grad for p in layer.parameters()]
                norm = sum(float(one.square().sum()) for one in g) ** 0.5
                for one in g if norm > clip else ():
                    one.mul_(clip / norm)
            for one in optimisers:
                one.step()
        for one in schedulers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one.step()
    return own


def muon(parameters):
    parameters = list(parameters)
    parts = (
        (optim.Muon, [p for p in parameters if p.ndim == 2]),
        (optim.AdamW, [p for p in parameters if p.ndim != 2]),
    )
    return [kind(own, lr=1e-2, weight_decay=0.1) for kind, own in parts if own]


class Replaces(optim.Optimizer):
    """SGD that puts new tensors in the weights' places."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.param_groups[0]["lr"] * p.grad


HAS_MUON = hasattr(optim, "Muon")
OPTIMISERS = {
    "SGD": lambda p: optim.SGD(p, 0.1),
    "SGD, Nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "Adam": lambda p: optim.Adam(p, 1e-2, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, 1e-2, betas=(0.8, 0.95), weight_decay=0.05),
    "RMSprop": lambda p: optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, 0.1, lr_decay=0.01),
    "a user's": lambda p: Replaces(p, 0.1),
    "NAdam": lambda p: optim.NAdam(p, 1e-2),
    **({"Adafactor": lambda p: optim.Adafactor(p, 0.1)} if hasattr(optim, "Adafactor") else {}),
    **({"Muon": muon} if HAS_MUON else {}),
}


def course(optimiser):
    return optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            optim.lr_scheduler.LinearLR(optimiser, 0.1, total_iters=5),
            optim.lr_scheduler.CosineAnnealingLR(optimiser, 25),
        ],
        milestones=[5],
    )


@pytest.mark.parametrize("blocks", [None, 1, 2])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_backprop_equals_torch(name, blocks):
    make = OPTIMISERS[name]
    scheduler = course if blocks else None
    result = train(optimizer=make, scheduler=scheduler, partition={"blocks": blocks})

    def all_of(named):
        made = make(named.values())
        return made if isinstance(made, list) else [made]

    expected = by_hand(all_of, scheduler)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12
    assert relative(result.model.parameters(), net().parameters()) > 1e-3


GROUPS: dict[str, dict[str, float]] = {"vectors": {"weight_decay": 0.0}, "3.*": {"lr": 3e-3}}
NAMED: dict[str, dict[str, object]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "adam": {"betas": [0.8, 0.95], "weight_decay": 0.02},
    "adamw": {"betas": (0.8, "9.5e-1"), "weight_decay": 0.02},
    "rmsprop": {"alpha": 0.9, "weight_decay": 0.02},
    "adagrad": {"lr_decay": 0.1, "weight_decay": 0.02},
    **({"adafactor": {"d": 2.0, "weight_decay": 0.02}} if hasattr(optim, "Adafactor") else {}),
}


@pytest.mark.parametrize("name", NAMED)
def test_settings_with_groups_are_torchs_and_so_is_the_baseline(name):
    own = {"name": name, **NAMED[name], "groups": GROUPS}
    learning = {"lr": 1e-2, "decay": "cosine", "optimizer": own}
    result = train(learning=learning)
    kind = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
    options = {k: (0.8, 0.95) if k == "betas" else v for k, v in NAMED[name].items()}

    def grouped(named):
        vectors = [p for p in named.values() if p.ndim < 2]
        groups = [
            {"params": [named["0.weight"], named["5.weight"]]},
            {"params": vectors, "weight_decay": 0.0},
            {"params": [named["3.weight"]], "lr": 3e-3},
        ]
        one = getattr(optim, kind.get(name, name.capitalize()))
        return [one(groups, lr=1e-2, **options)]

    def cosine(optimiser):
        return optim.lr_scheduler.CosineAnnealingLR(optimiser, len(ITEMS))

    expected = by_hand(grouped, cosine)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12
    chosen = Settings(learning=learning, steps=len(ITEMS), dtype="float64")
    central = train_centralised(net(), source(), chosen, loss=mse)
    assert relative(central.model.parameters(), expected.parameters()) <= 1e-12


@pytest.mark.skipif(not HAS_MUON, reason="torch has Muon from 2.9 on")
def test_muon_by_settings_leaves_what_is_no_matrix_to_adamw():
    one = {"name": "muon", "weight_decay": 0.1, "rest": {"lr": 3e-3, "betas": [0.8, 0.9]}}
    result = train(learning={"lr": 1e-2, "optimizer": one})

    def parts(named):
        matrices = [p for p in named.values() if p.ndim == 2]
        others = [p for p in named.values() if p.ndim != 2]
        return [
            optim.Muon(matrices, lr=1e-2, weight_decay=0.1),
            optim.AdamW(others, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.9)),
        ]

    assert relative(result.model.parameters(), by_hand(parts).parameters()) <= 1e-12


def test_lr_by_block_and_where_it_is_given():
    blocks = {"blocks": {"block0": {"lr": 0.0}}}
    result = train(learning={"optimizer": "adamw", "lr": 1e-2, **blocks})
    first, *others = zip(result.model.parameters(), net().parameters(), strict=True)
    assert torch.equal(*first)
    assert not torch.equal(*others[2])
    expected = by_hand(lambda named: [optim.AdamW(named.values())])
    plain = train(learning={"optimizer": "adamw"})  # with torch's own step size
    assert relative(plain.model.parameters(), expected.parameters()) <= 1e-12
    settled = Settings(learning={"optimizer": {"name": "adamw", "lr": 1e-4}})
    assert settled.learning.lr == 1e-4
    again = Settings.model_validate(settled.model_dump(mode="json"))
    assert again.learning == settled.learning


def test_clipping_goes_before_the_step():
    learning = {"optimizer": "adamw", "lr": 1e-2, "clip": 0.02}
    expected = by_hand(lambda named: [optim.AdamW(named.values(), 1e-2)], clip=0.02)
    result = train(learning=learning)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12
    unclipped = train(learning={"optimizer": "adamw", "lr": 1e-2})
    assert relative(result.model.parameters(), unclipped.model.parameters()) > 1e-4


def test_omega_is_the_gradient_even_where_the_optimiser_uses_it_up():
    def omega(foreach):
        def nesterov(parameters):
            return optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, foreach=foreach)

        blocks = train(optimizer=nesterov).blocks
        return [t for name in blocks for t in blocks[name].omega.values()]

    assert relative(omega(True), omega(False)) <= 1e-12


def test_items_without_target_are_items_of_a_scheduler():
    items = [(u, None if n % 3 == 0 else y) for n, (u, y) in enumerate(ITEMS)]
    make = OPTIMISERS["AdamW"]
    result = hamdist.train(
        net(),
        source(items),
        loss=mse,
        level="backprop",
        dtype="float64",
        optimizer=make,
        scheduler=course,
    )
    expected = by_hand(lambda named: [make(named.values())], course, items=items)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12


# -- against the steps of `learning` -------------------------------------------------------------


PRODUCT = {
    "trace": {"level": "trace", "locality": {"delay_power": 0.5}},
    "trace, weights kept": {"level": "trace", "locality": {"memory": "trace+weights"}},
    "trace, by autograd": {"level": "trace", "engine": {"step": "autograd"}},
    "heads": {"level": "heads"},
    "pipeline": {"level": "pipeline", "locality": {"microbatches": 2}},
    "backprop, tau": {"level": "backprop", "dynamics": {"tau": 0.25}},
}
RECIPE = {"lr": 0.1, "clip": 0.3, "average": 0.9, "warmup": 5, "decay": "linear"}


@pytest.mark.parametrize("inputs", ["off", "whitened"])
@pytest.mark.parametrize("name", PRODUCT)
def test_sgd_of_torchs_is_that_of_learning(name, inputs):
    """With clipping, averages, falling and delay-dependent steps, whitened inputs."""
    if name == "pipeline":
        inputs = "off"  # (refused with micro-batches)
    recipe = {**RECIPE, "inputs": inputs}
    engine = {"threads": 1}
    fields = {"engine": engine, **PRODUCT[name]}
    own = train(learning={**recipe, "momentum": 0.7, "weight_decay": 0.01}, **fields)
    sgd = {"name": "sgd", "momentum": 0.7, "weight_decay": 0.01}
    other = train(learning={**recipe, "optimizer": sgd}, **fields)
    assert relative(other.model.parameters(), own.model.parameters()) <= 1e-12
    assert relative(other.plain.parameters(), own.plain.parameters()) <= 1e-12
    assert relative(other.model.parameters(), net().parameters()) > 1e-3


class Twice(nn.Module):
    """A layer that two blocks use, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.still = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.still.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.still(x))
        return self.last(torch.tanh(self.first(x)))


def twice():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Twice().to(F64)


@pytest.mark.parametrize("name", ["SGD, Nesterov", "AdamW", *(["Muon"] if HAS_MUON else [])])
def test_the_owner_of_a_weight_moves_it_and_frozen_ones_stay(name):
    make = OPTIMISERS[name]
    result = train(twice, optimizer=make)
    users = [b for b, s in result.blocks.items() if any("first" in key for key in s.theta)]
    assert len(result.blocks) > 2
    assert len(users) == 1

    def all_of(named):
        made = make(named.values())
        return made if isinstance(made, list) else [made]

    expected = by_hand(all_of, model=twice)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12
    assert torch.equal(result.model.still.weight, twice().still.weight)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_slices(name):
    def wide():
        with torch.random.fork_rng():
            torch.manual_seed(6)
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(F64)

    learning = {"optimizer": {"name": name, "weight_decay": 0.01}, "lr": 1e-2}
    whole = train(wide, learning=learning)
    sliced = train(wide, learning=learning, partition={"slices": {"block0": 3}})
    assert relative(sliced.model.parameters(), whole.model.parameters()) <= 1e-12


@pytest.mark.parametrize("name", OPTIMISERS)
def test_micro_batches_make_one_step_and_are_one_item_of_a_scheduler(name):
    make = OPTIMISERS[name]
    result = train(level="pipeline", locality={"microbatches": 2}, optimizer=make, scheduler=course)

    def all_of(named):
        made = make(named.values())
        return made if isinstance(made, list) else [made]

    expected = by_hand(all_of, course)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12


def test_a_sequence_moves_once_by_the_sum_of_its_gradients():
    model, data = mlp([3, 5, 2]), text([3, 1, 4, 4])
    own = copy.deepcopy(model)
    optimiser = optim.AdamW(own.parameters(), 1e-2)
    for u, y in zip(data.u, data.y, strict=True):
        optimiser.zero_grad()
        torch.stack([mse(own(x), t) for x, t in zip(u, y, strict=True)]).sum().backward()
        optimiser.step()
    learning = {"optimizer": "adamw", "lr": 1e-2}
    stream = from_iterable(data.samples, outputs=2)
    result = hamdist.train(
        model, stream, loss=mse, level="bptt", dtype="float64", learning=learning
    )
    assert relative(result.model.parameters(), own.parameters()) <= 1e-12


# -- what is refused -----------------------------------------------------------------------------

SLICED = {"partition": {"slices": {"block0": 2}}}
ADAMW = {"learning": {"optimizer": "adamw"}}
REFUSED = {
    "hold": (
        {"level": "local", **ADAMW},
        LevelError,
        r"learning\.optimizer with presentation 'hold'",
    ),
    "hold, function": (
        {"level": "group", "optimizer": OPTIMISERS["SGD"]},
        LevelError,
        r"optimizer \(a function\) with presentation 'hold'",
    ),
    "unknown": (
        {"learning": {"optimizer": "adamww"}},
        SettingsError,
        r"learning\.optimizer: torch .* has no optimiser 'adamww'.*known: .*adamw",
    ),
    "argument": (
        {"learning": {"optimizer": {"name": "adamw", "beta": 0.9}}},
        SettingsError,
        r"beta: no such argument of torch\.optim\.AdamW.*known: lr, betas",
    ),
    "group's argument": (
        {"learning": {"optimizer": {"name": "adamw", "groups": {"*.bias": {"decay": 0}}}}},
        SettingsError,
        r"groups\.\*\.bias\.decay: no such argument",
    ),
    "value": (
        {"learning": {"optimizer": {"name": "adamw", "betas": [1.5, 0.9]}}},
        SettingsError,
        r"torch\.optim\.AdamW does not take .*Invalid beta",
    ),
    "group without weights": (
        {"learning": {"optimizer": {"name": "adamw", "groups": {"*conv*": {"lr": 0.1}}}}},
        SettingsError,
        r"learning\.optimizer\.groups\.\*conv\*: no such weight",
    ),
    "momentum": (
        {"learning": {"optimizer": "sgd", "momentum": 0.5}},
        SettingsError,
        r"'momentum' beside 'optimizer'",
    ),
    "adaptive": (
        {"learning": {"optimizer": "sgd", "adaptive": {}}},
        SettingsError,
        r"'adaptive' beside 'optimizer'",
    ),
    "two step sizes": (
        {"learning": {"lr": 0.1, "optimizer": {"name": "sgd", "lr": 0.2}}},
        SettingsError,
        r"'lr' is 0\.1 and 'optimizer\.lr' 0\.2",
    ),
    "rest": (
        {"learning": {"optimizer": {"name": "sgd", "rest": {"lr": 0.2}}}},
        SettingsError,
        r"'rest' belongs to name 'muon'",
    ),
    "both": (
        {"optimizer": OPTIMISERS["SGD"], **ADAMW},
        SettingsError,
        "give one of them",
    ),
    "function and lr": (
        {"optimizer": OPTIMISERS["SGD"], "learning": {"lr": 0.1}},
        SettingsError,
        r"learning\.lr beside optimizer, a function",
    ),
    "function and lr of a block": (
        {"optimizer": OPTIMISERS["SGD"], "learning": {"blocks": {"block0": {"lr": 0.1}}}},
        SettingsError,
        r"learning\.blocks\.block0\.lr beside optimizer",
    ),
    "scheduler alone": ({"scheduler": course}, SettingsError, "scheduler without an optimiser"),
    "scheduler and decay": (
        {"scheduler": course, "learning": {"optimizer": "sgd", "decay": "linear"}},
        SettingsError,
        r"scheduler beside learning\.decay",
    ),
    "plateau": (
        {"scheduler": optim.lr_scheduler.ReduceLROnPlateau, **ADAMW},
        SettingsError,
        "returned a ReduceLROnPlateau",
    ),
    "no function": ({"optimizer": "adamw"}, SettingsError, "optimizer is 'adamw'; give a function"),
    "no optimiser": (
        {"optimizer": lambda params: params},
        SettingsError,
        "the function returned a Parameter for block 'block0'",
    ),
    "fails": (
        {"optimizer": lambda params: optim.SGD(params, lr=-1)},
        SettingsError,
        "the function failed for block 'block0': ValueError: Invalid learning rate",
    ),
    "others' weights": (
        {"optimizer": lambda _: optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)},
        SettingsError,
        "parameters that are not the block's",
    ),
    "closure": ({"optimizer": optim.LBFGS}, SettingsError, "LBFGS asks for the loss again"),
    "prediction": (
        {"locality": {"compensation": "weight-prediction"}, "level": "trace", **ADAMW},
        LevelError,
        "compensation 'weight-prediction' beside learning.optimizer",
    ),
    "look-ahead": (
        {"locality": {"compensation": "look-ahead"}, "level": "trace", **ADAMW},
        LevelError,
        "look-ahead",
    ),
    "heads beside messages": (
        {"level": "trace", "learning": {"optimizer": "adamw", "heads": {}}},
        LevelError,
        r"learning\.heads beside messages",
    ),
    "beta": (
        {"dynamics": {"beta": 0.1}, **ADAMW},
        LevelError,
        r"dynamics\.beta beside learning\.optimizer",
    ),
    "dissipation": (
        {"dynamics": {"eta_omega": 0.5}, **ADAMW},
        LevelError,
        r"dynamics\.eta_omega beside learning\.optimizer",
    ),
    **(
        {
            "adafactor in slices": (
                {"learning": {"optimizer": "adafactor"}, **SLICED},
                LevelError,
                r"learning\.optimizer Adafactor with partition\.slices",
            )
        }
        if hasattr(optim, "Adafactor")
        else {}
    ),
    **(
        {
            "muon in slices": (
                {"optimizer": muon, **SLICED},
                LevelError,
                r"optimizer \(a function\) Muon with partition\.slices",
            )
        }
        if HAS_MUON
        else {}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name):
    fields, kind, text = copy.deepcopy(REFUSED[name])
    with pytest.raises(kind, match=text) as error:
        train(**fields)
    assert isinstance(error.value, HamdistError)
    assert len(str(error.value).splitlines()) == 1


# -- going on ------------------------------------------------------------------------------------


def kept(path, **given):
    return train(snapshots={"path": str(path), "every": 40, "keep": 100}, **given)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_goes_on_to_the_same_bits(name, tmp_path):
    given = {"optimizer": OPTIMISERS[name], "scheduler": course, "level": "backprop"}
    whole = kept(tmp_path / "a", **given)
    found = sorted(tmp_path.glob("a/tick-*"))
    with pytest.warns(HamdistWarning, match="going on from"):
        again = kept(tmp_path / "b", resume=found[1], **given)
    assert len(found) > 2
    assert relative(again.model.parameters(), whole.model.parameters()) == 0


def test_goes_on_with_another_step_size(tmp_path):
    """The state of each weight stays, the new arguments hold."""
    make = {lr: lambda p, lr=lr: optim.SGD(p, lr, momentum=0.9) for lr in (0.1, 0.0)}
    kept(tmp_path / "a", optimizer=make[0.1])
    found = sorted(tmp_path.glob("a/tick-*"))[1]
    with pytest.warns(HamdistWarning, match="going on from"):
        still = kept(tmp_path / "b", optimizer=make[0.0], resume=found)
    with pytest.warns(HamdistWarning):
        other = kept(tmp_path / "c", optimizer=OPTIMISERS["AdamW"], resume=found)
    assert relative(still.model.parameters(), net().parameters()) > 1e-3
    assert relative(other.model.parameters(), still.model.parameters()) > 1e-3


SIGNS = """
import torch

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=1.0, shrink=0.0):
        super().__init__(params, {"lr": lr, "shrink": shrink})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["shrink"]).sub_(group["lr"] * p.grad.sign())

def signs(params, lr, shrink):
    return Signs(params, lr, shrink)

def none(params, lr):
    return None
"""


@pytest.fixture
def signs(tmp_path, monkeypatch):
    """A file with an optimiser, and its step by hand."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_signs.py").write_text(SIGNS)
    yield f"{tmp_path}/own_signs.py"
    sys.modules.pop("own_signs", None)


@pytest.mark.parametrize("kind", ["Signs", "signs"])
@pytest.mark.parametrize("engine", [{"kind": "inprocess"}, {"kind": "ray", "actors": 2}])
def test_settings_name_an_optimiser_by_its_file(kind, engine, signs):
    named = {"name": f"{signs}:{kind}", "shrink": 0.1, "groups": {"vectors": {"shrink": 0.0}}}
    learning = {"lr": 1e-3, "optimizer": named, "blocks": {"block1": {"lr": 2e-3}}}
    result = train(learning=learning, engine=engine)
    expected = net()
    for u, y in ITEMS:
        gradients = torch.autograd.grad(mse(expected(u), y), list(expected.parameters()))
        for (name, p), g in zip(expected.named_parameters(), gradients, strict=True):
            lr = 2e-3 if name.startswith("1.") else 1e-3
            shrink = 0.0 if p.ndim < 2 else 0.1
            p.data = p.data * (1 - lr * shrink) - lr * g.sign()
    assert list(result.blocks) == ["block0", "block1", "block2", "block3"]
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12
    del learning["blocks"]
    plain = train(learning=learning)
    chosen = Settings(learning=learning, steps=len(ITEMS), dtype="float64")
    central = train_centralised(net(), source(), chosen, loss=mse)
    assert relative(plain.model.parameters(), central.model.parameters()) <= 1e-12


def test_an_optimiser_that_settings_name_goes_on_and_its_code_is_known(signs, tmp_path):
    given = {"learning": {"lr": 1e-3, "optimizer": {"name": f"{signs}:Signs", "shrink": 0.1}}}
    whole = kept(tmp_path / "a", **given)
    found = sorted(tmp_path.glob("a/tick-*"))[1]
    with pytest.warns(HamdistWarning, match="going on from"):
        again = kept(tmp_path / "b", resume=found, **given)
    assert relative(again.model.parameters(), whole.model.parameters()) == 0
    sys.modules.pop("own_signs")
    Path(signs).write_text(SIGNS.replace(".sign()", ".sign() * 1.0"))
    importlib.invalidate_caches()
    linecache.clearcache()
    with pytest.warns(HamdistWarning, match="learning.optimizer"):
        kept(tmp_path / "c", resume=found, **given)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("gone.py:Signs", "learning.optimizer 'gone.py:Signs': there is no file 'gone.py'"),
        ("FILE:Gone", "has no 'Gone'"),
        ({"name": "FILE:Signs", "shrunk": 1}, "unexpected keyword argument 'shrunk'"),
        ("FILE:none", "made a NoneType; name a torch.optim.Optimizer"),
        ({"name": "FILE:Signs", "groups": {"gone*": {"lr": 1}}}, "groups"),
    ],
)
def test_an_optimiser_that_settings_name_is_refused(named, text, signs):
    own = {"name": named} if isinstance(named, str) else named
    own = {**own, "name": own["name"].replace("FILE", signs)}
    with pytest.raises(SettingsError, match=re.escape(text)):
        train(learning={"lr": 1e-3, "optimizer": own})


def test_an_optimiser_that_settings_name_needs_a_step_size():
    with pytest.raises(ValueError, match="optimizer 'a.py:B': give its step size, lr"):
        Settings(learning={"optimizer": "a.py:B"})


def test_no_optimiser_no_entry():
    assert settings("trace").learning.optimizer is None
    assert Settings(learning={"optimizer": "off"}).learning.optimizer is None
    over = Settings(
        learning={"optimizer": "adamw"}, levels={"local": {"learning": {"optimizer": None}}}
    )
    assert over.for_level(Level.LOCAL).learning.optimizer is None


def test_a_model_in_evaluation_mode_is_told():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    assert "evaluation" not in str(by_mode(model.double()))
    model[1].eval()
    assert "evaluation" not in str(by_mode(model))
    told = "in evaluation mode, so its BatchNorm1d, Dropout learn as they are there"
    assert told in str(by_mode(model.eval()))
    assert "evaluation" not in str(by_mode(net().eval()))


def by_mode(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HamdistWarning)
        return train(lambda: model).warnings


def test_a_model_that_is_frozen_as_a_whole_is_told():
    model = net().requires_grad_(False)
    with pytest.warns(HamdistWarning, match="no weight of the model learns"):
        train(lambda: model)
