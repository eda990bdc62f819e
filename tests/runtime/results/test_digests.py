"""Digests of signals and weights. Oracles: hashlib over the bytes that the definition names, a
change made by hand at a known tick, and the run that was not stopped. (That both engines have the
same ones, killed actors included, is asserted by `assert_equal` wherever runs are compared.)"""

from __future__ import annotations

import copy
import hashlib
import struct
import zlib

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, settings
from runtime.networks import PortableStream, chain, stream
from runtime.ray_engine.test_recovery import Once, cut, driver, net  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import SettingsError
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.results.digests import MOST_MARKS, DigestTrack
from hamdist.runtime.signals.signal import Signal
from hamdist.runtime.train.train import train
from hamdist.study.report.digests_diff import Parting, compared, digests_json, partings

ITEMS = 40
ALONE = {"kind": "inprocess"}


def run(engine=None, model=chain, items=ITEMS, **fields):
    chosen = settings({**ALONE, **(engine or {})}, items, **{"level": "trace", **fields})
    return train(model(), PortableStream(items), chosen)


def checksum(tensor):
    data = tensor.numpy().tobytes()
    return zlib.crc32(data).to_bytes(4, "little") if data else b""


def by_hand(signals):
    last = ""
    for (tick, sample, version), payload, end in signals:
        data = last.encode() + struct.pack("<qqqBB", tick, sample, version, end, False)
        if payload is not None:
            data += f"{payload.dtype} {tuple(payload.shape)}".encode() + checksum(payload)
        last = hashlib.blake2b(data, digest_size=8).hexdigest()
        yield last


def test_a_track_is_the_hash_of_all_signals_so_far():
    payloads = [torch.arange(6.0).view(2, 3), None, torch.tensor([-0.0]), torch.zeros(0, 3)]
    signals = [((k, k, 2 * k), p, k == 3) for k, p in enumerate(payloads)]
    track = DigestTrack()
    for stamp, payload, end in signals:
        track.add(Signal(Stamp(*stamp), payload, end))
    assert [digest for _, digest in track.marks] == list(by_hand(signals))
    assert [tick for tick, _ in track.marks] == [0, 1, 2, 3]


def test_long_tracks_keep_every_second_mark_and_the_same_digests():
    whole = [((k, k, 0), torch.tensor([float(k)]), False) for k in range(5 * MOST_MARKS)]
    track = DigestTrack()
    for stamp, payload, end in whole:
        track.add(Signal(Stamp(*stamp), payload, end))
    known = list(by_hand(whole))
    assert track.every == 8
    assert track.marks == [(k, known[k]) for k in range(7, len(whole), 8)]
    assert (track.count, track.last) == (len(whole), known[-1])


def test_a_runs_own_digests():
    """All is taken as it was sent (but the end of the targets, which nobody waits for), and the
    final weights are those of the result."""
    result = run()
    digests = result.digests
    assert {k: len(v) for k, v in digests.items()} == {"sent": 10, "taken": 10, "weights": 5}
    for name, taken in digests["taken"].items():
        sent = digests["sent"][name]
        assert taken.count == sent.count - name.startswith("target") > ITEMS - 1
        assert taken.marks == sent.marks[: taken.count]
    for name, track in digests["weights"].items():
        state = result.blocks[name]
        digest = hashlib.blake2b(digest_size=8)
        for key, tensor in sorted(state.theta.items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(checksum(tensor))
        assert (track.count, track.last) == (state.updates, digest.hexdigest())
        assert len(track.marks) == 6  # after 1, 2, 4, 8, 16, 32 updates
    assert not run({"digests": False}).digests


@pytest.mark.parametrize("where", ["post", "take"])
def test_the_first_signal_that_differs_is_named(monkeypatch, where):
    """One number of one signal is changed at tick 13, before it is hashed by its sender; or between
    its sender and its receiver, as a bad transport would do."""
    whole = run()
    before = Mailbox.post

    def post(self, channel, signal):
        hits = channel.key == "message block2->block3" and signal.stamp.tick == 13
        if hits and where == "post":
            signal.payload = signal.payload + 1e-3
        before(self, channel, signal)
        if hits and where == "take":
            signal.payload = signal.payload + 1e-3

    monkeypatch.setattr(Mailbox, "post", post)
    first, *more = partings(whole.digests, run().digests)
    kind = "sent" if where == "post" else "taken"
    assert first == Parting(kind, "message block2->block3", 12, 13)
    assert str(first) == (
        f"message on edge block2->block3, as {kind}: differ at tick 13 (equal at tick 12)"
    )
    assert all(one.tick is None or one.tick >= 13 for one in more)
    weights = {one.name for one in more if one.kind == "weights"}
    assert weights == {f"block{i}" for i in range(5)}


def test_what_is_equal_and_ends_earlier_differs_in_the_end():
    found = partings(run().digests, run(items=ITEMS // 2).digests)
    assert Parting("sent", "state u->block0", 18, 19) in found  # (sample 20 leaves in tick 19)
    with pytest.raises(SettingsError, match="only one of them has sent digests of 'message"):
        partings(run().digests, run(level="heads").digests)


@pytest.mark.ray
@pytest.mark.timeout(110)
@pytest.mark.slow
def test_an_actor_that_is_killed_and_a_run_that_goes_on(session, driver, tmp_path):  # noqa: F811
    """Both go on with the digests that they had."""
    fields = {"level": "trace", "partition": {**cut(), "delay": 2}}
    odd = net((2, Once(25, tmp_path / "mark", "kill")))
    calm = copy.deepcopy(odd)
    calm[2][1].at = None
    kept = {"path": str(tmp_path / "kept"), "every": 10}
    spread = {"kind": "ray", "actors": 3, "compress": "int8"}
    source = stream(ITEMS)
    alone = train(calm, source, settings({**ALONE, "compress": "int8"}, ITEMS, **fields))
    lost = train(odd, source, settings(spread, ITEMS, snapshots=kept, **fields))
    assert lost.replaced
    assert_equal(alone, lost)
    assert alone.digests["taken"] == lost.digests["taken"]
    on = {"path": str(tmp_path / "on")}
    chosen = settings({**ALONE, "compress": "int8"}, ITEMS, snapshots=on, **fields)
    again = train(calm, source, chosen, resume=kept["path"])
    assert again.digests["sent"] == alone.digests["sent"]


def test_a_snapshot_without_them(tmp_path):
    kept = {"path": str(tmp_path / "kept"), "every": 10}
    run({"digests": False}, snapshots=kept)
    chosen = settings(ALONE, ITEMS, level="trace", snapshots=kept)
    for _ in range(2):  # (the second goes on from a snapshot of the first)
        with pytest.warns(UserWarning, match="was taken without them, so this run has none"):
            again = train(chain(), PortableStream(ITEMS), chosen, resume=kept["path"])
        assert again.digests == {}


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    small = ["run", "digits", "--engine", "inprocess", "--steps", "30"]
    digests = ["--set", "engine.digests=true", "--out"]
    for folder, lr in ((a, "0.05"), (b, "0.05"), (c, "0.06")):
        shown = command(*small, *digests, folder, "--set", f"learning.lr={lr}")
        assert shown.exit_code == 0, shown.output
    equal = command("diff", a, b / "digests.json")
    assert (equal.exit_code, equal.stdout) == (0, "equal\n")
    other = command("diff", a, c)
    assert other.exit_code == 1
    assert other.stdout.startswith("weights of block block3: differ at tick 3\n")
    assert "and 11 more" in other.stdout


def test_a_comparisons_runs_one_by_one(tmp_path):
    for folder, seeds in (("a", "2"), ("b", "1")):
        asked = ["--levels", "trace", "--seeds", seeds, "--steps", "20", "--engine", "inprocess"]
        shown = command(
            *("compare", "digits", *asked, "--set", "engine.digests=true"),
            *("--out", tmp_path / folder),
        )
        assert shown.exit_code == 0, shown.output
    both = command("diff", tmp_path / "a", tmp_path / "b")
    assert (both.exit_code, both.stdout) == (0, "equal\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no digests there; run with --set engine.digests=true"),
        ("no json", "no file of digests"),
        ('{"sent": {}}', r"no file of digests \(it has \['sent'\]\)"),
        ('{"sent": {"state u->a": {"marks": 3}}}', "no file of digests"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, words):
    if content is not None:
        (tmp_path / "digests.json").write_text(content)
    shown = command("diff", tmp_path, tmp_path)
    assert shown.exit_code == 2
    with pytest.raises(SettingsError, match=words):
        compared(tmp_path, tmp_path)


def test_a_file_of_another_network(tmp_path):
    for name, level in (("a", "trace"), ("b", "heads")):
        (tmp_path / name).write_text(digests_json(run(level=level).digests))
    shown = command("diff", tmp_path / "a", tmp_path / "b")
    assert shown.exit_code == 2
    assert "the runs cannot be compared" in " ".join(shown.stderr.split())
