"""Bits of processes that compute in other ways. Oracles: the in-process run; torch's own getters;
processes that the variables of the environment have made another kind of host."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import warnings
import zlib
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, settings
from runtime.networks import PortableStream, chain, seeded
from runtime.ray_engine.test_recovery import Once
from torch import nn

from hamdist.dynamics.native import rows
from hamdist.errors import ChoiceWarning, ClusterError, SettingsError, SnapshotError
from hamdist.runtime.process import arithmetic as of_process
from hamdist.runtime.process.arithmetic import Arithmetic, arithmetic
from hamdist.runtime.process.switches import read_switches, set_switches
from hamdist.runtime.ray_engine import placed_workers
from hamdist.runtime.ray_engine import replacement as recovery
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

pytestmark = pytest.mark.timeout(110)

ROOT = Path(__file__).parents[3]
ITEMS = 20
ALONE = {"kind": "inprocess"}
RAY = {"kind": "ray", "actors": 2}
OTHER_KIND = (("ATEN_CPU_CAPABILITY", "default"),)
X86 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="two kinds of hosts are made of an x86 processor with AVX2",
)

# -- torch's switches ------------------------------------------------------------------------------

backends = torch.backends
SWITCHES = {
    "default_dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "matmul precision": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "deterministic": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "fill": (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
    ),
    "mkldnn": (
        lambda: backends.mkldnn.enabled,
        lambda: setattr(backends.mkldnn, "enabled", False),
    ),
    "sdp": (backends.cuda.flash_sdp_enabled, lambda: backends.cuda.enable_flash_sdp(False)),
    "denormals": (
        lambda: (torch.full((8,), 1e-40) * torch.ones(8)).sum().item(),
        lambda: torch.set_flush_denormal(True),
    ),
}


class Switched(nn.Module):
    """What it adds tells all switches, each by a digit, as torch's getters and its numbers have
    them in the process and thread that computes."""

    def forward(self, x):
        if x.device.type == "meta":
            return x
        values = [repr(get()) for get, _ in SWITCHES.values()]
        digits = [zlib.crc32(value.encode()) % 97 / 97 for value in values]
        return x + sum(torch.tensor(d).to(x.dtype) / 2**i for i, d in enumerate(digits))


@pytest.fixture
def restored():
    before = read_switches()
    yield
    assert not set_switches(before)


@pytest.fixture
def driver(monkeypatch):
    """`Once` does nothing in this process."""
    monkeypatch.setenv("HAMDIST_TEST_DRIVER", str(os.getpid()))


def run(engine, at=None, mark="", *, resumed=None, **fields):
    """The switches are read in the first block and in the last; between them a process dies in
    forward pass number `at`."""
    dies = Once(at, mark, "kill")
    model = seeded(lambda: nn.Sequential(Switched(), *chain(), dies, Switched()))
    chosen = settings(engine, ITEMS, **{"level": "trace", **fields})
    return train(model, PortableStream(ITEMS), chosen, resume=resumed)


@pytest.mark.ray
def test_actors_have_the_drivers_switches(session, restored, driver, tmp_path):
    """Also those that had others in the run before, and one that replaces another."""
    default, values = run(ALONE), read_switches()
    for name, (get, change) in SWITCHES.items():
        before = get()
        change()
        assert get() != before, name
        with pytest.raises(AssertionError):
            assert_equal(default, run(ALONE))
        set_switches(values)
    for _, change in SWITCHES.values():
        change()
    alone = run(ALONE)
    assert_equal(alone, run(RAY))
    kept = {"path": str(tmp_path / "kept"), "every": 5}
    again = run(RAY, 12, tmp_path / "mark", snapshots=kept)
    assert len(again.replaced) == 1
    assert_equal(alone, again)
    set_switches(values)
    assert_equal(default, run(RAY))


def test_a_switch_that_this_torch_does_not_have(restored):
    refused = set_switches({"backends.none.such": True, "backends.quantized.engine": "abacus"})
    assert [re.search(r"switch (\S+) cannot be", text).group(1) for text in refused] == [
        "backends.none.such",
        "backends.quantized.engine",
    ]


def test_the_precision_of_single_backends_goes_before_that_of_all(restored):
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has no precision of single backends")
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    switches = read_switches()
    torch.set_float32_matmul_precision("medium")
    assert not set_switches(switches)
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_train_inside_autocast_is_refused():
    with torch.autocast("cpu"), pytest.raises(SettingsError, match=r"engine\.blocks"):
        run(ALONE)


# -- snapshots -------------------------------------------------------------------------------------


def said(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    texts = [str(w.message) for w in caught if not issubclass(w.category, ChoiceWarning)]
    assert set(texts) <= set(result.warnings)
    return [text for text in texts if "last bits" in text]


def test_going_on_elsewhere_or_with_other_switches(restored, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    run(ALONE, snapshots={"path": str(kept), "every": 5})
    manifest = latest(kept, print).manifest
    assert manifest.switches == read_switches()
    assert manifest.arithmetic == [arithmetic(1, native=True)]
    assert said(lambda: run(ALONE, resumed=kept)) == []

    torch.set_float32_matmul_precision("high")
    with pytest.raises(SnapshotError, match=r"'exact'.*precision highest then, high now"):
        run({**ALONE, "bits": "exact"}, resumed=kept)
    (text,) = said(lambda: run(ALONE, resumed=kept))
    assert "float32_matmul_precision highest then, high now" in text
    set_switches(manifest.switches)

    other = manifest.arithmetic[0].model_copy(update={"machine": "aarch64", "processor": "N1"})
    moved = manifest.model_copy(update={"arithmetic": [other]})
    snapshot = latest(kept, print)
    monkeypatch.setattr(
        "hamdist.runtime.train.train.latest",
        lambda *_: type(snapshot)(str(kept), snapshot.folder, moved),
    )
    with pytest.raises(SnapshotError, match=r"'exact'.*on N1.*machine \S+ against aarch64"):
        run({**ALONE, "bits": "exact"}, resumed=kept)
    (text,) = said(lambda: run(ALONE, resumed=kept))
    assert "machine" in text


# -- hosts of two kinds ----------------------------------------------------------------------------


BY_TORCH = {"step": "closed"}  # (the C code has the same bits on both)


def of_another_kind(monkeypatch, *numbers):
    """The first actors that are started with these numbers live on another kind of host."""
    options_of_groups = placed_workers.options_of_groups  # type: ignore[attr-defined]

    def some_elsewhere(*given):
        found = options_of_groups(*given)
        for i in numbers:
            found[i] = found[i].pinned(dict(OTHER_KIND))
        return found

    monkeypatch.setattr(placed_workers, "options_of_groups", some_elsewhere)


@X86
@pytest.mark.ray
def test_actors_of_two_kinds(session, monkeypatch):
    """The warning comes before the first tick; with 'exact' there is none."""
    of_another_kind(monkeypatch, 1)
    came, phases = [], []

    def show(message, *_, **__):
        came.append((str(message), list(phases)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        model, chosen = chain(), settings({**RAY, **BY_TORCH}, ITEMS, level="trace")
        result = train(
            model, PortableStream(ITEMS), chosen, on_progress=lambda p: phases.append(p.phase)
        )
    ((text, before),) = [(text, seen) for text, seen in came if "last bits" in text]
    assert re.match(r"actor 1 \(\S+\) would compute on .*capability DEFAULT against AVX", text)
    assert before
    assert None not in before  # (phases of the start alone)
    assert text in result.warnings
    alone = settings({**ALONE, **BY_TORCH}, ITEMS, level="trace")
    with pytest.raises(AssertionError):  # the two kinds are two indeed
        assert_equal(train(chain(), PortableStream(ITEMS), alone), result)

    ticks = []
    with pytest.raises(ClusterError, match=r"'exact': actor 1 .*use hosts of one kind"):
        train(
            chain(),
            PortableStream(ITEMS),
            settings({**RAY, "bits": "exact"}, ITEMS, level="trace"),
            on_progress=lambda p: ticks.extend([] if p.phase else [p]),
        )
    assert not ticks
    monkeypatch.undo()
    alone = train(chain(), PortableStream(ITEMS), settings(ALONE, ITEMS, level="trace"))
    exact = settings({**RAY, "bits": "exact"}, ITEMS, level="trace")
    assert_equal(alone, train(chain(), PortableStream(ITEMS), exact))


@pytest.mark.slow
@X86
@pytest.mark.ray
def test_a_replacement_on_another_kind_of_host(session, driver, monkeypatch, tmp_path):
    replacement_options = recovery.replacement_options  # type: ignore[attr-defined]
    monkeypatch.setattr(
        recovery,
        "replacement_options",
        lambda *given: replacement_options(*given).pinned(dict(OTHER_KIND)),
    )
    kept = {"path": str(tmp_path / "a"), "every": 5}
    result = run(RAY, 12, tmp_path / "mark a", snapshots=kept)
    assert len(result.replaced) == 1
    assert any("would compute on" in text for text in result.warnings)
    assert not any("no number has changed" in text for text in result.warnings)
    kinds = [a.capability for a in latest(tmp_path / "a", print).manifest.arithmetic]
    assert sorted(kinds)[-1] == "DEFAULT"
    assert len(kinds) == 2
    kept = {"path": str(tmp_path / "b"), "every": 5}
    with pytest.raises(ClusterError, match="engine.bits 'exact'"):
        run({**RAY, "bits": "exact"}, 12, tmp_path / "mark b", snapshots=kept)


REFUSED = "'portable'.*ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMP"


@X86
def test_portable_bits_are_refused_where_torch_was_imported_without_them():
    """In one process, which has no actor to compare itself with."""
    with pytest.raises(SettingsError, match=REFUSED):
        run({**ALONE, "bits": "portable"})


@pytest.mark.slow  # (comparing actors with the driver is the same for 'exact': above)
@X86
@pytest.mark.ray
def test_portable_bits_are_refused_by_actors_that_compute_other_ones(session):
    with pytest.raises(ClusterError, match=REFUSED):
        run({**RAY, "bits": "portable"})


@pytest.mark.slow
@X86
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_portable_bits_of_two_kinds_of_hosts():
    """Two processes in environments of their own (two_kinds.py); the first also starts actors, of
    two kinds of hosts."""
    weights = set()
    for environment, ray in (
        ({}, "ray"),
        ({**dict(OTHER_KIND), "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "SSE41"}, ""),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "runtime.process.two_kinds", *filter(None, [ray])],
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert not done.returncode, done.stderr
        weights.add(done.stdout)
    assert len(weights) == 1, weights


def convolutions(engine):
    """Convolutions, norms, softmax and dropout on random images, with weights drawn here."""

    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(8 * 36, 40),
            nn.Dropout(0.2),
            nn.Tanh(),
            nn.LayerNorm(40),
            nn.Linear(40, 10),
        )

    model = seeded(build)
    generator = torch.Generator().manual_seed(1)
    items = [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(ITEMS)
    ]
    return train(model, from_iterable(items, classes=10), settings(engine, ITEMS, level="trace"))


# -- the fingerprint -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"processor": "another", "blas": "another"}, []),
        ({"machine": "aarch64"}, ["machine x86_64 against aarch64"]),
        ({"capability": "AVX2", "threads": 2}, ["capability AVX512 against AVX2", "threads 1 ag"]),
        ({"digests": {"a": "1", "c": "3"}}, ["other bits of b, c"]),
    ],
)
def test_what_makes_two_fingerprints_unlike(changes, words):
    one = Arithmetic(
        machine="x86_64",
        processor="X",
        capability="AVX512",
        blas="mkl",
        torch="2",
        threads=1,
        digests={"a": "1", "b": "2"},
    )
    unlike = one.unlike(one.model_copy(update=changes))
    assert len(unlike) == len(words)
    assert all(word in text for word, text in zip(words, unlike, strict=True))


def test_the_clones_of_the_c_code_agree(tmp_path, monkeypatch):
    """rows.c built for two kinds of processors, with the flags of the installation."""
    compiler, script = sysconfig.get_config_var("CC"), ROOT / "scripts/build_native.py"
    flags = ast.literal_eval(
        re.search(r"extra_compile_args=(\[.*?\])", script.read_text()).group(1)
    )
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kinds = {"x86-64", "x86-64-v4" if "avx512vl" in cpu else "x86-64-v3"}
    if (
        "avx2" not in cpu
        or subprocess.run([*compiler.split(), "--version"], check=False).returncode
    ):
        pytest.skip("needs a C compiler and an x86 processor with AVX2")
    source = ROOT / "hamdist/dynamics/native"
    text = re.sub(r"#define CLONES __att.*", "#define CLONES", (source / "rows.c").read_text())
    (tmp_path / "rows.c").write_text(text)
    include = sysconfig.get_paths()["include"]
    digests, without = set(), arithmetic(1, native=False).digests
    for kind in kinds:
        folder = tmp_path / kind
        folder.mkdir()
        command = [*compiler.split(), "-shared", "-fPIC", *flags, f"-march={kind}", f"-I{include}"]
        command += [f"-I{source}", str(tmp_path / "rows.c"), "-o", str(folder / "_rows.abi3.so")]
        subprocess.run(command, check=True, timeout=60)
        loader = ExtensionFileLoader("_rows", str(folder / "_rows.abi3.so"))
        clone = module_from_spec(spec_from_loader("_rows", loader))
        loader.exec_module(clone)
        monkeypatch.setattr(rows, "_rows", clone)
        of_process._computed.cache_clear()
        digests.add(frozenset(arithmetic(1, native=True).digests.items() - without.items()))
    of_process._computed.cache_clear()
    assert len(digests) == 1
    assert all(digests)
