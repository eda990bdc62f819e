"""Oracle: torch.optim.SGD on the uncut model, float64. What a forward does besides arithmetic
(Python state, hooks, autograd.Functions) is honoured at level `backprop`, or refused by name."""

from __future__ import annotations

import copy
import itertools
import random
import re
import time
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from dynamics.helpers import F64, relative, settings
from torch import nn

import hamdist
from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.vjp.closed import make_closed
from hamdist.errors import GraphError
from hamdist.streams import from_iterable

STEPS, LR, ROUND_OFF = 20, 0.1, 1e-12
SWITCH = 8  # calls after which a stateful forward does something else


def items():
    random = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(s, generator=random, dtype=F64)  # noqa: E731
    return [(draw(4, 6), draw(4, 3)) for _ in range(STEPS)]


class Net(nn.Module):
    """Three layers; what lies between the first two is `mid`'s, and behind it `after`'s."""

    def __init__(self, mid=None, after=None):
        super().__init__()
        self.a = nn.Linear(6, 5, dtype=F64)
        self.mid = nn.Identity() if mid is None else mid
        self.b = nn.Linear(5, 5, dtype=F64)
        self.after = nn.Identity() if after is None else after
        self.c = nn.Linear(5, 3, dtype=F64)

    def forward(self, x):
        return self.c(self.after(torch.tanh(self.b(self.mid(torch.tanh(self.a(x)))))))


def chain(mid=None, after=None):
    net = Net(mid, after)
    return nn.Sequential(net.a, nn.Tanh(), net.mid, net.b, nn.Tanh(), net.after, net.c)


def sgd(model, data):
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    for u, y in data:
        optimiser.zero_grad()
        mse(model(u), y).backward()
        optimiser.step()
    return model


def apart(make, slices=1):
    """How far level `backprop` ends from SGD. make: of the same model, whenever it is called."""
    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    oracle = make()
    partition = {} if isinstance(model, nn.Sequential) else {"blocks": 2}
    if slices > 1:
        partition["slices"] = {"*": slices}
    result = hamdist.train(
        model,
        from_iterable(items()),
        settings("backprop", learning={"lr": LR}),
        loss=mse,
        partition=partition,
    )
    expected = sgd(oracle, items())
    torch.manual_seed(3)
    plain = sgd(Net(), items())  # (what the model would be without what is tried)
    u, _ = items()[0]
    different = relative([plain(u)], [copy.deepcopy(expected)(u)]) > 1e-4
    assert different, "the case does not differ from a plain net"
    return relative(result.model.state_dict().values(), expected.state_dict().values()), result


# -- Python state ----------------------------------------------------------------------------------


class Relu(nn.Module):
    """Calls `tick` each time; relu up to a number of calls, then a scaled one."""

    def forward(self, x):
        return torch.relu(x) if self.tick() <= SWITCH else 0.3 * x


class InList(Relu):
    def __init__(self):
        super().__init__()
        self.t = [0]

    def tick(self):
        self.t[0] += 1
        return self.t[0]


class InDict(InList):
    def __init__(self):
        super().__init__()
        self.t = {0: 0}


class InArray(InList):
    def __init__(self):
        super().__init__()
        self.t = np.zeros(1)


class InNumber(Relu):
    def __init__(self):
        super().__init__()
        self.n = 0

    def tick(self):
        self.n = self.n + 1
        return self.n


class Counter:
    def __init__(self):
        self.n = 0

    def step(self):
        self.n += 1
        return self.n


class InObject(Relu):
    def __init__(self):
        super().__init__()
        self.counter = Counter()

    def tick(self):
        return self.counter.step()


class InNamespace(Relu):
    def __init__(self):
        super().__init__()
        self.s = SimpleNamespace(inner={"n": [0]})

    def tick(self):
        self.s.inner["n"].append(1)
        return len(self.s.inner["n"])


class ByThree(Relu):
    """Its state is what it was after every third call."""

    def __init__(self):
        super().__init__()
        self.turn = [0, 1, 2]

    def tick(self):
        self.turn.append(self.turn.pop(0))
        return 100 * self.turn[0]


class InIterator(Relu):
    def __init__(self):
        super().__init__()
        self.n = itertools.count(1)

    def tick(self):
        return next(self.n)


INSIDE = [InList, InDict, InArray, InNumber, InObject, InNamespace, ByThree, InIterator]


@pytest.mark.parametrize("build", [Net, chain])
@pytest.mark.parametrize("state", INSIDE)
def test_python_state_of_a_module(state, build):
    distance, result = apart(lambda: build(state()))
    assert distance <= ROUND_OFF
    assert len(result.blocks) > 1
    assert "Python state, which neither snapshots nor result.model hold" in str(result.warnings)


def test_python_state_that_two_modules_share_stays_in_one_block():
    class Reader(Relu):
        def __init__(self, t):
            super().__init__()
            self.t = t

        def tick(self):
            return self.t[0]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = InList()
            self.two = Reader(self.one.t)

        def forward(self, x):
            return self.two(self.one(x) - 0.1)

    distance, result = apart(lambda: Net(Both()))
    assert distance <= ROUND_OFF
    assert len(result.blocks) == 2

    class Apart(Net):
        def __init__(self):
            one = InList()
            super().__init__(one, Reader(one.t))

    with pytest.raises(GraphError, match="'t', which is Python state"):
        apart(Apart)


def test_a_parent_that_reads_the_state_of_its_child_stays_whole():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = InList()

        def forward(self, x):
            h = self.child(x)
            return h if self.child.t[0] < SWITCH else h * 0.5

    assert apart(lambda: Net(Parent()))[0] <= ROUND_OFF


GLOBAL = [0]
NUMBER = 0
RANDOM = random.Random(5)


def of_global(self):
    GLOBAL[0] += 1
    return GLOBAL[0]


def of_number(self):
    global NUMBER
    NUMBER += 1
    return NUMBER


def of_default(self, t=[0]):  # noqa: B006
    t[0] += 1
    return t[0]


def of_closure():
    t = [0]

    def tick(self):
        t[0] += 1
        return t[0]

    return tick


def of_cell():
    n = 0

    def tick(self):
        nonlocal n
        n += 1
        return n

    return tick


def of_class(self):
    type(self).n += 1
    return type(self).n


def of_random(self):
    return 20 * random.random()


def of_import(self):
    from random import uniform

    return uniform(0, 20)


def of_numpy(self):
    return 20 * np.random.rand()


def of_generator(self):
    return 20 * RANDOM.random()


def of_helper(self):
    return of_global(self)


OUTSIDE = [of_global, of_number, of_default, of_closure(), of_cell(), of_class]
OUTSIDE += [of_random, of_import, of_numpy, of_generator, of_helper]
NAMES = ["global", "number", "default", "closure", "cell", "class"]
NAMES += ["random", "import", "numpy", "generator", "helper"]


@pytest.mark.parametrize("build", [Net, chain])
@pytest.mark.parametrize("tick", OUTSIDE, ids=NAMES)
def test_python_state_outside_the_module_is_refused(tick, build):
    kind = type("Outer", (Relu,), {"tick": tick, "n": 0, "__module__": __name__})
    with pytest.raises(GraphError, match=r"changes .*(global|default|closure|Outer\.n|numbers)"):
        apart(lambda: build(kind()))


def test_a_constant_is_no_state():
    class Constant(nn.Module):
        TABLE = {"slope": 0.5}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.cfg = {"n": [2.0]}

        def forward(self, x):
            return x * self.TABLE["slope"] * self.cfg["n"][0] * WIDTHS[0]

    _, result = apart(lambda: Net(Constant()))
    assert not result.warnings


WIDTHS = [3]


# -- closed forms ----------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = 0.5

    def inner(self, x):
        return nn.functional.relu(self.f(x))

    def forward(self, x):
        return x + self.scale * self.g(self.inner(x))


class Listed(Plain):
    def __init__(self):
        super().__init__()
        self.scale = [0.5]

    def forward(self, x):
        return x + self.scale[0] * self.g(self.inner(x))


class Global(Plain):
    def forward(self, x):
        return x + WIDTHS[0] * self.g(self.inner(x))


class Timed(Plain):
    def forward(self, x):
        return x + (1.0 if time.time() > 0 else 2.0) * self.g(self.inner(x))


class Default(Plain):
    def forward(self, x, factors=[1.0]):  # noqa: B006
        return x + factors[0] * self.g(self.inner(x))


class ByBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        return self.g(self.inner(x)) if self.n > 3 else self.inner(self.g(x))


class Special(nn.Sequential):
    def __iter__(self):
        WIDTHS.append(3)
        return super().__iter__()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class WithFunction(Plain):
    def forward(self, x):
        return Straight.apply(self.g(self.inner(x)))


def hooked():
    made = Plain()
    made.f.register_full_backward_hook(lambda *_: None)
    return made


def overridden():
    made = Plain()
    made.forward = MethodType(lambda self, x: self.g(self.f(x)), made)
    return made


@pytest.mark.parametrize(
    "build",
    [Listed, Global, Timed, Default, ByBuffer, WithFunction, hooked, overridden,
     lambda: Special(nn.Linear(6, 6)), lambda: nn.Sequential(nn.Linear(6, 6), Listed())],
)  # fmt: skip
def test_what_is_not_proved_has_no_closed_form(build):
    assert make_closed(build(), Combine.ARGUMENTS, 0, 1) is None


@pytest.mark.parametrize("build", [Plain, lambda: nn.Sequential(nn.Linear(6, 6), Plain())])
def test_what_is_proved_has_a_closed_form(build):
    assert make_closed(build(), Combine.ARGUMENTS, 0, 1) is not None


# -- autograd.Functions ----------------------------------------------------------------------------


class View(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Same(View):
    @staticmethod
    def forward(ctx, x):
        return x


class Marked(View):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(1.5)


class Step(View):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)


class Setup(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 0.5 * g


class Calls(nn.Module):
    def __init__(self, function, before=False):
        super().__init__()
        self.apply_function = function.apply

    def forward(self, x):
        return self.apply_function(x * 1.1)


FUNCTIONS = [View, Same, Marked, Step, Setup, Straight]


@pytest.mark.parametrize("build", [Net, chain])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_alone_in_a_submodule(function, build):
    distance, result = apart(lambda: build(Calls(function)))
    assert distance <= ROUND_OFF
    assert len(result.blocks) > 1


def test_functions_in_two_submodules():
    distance, result = apart(lambda: Net(Calls(View), Calls(Same)))
    assert distance <= ROUND_OFF
    assert len(result.blocks) == 2


def test_a_function_in_the_forward_of_the_model_itself():
    class Own(Net):
        def forward(self, x):
            return self.c(View.apply(torch.tanh(self.a(x))))

    with pytest.raises(GraphError, match="uses an autograd.Function"):
        apart(Own)


# -- hooks -----------------------------------------------------------------------------------------


def halved(module, *more):
    value = more[-1]
    return value * 0.5 if torch.is_tensor(value) else tuple(v and v * 0.5 for v in value)


def with_hook(register, build=Net, **options):
    def make():
        model = build(nn.Sequential(nn.Tanh()))
        target = model if register.endswith("!") else model[3] if build is chain else model.b
        getattr(target, register.rstrip("!"))(HOOKS[register.rstrip("!")], **options)
        return model

    return make


def pre(module, args):
    return (args[0] * 0.5,)


def pre_with_kwargs(module, args, kwargs):
    return (args[0] * 0.5,), kwargs


def post(module, args, output):
    return output * 0.5


def scaled(module, grads, *_):
    return tuple(None if g is None else 0.5 * g for g in grads)


HOOKS = {
    "register_forward_pre_hook": pre,
    "register_forward_hook": post,
    "register_full_backward_hook": scaled,
    "register_full_backward_pre_hook": scaled,
    "register_backward_hook": scaled,
}


@pytest.mark.parametrize("build", [Net, chain])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_layer_are_honoured(register, build):
    distance, result = apart(with_hook(register, build))
    assert distance <= ROUND_OFF
    assert len(result.blocks) > 1


def test_hooks_with_options_are_honoured():
    def make():
        model = Net()
        model.b.register_forward_pre_hook(pre_with_kwargs, with_kwargs=True, prepend=True)
        model.b.register_forward_hook(post, always_call=True)
        return model

    assert apart(make)[0] <= ROUND_OFF


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_the_outermost_module(register):
    """One block, in which they are called."""
    name = f"{register}!"
    distance, result = apart(with_hook(name, chain))
    assert distance <= ROUND_OFF
    assert len(result.blocks) == 1
    with pytest.raises(GraphError, match=r"stays whole, because it has a .*hook"):
        apart(with_hook(name, Net))


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_users_submodule_keep_it_whole(register):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(5, 5, dtype=F64)

        def forward(self, x):
            return self.f(x).sin()

    def make():
        model = Net(Inner())
        getattr(model.mid, register)(HOOKS[register])
        return model

    distance, result = apart(make)
    assert distance <= ROUND_OFF
    assert len(result.blocks) == 2


def test_a_hook_on_an_activation_keeps_its_module_whole():
    class Hooked(nn.Module):
        def forward(self, x):
            y = x * 1.5
            y.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
            return y

    for build in (Net, chain):
        assert apart(lambda build=build: build(Hooked()))[0] <= ROUND_OFF

    class Node(Hooked):
        def forward(self, x):
            y = x * 1.5
            y.grad_fn.register_prehook(lambda g: (g[0] * 0.5,))
            return y

    assert apart(lambda: Net(Node()))[0] <= ROUND_OFF


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("build", [Net, chain])
def test_a_hook_on_a_weight_is_refused(register, build):
    model = build()
    weight = next(iter(model.parameters()))
    getattr(weight, register)(lambda g: None)
    with pytest.raises(GraphError, match="weight' has a gradient hook"):
        hamdist.train(model, from_iterable(items()), level="backprop", loss=mse)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_global_hook_is_refused(kind):
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    hook = register(lambda *_: None)
    try:
        with pytest.raises(GraphError, match="global module"):
            hamdist.train(chain(), from_iterable(items()), level="backprop", loss=mse)
    finally:
        hook.remove()


def test_a_hook_that_holds_the_model_itself_is_refused():
    def make():
        model = Net()
        model.b.register_forward_hook(lambda _, args, out: out + model.c.bias.sum())
        return model

    with pytest.raises(GraphError, match="'model', a closure variable"):
        apart(make)


def test_a_hook_that_is_a_method_goes_to_the_copy():
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.b.register_forward_hook(self.add)

        def add(self, module, args, out):
            return out + self.c.bias.sum()

    with pytest.raises(GraphError, match=r"a Linear holds '.*' of block"):
        apart(Own)
    assert apart(lambda: nn.Sequential(Own()))[0] <= ROUND_OFF


@pytest.mark.parametrize(
    "build",
    [
        lambda: chain(Calls(Straight)),
        lambda: chain(InList()),
        lambda: Net(Calls(Straight)),
        with_hook("register_full_backward_hook", chain),
        with_hook("register_full_backward_hook", Net),
        with_hook("register_forward_hook!", lambda mid: nn.Sequential(chain(mid))),
    ],
)
def test_slices_honour_it_or_refuse(build):
    try:
        distance, _ = apart(build, slices=2)
    except GraphError as error:
        assert re.search("autograd.Function|Python state|hook", str(error))  # noqa: PT017
    else:
        assert distance <= ROUND_OFF


# -- parametrizations ------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


@pytest.mark.parametrize("build", [Net, chain])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Symmetric()),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
    ],
    ids=["own", "weight norm", "orthogonal"],
)
def test_parametrizations_are_honoured(change, build):
    def make():
        model = build()
        change(model[3] if build is chain else model.b)
        return model

    model = copy.deepcopy(make())
    assert [n for n, _ in model.named_parameters() if "parametrizations" in n]
    distance, _ = apart(make)
    assert distance <= ROUND_OFF


# -- weights and types that a forward changes -------------------------------------------------


def clamped(net):
    with torch.no_grad():
        net.b.weight.clamp_(-0.3, 0.3)


def clamped_data(net):
    net.b.weight.data.clamp_(-0.3, 0.3)


def written(net):
    net.b.weight.data[0] = 0.1


def assigned_data(net):
    net.b.weight.data = net.b.weight.data.clamp(-0.3, 0.3)


def assigned(net):
    net.b.weight = nn.Parameter(net.b.weight.detach().clamp(-0.3, 0.3))


class Renewing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.b = nn.Linear(5, 5, dtype=F64)
        self.change = change

    def forward(self, x):
        self.change(self)
        return self.b(x)


def renewing(change):
    return lambda: Net(Renewing(change))


@pytest.mark.parametrize("change", [clamped, clamped_data, written])
def test_a_weight_that_a_forward_writes_to_keeps_its_module_whole(change):
    gap, result = apart(renewing(change))
    assert gap < ROUND_OFF
    assert len(result.blocks) == 2


@pytest.mark.parametrize("change", [assigned_data, assigned])
def test_a_weight_that_a_forward_replaces_is_refused(change):
    with pytest.raises(GraphError, match=r"another tensor in place of its weight '.*b.weight'"):
        apart(renewing(change))


class Casting(nn.Module):
    """Computes in bfloat16 inside."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).float()


def test_autocast_inside_a_forward_is_honoured():
    torch.manual_seed(3)
    casting = Net(Casting()).float()
    plain = copy.deepcopy(casting)
    plain.mid = plain.mid.linear
    data = [(u.float(), y.float()) for u, y in items()]
    model = hamdist.train(
        copy.deepcopy(casting),
        from_iterable(data),
        level="backprop",
        engine={"kind": "inprocess"},
        learning={"lr": LR},
        loss=mse,
    ).model
    expected = [*sgd(casting, data).parameters()]
    assert relative([*model.parameters()], expected) < 1e-6
    assert relative([*sgd(plain, data).parameters()], expected) > 1e-5
