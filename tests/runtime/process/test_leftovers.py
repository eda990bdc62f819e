"""Documented contract: folders of killed runs are swept, those of living ones are not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from hamdist.runtime.process import leftovers
from hamdist.runtime.process.leftovers import claim, release, remove_leftovers

CLAIMS = (
    "import sys; from pathlib import Path; from hamdist.runtime.process.leftovers import claim; "
    "claim(Path(sys.argv[1])); print('claimed', flush=True); input()"
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def old(folder):
    folder.mkdir()
    (folder / "file").write_text("x")
    os.utime(folder, (0, 0))
    return folder


def swept(place):
    return {folder for folder in remove_leftovers() if folder.parent == place}


def test_a_folder_is_swept_once_its_process_was_killed(place):
    folder = old(place / "hdray-abc")
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout.readline() == "claimed\n"
        assert swept(place) == set()
        owner.kill()
        owner.wait(20)
    assert swept(place) == {folder}
    assert not folder.exists()


def test_a_claim_of_this_process_holds_until_it_is_released(place):
    folder = old(place / "hd-0123456789abcdef")
    claim(folder)
    claim(folder)
    assert swept(place) == set()
    release(folder)
    release(folder)
    assert folder not in leftovers._claims
    assert swept(place) == {folder}


def test_what_is_young_of_another_kind_or_a_link_stays(place):
    young = place / "hd-0123456789abcde0"
    young.mkdir()
    others = [old(place / "hdhead-1"), old(place / "hd-package-0")]
    target = old(place / "mine")
    link = place / "hd-fedcba9876543210"
    link.symlink_to(target)
    os.utime(link, (0, 0), follow_symlinks=False)
    assert swept(place) == set()
    assert young.exists()
    assert all(other.exists() for other in others)
    assert (target / "file").exists()
