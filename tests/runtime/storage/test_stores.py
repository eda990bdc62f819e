"""Documented contract: stores that fail or are full end no run, and keep what is not hamdist's."""

from __future__ import annotations

import contextlib
import os
import subprocess

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import PortableStream, chain

from hamdist.config import Settings
from hamdist.errors import SnapshotError
from hamdist.runtime.ray_engine.supervision import SnapshotSupervision
from hamdist.runtime.storage.snapshot_files import latest, make_room
from hamdist.runtime.storage.store import storage
from hamdist.runtime.train.train import train

pytestmark = pytest.mark.timeout(120)
ITEMS = 60


class StoreError(Exception):
    """As botocore's: no OSError."""


class Failing(MemoryFileSystem):
    """Fails at the calls that `fails` names; its files are its own."""

    protocol = "failing"
    store = {}  # noqa: RUF012 (as in the parent)
    pseudo_dirs = [""]  # noqa: RUF012
    fails: set[str] = set()  # noqa: RUF012

    def pipe_file(self, path, value, **kwargs):
        if "write" in self.fails and not path.endswith("empty"):
            raise StoreError("no route")
        super().pipe_file(path, value, **kwargs)

    def cat_file(self, path, **kwargs):
        if "read" in self.fails:
            raise StoreError("no route")
        return super().cat_file(path, **kwargs)

    def ls(self, path, **kwargs):
        if "list" in self.fails:
            raise StoreError("no route")
        return super().ls(path, **kwargs)


fsspec.register_implementation("failing", Failing, clobber=True)


@pytest.fixture
def failing():
    Failing.store.clear()
    Failing.fails = set()
    return Failing


def settings(path, engine=None, **snapshots):
    kept = {"path": str(path), "every": 8, **snapshots}
    chosen = {"level": "trace", "steps": ITEMS, "engine": engine or {}, "snapshots": kept}
    return Settings.model_validate(chosen)


def alone():
    return train(
        chain(), PortableStream(ITEMS), Settings.model_validate({"level": "trace", "steps": ITEMS})
    )


def test_a_store_that_fails_ends_no_run(failing):
    def fail(progress):
        if progress.phase is None:
            failing.fails = {"write"}

    with pytest.warns(UserWarning, match=r"a snapshot was not written: failing://.*no route"):
        result = train(chain(), PortableStream(ITEMS), settings("failing://a/b"), on_progress=fail)
    assert_equal(alone(), result)
    (text,) = [text for text in result.warnings if "not written" in text]
    assert "were not, the last of them" in text
    assert not [name for name in failing.store if "tick-" in name]


@pytest.mark.parametrize("what", ["read", "list"])
def test_a_store_that_cannot_be_asked_is_named_before_the_start(failing, what):
    storage("failing://a/b").write("tick-000000000008/manifest.json", b"{}")
    failing.fails = {what}
    with pytest.raises(SnapshotError, match=r"failing://a/b.*: no route"):
        latest("failing://a/b", lambda _: None)
    if what == "list":
        with pytest.raises(SnapshotError, match="no route"):
            train(chain(), PortableStream(ITEMS), settings("failing://a/b"))


@pytest.mark.parametrize("url", [False, True])
def test_only_what_hamdist_wrote_is_removed(tmp_path, url, failing):
    where = "failing://x/y" if url else str(tmp_path)
    store = storage(where)
    mine = ["manifest.json", "block-0.1.1.safetensors", "stream.1.1.safetensors"]
    for name in (*mine, "notes.txt"):
        store.write(f"tick-000000000008/{name}", b"x")
    store.write("tick-8/manifest.json", b"x")
    store.write("results/manifest.json", b"x")
    for folder in ("tick-000000000008", "tick-8", "results"):
        store.remove(folder)
    assert store.read("tick-000000000008/notes.txt") == b"x"
    for name in mine:
        with pytest.raises(SnapshotError, match="cannot be read"):
            store.read(f"tick-000000000008/{name}")
    assert store.read("tick-8/manifest.json") == store.read("results/manifest.json") == b"x"


def test_links_are_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "manifest.json").write_bytes(b"x")
    place = tmp_path / "snapshots"
    place.mkdir()
    (place / "tick-000000000008").symlink_to(target)
    store = storage(place)
    store.remove("tick-000000000008")
    assert store.folders() == []
    assert (target / "manifest.json").read_bytes() == b"x"


def test_room_is_made_without_the_latest_undamaged_one(tmp_path):
    train(chain(), PortableStream(ITEMS), settings(tmp_path, every=8, keep=3))
    _, second, third = sorted(p.name for p in tmp_path.iterdir())
    part = next((tmp_path / third).glob("block-0.*"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    left = []
    while make_room(storage(tmp_path)):
        left.append(sorted(p.name for p in tmp_path.iterdir()))
    assert left == [[second, third], [second]]
    (tmp_path / second / "manifest.json").unlink()
    assert not make_room(storage(tmp_path))


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk of its own is made by root alone")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=False, timeout=20
    )
    if made.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True, timeout=20)


def test_a_disk_without_room_for_one_snapshot_is_refused_before_the_start(tmp_path):
    with (
        small_disk(tmp_path / "disk", "4k") as disk,
        pytest.raises(SnapshotError, match=r"No space left.*a snapshot takes .* MiB and more"),
    ):
        train(chain(), PortableStream(ITEMS), settings(disk))


@pytest.mark.filterwarnings("ignore:a snapshot was not written")
def test_a_snapshot_that_was_not_written_leaves_nothing(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:

        class Filling(PortableStream):
            def samples(self):
                for n, sample in enumerate(super().samples()):
                    if n == 1:
                        (disk / "filler").write_bytes(bytes(disk_free(disk)))
                    yield sample

        result = train(chain(), Filling(ITEMS), settings(disk, every=8))
        assert any("No space left" in text for text in result.warnings)
        assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.ray
@pytest.mark.usefixtures("session")
@pytest.mark.filterwarnings("ignore:a snapshot was not written")
@pytest.mark.parametrize("engine", [{"kind": "inprocess"}, {"kind": "ray", "actors": 2}])
def test_on_a_full_disk_the_oldest_makes_room(tmp_path, engine):
    """The disk has room for about two snapshots; hamdist was asked to keep a thousand."""
    result = None
    with small_disk(tmp_path / "probe", "10m") as disk:
        one = train(chain(), PortableStream(ITEMS), settings(disk, engine, every=50))
        size = sum(-(-f.stat().st_size // 4096) * 4096 for f in disk.rglob("*") if f.is_file())
        size //= max(1, len(one.snapshots))
    with small_disk(tmp_path / "disk", f"{(5 * size // 2) >> 10}k") as disk:
        result = train(chain(), PortableStream(ITEMS), settings(disk, engine, every=8, keep=1000))
        assert 1 <= len(result.snapshots) <= 4  # (eight were taken)
        assert latest(disk, lambda _: None).tick >= 8
        assert all(p.name.startswith("tick-") for p in disk.iterdir())
    assert_equal(alone(), result)
    if engine["kind"] == "inprocess":  # (two processes may have two of them under way)
        assert not [text for text in result.warnings if "not written" in text]


@pytest.mark.ray
@pytest.mark.usefixtures("session")
@pytest.mark.filterwarnings("ignore:a snapshot was not written", "ignore:actor . would keep")
@pytest.mark.slow
def test_under_a_full_disk_the_memory_of_actors_is_bounded(tmp_path, monkeypatch):
    """Kept signals take at most what they may and a fifth, though no snapshot is complete."""
    kept = []
    look = SnapshotSupervision._look_for_dropped_signals

    def watched(snapshot_policy):
        kept.extend(actor.kept_bytes for actor in snapshot_policy._worker_group.actors)
        look(snapshot_policy)

    monkeypatch.setattr(SnapshotSupervision, "_look_for_dropped_signals", watched)
    with small_disk(tmp_path / "disk", "300k") as disk:
        chosen = Settings.model_validate(
            {
                "level": "trace",
                "steps": 4000,
                "engine": {"kind": "ray", "actors": 2},
                "snapshots": {"path": str(disk), "seconds": 0.5, "memory": 1},
            }
        )

        def fill(progress):
            if progress.phase == "blocks":
                (disk / "filler").write_bytes(bytes(disk_free(disk)))

        result = train(chain(), PortableStream(4000), chosen, on_progress=fill)
    assert result.samples == 4000
    assert any("No space left" in text for text in result.warnings)
    assert any("would keep more than snapshots.memory (1 MiB)" in text for text in result.warnings)
    assert 2**19 < max(kept) <= 1.2 * 2**20


def disk_free(path):
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
