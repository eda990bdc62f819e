"""A finished run is taken again only where the code that its settings name is the same."""

from __future__ import annotations

import pytest

from hamdist.config import Settings
from hamdist.study.grid.points import GridJob
from hamdist.study.grid.settings import Trains
from hamdist.study.shared.named_code import code_of

NAMED = "code.py:Mine"


@pytest.mark.parametrize(
    "fields",
    [
        {"learning": {"rules": {"*": NAMED}}},
        {"learning": {"rules": {"block*": {"name": NAMED, "by": 2}}}},
        {"locality": {"level": NAMED}},
        {"compare": {"rules": ["trace", NAMED]}},
    ],
)
def test_other_code_is_another_run(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = []
    for text in ("K = 1", "K = 2", "K = 1"):
        (tmp_path / "code.py").write_text(text)
        settings = Settings.model_validate(fields)
        keys.append((code_of(settings), GridJob(Trains.LEVEL, settings).key))
    assert keys[0] == keys[2]
    assert all(one != other for one, other in zip(keys[0], keys[1], strict=True))


def test_options_and_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("K = 1")
    texts = code_of(Settings(), NAMED, None, "json:loads").split("; ")
    assert [text.split()[0] for text in texts] == [NAMED, "json:loads"]
    assert {len(text.split()[1]) for text in texts} == {64}
    assert code_of(Settings()) == ""
