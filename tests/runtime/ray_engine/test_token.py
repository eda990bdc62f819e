"""Ray's token: private for a local Ray, and what is missing for a cluster is said."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from hamdist.config import EngineSettings
from hamdist.errors import ClusterError
from hamdist.runtime.ray_engine.auth_token import (
    check_joined,
    check_token,
    is_refusal,
    own_token,
    token_error,
    token_notes,
)

FILE = "RAY_AUTH_TOKEN_PATH"


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """An environment that says nothing about tokens, and an empty home."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def engine(**fields):
    return EngineSettings(kind="ray", address="10.0.0.1:6379", **fields)


def token_file(tmp_path, mode=0o600, text="secret"):
    file = tmp_path / "t"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_an_own_token_is_for_its_owner_alone_and_goes_away(unset, tmp_path):
    old = os.umask(0)
    try:
        with own_token(str(tmp_path)):
            file = Path(os.environ[FILE])
            assert file.parent == tmp_path
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert len(file.read_text()) == 64
    finally:
        os.umask(old)
    assert FILE not in os.environ


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", FILE])
def test_a_token_of_the_users_stays(unset, tmp_path, name):
    unset.setenv(name, "mine")
    with own_token(str(tmp_path)):
        assert os.environ[name] == "mine"
        assert not list(tmp_path.iterdir())
    assert os.environ[name] == "mine"


@pytest.mark.parametrize(
    ("text", "words"), [(None, "No such file"), ("", "is empty"), (" \n", "is empty")]
)
def test_a_token_that_is_missing_is_named_before_ray_looks(unset, tmp_path, text, words):
    unset.setenv("RAY_AUTH_MODE", "token")
    path = str(tmp_path / "nowhere") if text is None else token_file(tmp_path, text=text)
    unset.setenv(FILE, path)
    with pytest.raises(ClusterError, match=words) as caught:
        check_token("10.0.0.1:6379")
    assert path in str(caught.value)
    assert "10.0.0.1:6379" in str(caught.value)
    unset.delenv(FILE)
    with pytest.raises(ClusterError, match=r"\.ray/auth_token: No such file"):
        check_token("10.0.0.1:6379")
    unset.setenv("RAY_AUTH_TOKEN", "x")
    check_token("10.0.0.1:6379")


def test_a_refused_token_says_which_one(unset, tmp_path):
    assert "none is shown (RAY_AUTH_MODE is not set)" in str(token_error("h:1"))
    unset.setenv("RAY_AUTH_MODE", "token")
    unset.setenv(FILE, "/some/file")
    assert "the one of /some/file is not the cluster's" in str(token_error("h:1"))
    unset.setenv("RAY_AUTH_TOKEN", "x")
    assert "the one of RAY_AUTH_TOKEN is not" in str(token_error("h:1"))


def test_a_refusal_is_found_where_ray_hides_it():
    """As Ray 2.60 raises it: ConnectionError, from a RuntimeError with the last try's traceback."""
    inner = RuntimeError("Last connection error: ... Unauthenticated: RPC error: InvalidAuthToken")
    outer = ConnectionError("Failed to connect to Ray cluster at h:1")
    outer.__cause__ = inner
    assert is_refusal(outer)
    assert not is_refusal(ConnectionError("Failed to connect to Ray cluster at h:1"))


def test_an_open_cluster_is_told_of_and_refused_if_asked(unset, tmp_path):
    (note,) = token_notes(engine())
    assert "asks for no token" in note
    check_joined(engine())
    with pytest.raises(ClusterError, match="engine.encryption 'on': .* asks for no token"):
        check_joined(engine(encryption="on"))
    assert token_notes(EngineSettings(kind="ray")) == []
    unset.setenv("RAY_AUTH_MODE", "token")
    unset.setenv(FILE, token_file(tmp_path))
    assert token_notes(engine()) == []
    check_joined(engine(encryption="on"))
    unset.setenv(FILE, token_file(tmp_path, 0o644))
    (note,) = token_notes(engine())
    assert "chmod 600" in note


@pytest.mark.ray
def test_a_local_ray_has_a_token_that_nobody_else_can_read(session):
    if "RAY_AUTH_TOKEN" in os.environ:
        pytest.skip("the environment brings a token")
    files = list(Path(tempfile.gettempdir()).glob("hdray-*/token"))
    assert files
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert FILE not in os.environ  # the environment is the user's again
