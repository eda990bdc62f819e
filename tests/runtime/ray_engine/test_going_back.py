"""Oracle: the in-process run. The latest snapshot is damaged or gone when an actor is lost: all go
back to the one before it, or to the beginning, and the run ends with the same bits."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from runtime.engines.test_engines_equal import settings
from runtime.networks import batches
from runtime.ray_engine.test_recovery import ITEMS, Once, both, cut, in_an_actor, net

from hamdist.errors import SnapshotError
from hamdist.runtime.ray_engine.replacement import Replacement
from hamdist.runtime.snapshots.catalogue import SnapshotCatalogue
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

pytestmark = [pytest.mark.ray, pytest.mark.timeout(110)]


class KilledBehindTwo(Once):
    """Kills its process in forward pass 31, when two snapshots are complete."""

    def __init__(self, tmp_path):
        super().__init__(31, tmp_path / "mark", "kill")
        self.kept = str(tmp_path / "kept")

    def forward(self, x):
        if self.calls + 1 == self.at and x.device.type != "meta" and in_an_actor():
            end = time.monotonic() + 30
            while len(complete(self.kept)) < 2 and time.monotonic() < end:
                time.sleep(0.01)
        return super().forward(x)


def complete(kept):
    return sorted(Path(kept).glob("tick-*/manifest.json"))


def damage(snapshot, block, how):
    """Does `how` to a snapshot that is complete. Returns what a warning has to name."""
    folder = Path(str(snapshot))
    if how == "all":
        for manifest in complete(folder.parent):
            shutil.rmtree(manifest.parent)
    elif how == "folder":
        shutil.rmtree(folder)
    file = folder / snapshot.manifest.parts[block].file
    if how in ("file", "late"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    return str(file)


@pytest.fixture
def damaged(monkeypatch):
    """Call it with a block and a kind of damage: it happens to the latest snapshot when an actor is
    about to be replaced ('late': when its files have just been found as they were written)."""
    monkeypatch.setenv("HAMDIST_TEST_DRIVER", str(os.getpid()))
    named = []

    def when_lost(block, how):
        owner, name = (SnapshotCatalogue, "go_back") if how == "late" else (Replacement, "replace")
        before = getattr(owner, name)

        def with_damage(one, those):
            catalogue = one if how == "late" else one._catalogue
            latest = catalogue.latest
            found = before(one, those) if how == "late" else None
            if not named:
                named.extend([damage(latest, block, how), latest.tick])
            return found if how == "late" else before(one, those)

        monkeypatch.setattr(owner, name, with_damage)
        return named

    return when_lost


@pytest.mark.parametrize(
    ("level", "where", "how"),
    [
        ("trace", 2, "file"),
        pytest.param("local", 0, "file", marks=pytest.mark.slow),
        pytest.param("trace", 0, "folder", marks=pytest.mark.slow),  # ("all" has none either)
        ("trace", 4, "all"),
        ("local", 2, "late"),
    ],
)
def test_all_go_back(session, damaged, leaves_no_socket, tmp_path, level, where, how):
    named = damaged(f"block{where}", how)
    with pytest.warns(UserWarning, match="all actors go back to"):
        result = both(tmp_path, net((where, KilledBehindTwo(tmp_path))), level=level)
    file, tick = named
    assert [f"block{where}" in r.blocks for r in result.replaced if r.lost] == [True]
    assert len(result.replaced) == 3
    for one in result.replaced:
        assert file in one.fault or how in ("folder", "all")
        assert one.fault.startswith(str(tmp_path / "kept"))
        assert one.since == (0 if how == "all" else tick - 10)
    assert any(one.fault in w for w in result.warnings)


def test_a_whole_part_is_enough(session, damaged, leaves_no_socket, tmp_path):
    """Of another actor's file nothing is needed."""
    named = damaged("block0", "file")
    result = both(tmp_path, net((4, KilledBehindTwo(tmp_path))))
    assert named
    assert [(r.lost, r.fault, r.since) for r in result.replaced] == [(True, "", named[1])]


def test_a_list_in_the_driver_is_drawn_again(session, damaged, leaves_no_socket, tmp_path):
    damaged("block2", "file")
    odd = net((2, KilledBehindTwo(tmp_path)))
    result = both(tmp_path, odd, lambda n: from_iterable(batches(n), classes=3))
    assert len(result.replaced) == 3


def test_a_stream_that_can_be_read_once(session, damaged, leaves_no_socket, tmp_path):
    named = damaged("block2", "file")
    kept = {"path": str(tmp_path / "kept"), "every": 10}
    engine = {"kind": "ray", "actors": 3}
    run = settings(engine, ITEMS, level="trace", partition=cut(), snapshots=kept)
    odd = net((2, KilledBehindTwo(tmp_path)))
    with pytest.raises(SnapshotError, match="cannot be drawn a second time: go on from") as caught:
        train(odd, from_iterable(iter(batches(ITEMS)), classes=3), run)
    assert named[0] in str(caught.value)
    assert f"--resume {tmp_path / 'kept'}" in str(caught.value)
