"""The table of blocks against events written by hand; energy against counters in a folder."""

from __future__ import annotations

from hamdist.dynamics.saved_state.block_memory import BlockMemory
from hamdist.runtime.process import usage
from hamdist.runtime.results.events import BlocksMeasured, NetworkPlaced, RunBegun, UpdatesAligned
from hamdist.runtime.results.measured import Norms
from hamdist.study.report.blocks import block_facts, block_table
from hamdist.study.report.files import recorded


def measured(seed, late, norms):
    names = {"a": 1}
    fields = {"tick": names, "updates": names, "seconds": {"a": 0.1}, "waiting": {}}
    return BlocksMeasured(level="trace", seed=seed, staleness=late, norms={"a": norms}, **fields)


def test_a_row_for_each_block_over_all_seeds():
    """20 samples come back after 1 to 20 updates in each run: the 20th and 38th of 40 are 10, 19
    (median: the one behind the middle, 11). Four probes: the first and the last stand alone. Of
    the memory the largest counts: 2,560 bytes are 2.5 KiB."""
    late = {"a": dict.fromkeys(range(1, 21), 1)}
    runs = []
    for seed, theta, dead in ((0, 2.0, 0.25), (1, 4.0, 0.75)):
        cosines = enumerate((0.8, 0.5, 0.1, 0.2) if seed else (1.0, 0.5, 0.1, 0.4))
        events = [measured(seed, {}, Norms(1.0, 1.0, 1.0, 9.0, 9.0, 0.9))]
        events += [
            UpdatesAligned(level="trace", seed=seed, sample=n, cosines={"a": x}) for n, x in cosines
        ]
        events.append(measured(seed, late, Norms(1.0, 1.0, 1.0, theta, theta / 10, dead)))
        runs.append(block_facts(events, {"a": BlockMemory(512, 1024, 512 if seed else 1024)}))
    table = block_table({"centralised": [{}, {}], "trace": runs})
    expected = ["trace", "a", "11", "19", "20", "0.9", "0.3", "3", "0.3", "50.0", "2.5"]
    assert table.rows == [expected]
    assert block_table({"centralised": [{}]}) is None


def test_a_block_without_messages_has_no_staleness():
    probe = UpdatesAligned(level="trace", seed=0, sample=4, cosines={"a": 0.5})  # the last
    facts = block_facts([measured(0, {}, Norms(None, None, 1.0, 2.0)), probe], {})
    (row,) = block_table({"trace": [facts]}).rows
    assert row[2:7] == [*["–"] * 4, "0.5"]
    assert row[-1] == "–"


def test_a_run_that_was_made_anew_has_the_events_of_its_last_time(tmp_path):
    """One that is stored is only told again."""

    def made(cosine):
        head = {"level": "trace", "seed": 0}
        begun = RunBegun(title="x", engine="inprocess", **head)
        network = NetworkPlaced(blocks=[], edges=[], actors=[], staleness=0, **head)
        return [begun, network, UpdatesAligned(sample=1, cosines={"a": cosine}, **head)]

    events = [*made(0.1), *made(0.9), made(0.0)[0]]
    (tmp_path / "events.jsonl").write_text("\n".join(event.to_line() for event in events))
    seen = [event for event in recorded(tmp_path) if isinstance(event, UpdatesAligned)]
    assert [event.cosines for event in seen] == [{"a": 0.9}]


def test_joules_of_all_packages(tmp_path, monkeypatch):
    def count(folder, name, used):
        (tmp_path / folder).mkdir(exist_ok=True)
        texts = {"name": f"{name}\n", "energy_uj": f"{used}\n", "max_energy_range_uj": "1000000\n"}
        for file, text in texts.items():
            (tmp_path / folder / file).write_text(text)

    monkeypatch.setattr(usage, "POWERCAP", tmp_path)
    assert usage.joules_from_now()() is None
    count("intel-rapl:0", "package-0", 100_000)
    count("intel-rapl:1", "package-1", 900_000)
    count("intel-rapl:0:0", "core", 0)
    joules = usage.joules_from_now()
    count("intel-rapl:0", "package-0", 400_000)
    count("intel-rapl:1", "package-1", 100_000)  # come round
    count("intel-rapl:0:0", "core", 700_000)  # part of package 0
    assert abs(joules() - 0.5) < 1e-12
