"""Documented contract: what a run's start was spent on, and who is told meanwhile."""

from __future__ import annotations

import pytest
from runtime.networks import PortableStream, chain

from hamdist.config import Settings
from hamdist.display.run_view import RunView
from hamdist.errors import SettingsError
from hamdist.runtime.process.startup import Startup, startup_line
from hamdist.runtime.results.result import Progress
from hamdist.runtime.train.train import train

pytestmark = pytest.mark.timeout(90)


def settings(**fields):
    return Settings.model_validate({"level": "trace", "steps": 20, **fields})


def test_phases_in_their_order_and_told_as_they_begin():
    told = []
    startup = Startup(told.append)
    with startup.phase("plan"):
        assert told == ["plan"]
    with pytest.raises(ZeroDivisionError), startup.phase("ray"):
        raise ZeroDivisionError
    with startup.phase("plan"):
        pass
    startup.add({"sockets": 2.0, "blocks": 1.0})
    startup.add({"sockets": 3.0})
    assert list(startup.seconds) == ["plan", "ray", "sockets", "blocks"]
    assert startup.seconds["sockets"] == 5.0
    assert told == ["plan", "ray", "plan"]


@pytest.mark.parametrize(
    ("total", "seconds", "line"),
    [
        (
            8.3,
            {"plan": 1.0, "ray": 4.0, "actors": 2.94, "blocks": 0.04, "sockets": 0.3},
            "8.3 s: Ray 4.0, actors 2.9, plan 1.0, sockets 0.3",
        ),
        (0.02, {"plan": 0.02}, "0.0 s"),
        (0.5, {}, "0.5 s"),
    ],
)
def test_the_line_of_the_summary(total, seconds, line):
    assert startup_line(total, seconds) == line


@pytest.mark.parametrize(
    ("engine", "phases"),
    [
        ({"kind": "inprocess"}, ["plan", "blocks"]),
        pytest.param(
            {"kind": "ray", "actors": 2},
            ["plan", "measure", "ray", "actors", "blocks", "sockets"],
            marks=pytest.mark.ray,
        ),
        pytest.param(
            {"kind": "ray", "actors": 2, "balance": "parameters"},
            ["plan", "ray", "actors", "blocks", "sockets"],
            marks=pytest.mark.ray,
        ),
    ],
)
def test_what_a_run_reports(session, engine, phases):
    """The sum is the start-up; the callback hears of every phase before it hears of a sample."""
    seen = []
    result = train(chain(), PortableStream(20), settings(engine=engine), on_progress=seen.append)
    assert list(result.startup) == phases
    assert result.startup_seconds == sum(result.startup.values())
    assert all(seconds > 0 for seconds in result.startup.values())
    told = [progress.phase for progress in seen]
    begun = told.index(None)
    wanted = [phase for phase in phases if engine["kind"] == "ray" or phase == "plan"]
    assert told[:begun] == wanted
    assert not any(told[begun:])
    assert all(progress.samples == 0 and not progress.blocks for progress in seen[:begun])


@pytest.mark.ray
@pytest.mark.parametrize(
    "engine",
    [{"actors": 2}, {"placement": [["block0", "block3"], ["block1", "block2", "block4"]]}],
)
def test_a_placement_can_be_used_again(session, engine):
    """What a run says of its placement is a setting that gives the same placement."""
    first = train(chain(), PortableStream(20), settings(engine={"kind": "ray", **engine}))
    assert len(first.placement) == 2
    assert sorted(b for group in first.placement for b in group) == sorted(first.blocks)
    again = {"kind": "ray", "placement": first.placement}
    second = train(chain(), PortableStream(20), settings(engine=again))
    assert second.placement == first.placement


def test_in_one_process_all_blocks_are_together():
    result = train(chain(), PortableStream(20), settings())
    assert result.placement == [list(result.blocks)]


@pytest.mark.ray
def test_one_sample_at_a_time_gets_one_actor_and_is_told(session):
    result = train(chain(), PortableStream(20), settings(level="backprop", engine={"kind": "ray"}))
    assert len(result.placement) == 1
    assert any("chose one actor: at speed 9" in text for text in result.warnings)


def test_a_wrong_setting_is_found_before_ray_starts():
    """The phases that were told end before Ray's."""
    seen: list[Progress] = []
    wrong = settings(engine={"kind": "ray", "placement": [["block0", "nobody"]]})
    with pytest.raises(SettingsError, match="unknown block 'nobody'"):
        train(chain(), PortableStream(20), wrong, on_progress=seen.append)
    assert [progress.phase for progress in seen] == ["plan"]


def test_the_display_says_what_it_waits_for():
    view = RunView("digits, trace", 32)
    assert view.line == "digits, trace: starting"
    view.update(Progress(0.0, 0, 20, [], [], phase="ray"))
    assert view.line == "digits, trace: starting (Ray)"
    view.update(Progress(2.0, 4, 20, [], []))
    assert view.line.startswith("digits, trace: sample 4/20")
