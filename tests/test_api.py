"""`hamdist.train` as users call it: in a script, in a notebook, with what is wrong."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hamdist
from hamdist.config import Settings
from hamdist.errors import BlockError, SettingsError
from hamdist.runtime.snapshots.resume import weights_of
from hamdist.runtime.storage.snapshot_files import latest, snapshot_folders
from hamdist.runtime.storage.store import storage
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import snapshot_model
from hamdist.streams import from_iterable

ROWS, ITEMS = 4, 12
MET = {  # what public functions return, and what an extender writes (docs: develop/adding)
    "hamdist.runtime.live.run": ["LiveRun"],
    "hamdist.runtime.live.callbacks": ["Answer", "LiveStatus"],
    "hamdist.display.figure": ["SvgPicture"],
    "hamdist.display.network": ["NetworkPicture"],
    "hamdist.study.interface.compare": ["Comparison"],
    "hamdist.study.interface.verify": ["Verification"],
    "hamdist.study.interface.study": ["StudyResult"],
    "hamdist.runtime.transport.endpoint": ["Sender", "Receiver"],
    "hamdist.runtime.signals.codes": ["Code"],
    "hamdist.runtime.storage.store": ["Storage"],
}


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def items():
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(ROWS, 3, generator=draw), torch.randint(2, (ROWS,), generator=draw))
        for _ in range(ITEMS)
    ]


def loader():
    u, y = (torch.cat(part) for part in zip(*items(), strict=True))
    return DataLoader(TensorDataset(u, y), batch_size=ROWS)


def learned(stream=None, net=None, **fields):
    given = {"level": "backprop", "classes": 2, **fields}
    return hamdist.train(net or model(), items() if stream is None else stream, **given)


def no_mean(prediction, target):
    return nn.functional.cross_entropy(prediction, target, reduction="none")


def documented():
    """All public functions, classes and methods, by name, with their own documentation; a method
    that takes the place of a base's has that one's."""
    for module in (hamdist, hamdist.streams, *map(importlib.import_module, MET)):
        for name in MET.get(module.__name__) or module.__all__:
            found = getattr(module, name)
            yield f"{module.__name__}.{name}", found, inspect.getdoc(found) or ""
            for key, member in vars(found).items() if inspect.isclass(found) else ():
                method = member.fget if isinstance(member, property) else member
                method = getattr(method, "__func__", method)
                own = str(getattr(method, "__module__", "")).startswith("hamdist")
                if not key.startswith("_") and callable(method) and own:
                    docs = [inspect.getdoc(vars(base).get(key)) or "" for base in found.__mro__]
                    yield f"{module.__name__}.{name}.{key}", method, "\n".join(docs)


def test_public_names_say_what_they_take():
    names = 0
    for name, found, text in documented():
        names += 1
        assert text.strip(), f"{name} has no docstring"
        if not inspect.isclass(found) and callable(found) and not inspect.ismodule(found):
            takes = [p for p in inspect.signature(found).parameters if p not in ("self", "cls")]
            assert not takes or "Args:" in text, f"{name} takes {takes}, its docstring has no Args"
            source = inspect.getsource(found)
            gives = inspect.signature(found).return_annotation not in ("None", None, inspect._empty)
            said = r"^(Return|Yield|Keep)|Returns:|Yields:|(;|, and) return "
            said = re.search(said, text, re.MULTILINE)
            assert not gives or said, f"{name}: its docstring does not say what it returns"
            for error in re.findall(r"raise (\w+Error)\(", source) if "Raises:" in text else ():
                raises = text.partition("Raises:")[2]
                assert {error, "HamdistError"} & {*re.findall(r"\w+", raises)}, f"{name}: {error}"
            assert "Raises:" in text or not re.search(r"raise (?!Not)\w+Error\(", source), name
    assert names > 190


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"net": nn.Linear}, "model is the class Linear; give an nn.Module, made"),
        ({"net": "resnet"}, "model is str; give an nn.Module"),
        ({"settings": {"level": "trace"}}, r"settings is a dict; give hamdist.Settings\(...\), or"),
        ({"classes": "2"}, "classes is '2'; give a whole number"),
        ({"classes": 2.5}, "classes is 2.5; give a whole number"),
        ({"classes": {"a": True}}, r"classes\['a'\] is True; give a whole number"),
        ({"loss": 3}, r"loss is 3; give a function \(prediction, target\) -> scalar, or one of"),
        ({"loss": {"out": 3}}, "loss is 3; give a function"),
        (
            {"loss": nn.CrossEntropyLoss},
            r"loss is the class .*give one of it, CrossEntropyLoss\(\)",
        ),
        ({"on_progress": 3}, "on_progress is 3; give a function"),
    ],
)
def test_what_is_of_another_kind(given, told):
    """Each was a traceback from somewhere inside."""
    with pytest.raises(SettingsError, match=told):
        learned(**given)


@pytest.mark.parametrize(
    ("loss", "told"), [(no_mean, r"the loss is shape \(4,\); return"), (lambda p, y: 1.0, "is 1.0")]
)
def test_a_loss_that_is_no_number(loss, told):
    """One number for each row went unnoticed until the metrics were added up."""
    with pytest.raises(BlockError, match=told):
        learned(loss=loss)


def test_a_loss_in_a_list_of_one():
    """(1,) is one number, too."""
    plain = learned(loss=nn.functional.cross_entropy)
    listed = learned(loss=lambda p, y: nn.functional.cross_entropy(p, y)[None])
    assert torch.equal(plain.model[0].weight, listed.model[0].weight)
    assert plain.windows == listed.windows


def test_shown_in_a_notebook():
    """Without the numbers of all tensors: they took screens."""
    result = learned()
    (window,) = next(iter(result.windows.values()))
    assert f"{100 * window.correct / window.rows:.1f} % right over samples 0 to 11" in repr(result)
    assert len(repr(result)) < 200
    assert "0.weight (5, 3), 0.bias (5,); 12 updates" in repr(result.blocks["block0"])


def test_a_stream_that_is_shorter_than_the_run():
    with pytest.warns(UserWarning, match="the stream ended after 12 of 30 samples"):
        (told,) = learned(loader(), steps=30).warnings
    assert "the stream ended after 12 of 30 samples" in told
    assert not learned(loader(), steps=12).warnings
    assert not learned(item for _ in range(3) for item in loader()).warnings


@pytest.mark.parametrize("made", [loader, lambda: iter(items())])
def test_going_on_with_a_stream_that_cannot_be_drawn_again(made, tmp_path):
    """It went on with the first samples once more, and said nothing."""
    kept = {"path": str(tmp_path), "every": 10}
    whole = learned(made(), snapshots=kept)
    with pytest.warns(UserWarning, match="does not give the same samples again"):
        learned(made(), resume=tmp_path)
    on = learned(from_iterable(loader(), classes=2), resume=tmp_path)  # as the warning says
    assert torch.equal(on.model[0].weight, whole.model[0].weight)
    assert not on.warnings


def test_the_weights_of_a_snapshot_are_averaged_as_those_of_the_result(tmp_path):
    """Oracle: a_k = a_{k-1} + (1 - r)/(1 - r^k) (theta_k - a_{k-1}), over a snapshot an update."""
    r = 0.8
    fields = {"learning": {"lr": 0.5, "average": r}, "level": "backprop"}
    kept = {"path": str(tmp_path), "every": 3, "keep": 99}  # c = 2 D + 1 = 3 ticks a sample
    learned(snapshots=kept, **fields)
    spec = from_iterable(items(), classes=2).spec
    average, k = torch.zeros(5, 3), 0
    for folder in sorted(snapshot_folders(storage(tmp_path))):
        snapshot = latest(tmp_path / folder, pytest.fail)
        settings = Settings.model_validate(snapshot.manifest.settings)
        graph = as_graph(model(), settings, spec, nn.functional.cross_entropy)
        theta = weights_of(snapshot, graph)[0].weight.detach()
        k += 1
        average += (1 - r) / (1 - r**k) * (theta - average)
        exported = snapshot_model(snapshot, model(), spec, settings)[0].weight
        torch.testing.assert_close(exported.detach(), average)
        assert k == 1 or not torch.equal(exported, theta)
    assert k > 5


def test_python_draws_the_same_numbers_behind_the_first_use():
    """Of the user's generator, though packages that are imported draw from it."""
    code = (
        "import random, hamdist; random.seed(3); first = random.random(); random.seed(3)\n"
        "hamdist.train, hamdist.compare; assert random.random() == first"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_runs_in_threads_at_once_draw_what_each_draws_alone():
    """Torch has one generator for all of them. Oracle: one after the other."""
    draw = torch.Generator().manual_seed(2)
    network = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))
    rows = [(torch.randn(ROWS, 3, generator=draw), torch.zeros(ROWS).long()) for _ in range(100)]

    def weights(seed):
        result = hamdist.train(network, rows, classes=2, level="trace", seed=seed)
        return result.model.state_dict()["0.weight"].tolist()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(weights, range(4))) == [weights(seed) for seed in range(4)]
