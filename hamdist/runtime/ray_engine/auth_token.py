"""Ray's authentication token: who has it can run code on every host of a cluster.

Ray itself would write a token where all users of the host can read it, and joins a cluster without
one where the environment does not ask for it. Here a local Ray has a token of its own in a private
folder, and a missing token of a cluster is reported. Ray looks for a token in RAY_AUTH_TOKEN, in
the file RAY_AUTH_TOKEN_PATH, and in ~/.ray/auth_token, in this order.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from hamdist.config import Encryption, EngineSettings
from hamdist.errors import ClusterError

MODE, TOKEN, FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
REMEDY = (
    f"set {MODE}=token and {FILE} to a file of mode 0600 with the cluster's token, here and "
    "wherever 'ray start' runs"
)


@lru_cache(maxsize=1)
def _local_token() -> str:
    """Return the token of all local Rays of this process, which Ray reads once."""
    return secrets.token_hex(32)


@contextmanager
def own_token(folder: str) -> Iterator[None]:
    """Make a Ray started inside read its token from a file of mode 0600 in `folder`.

    A token that the user has set takes precedence.
    """
    if TOKEN in os.environ or FILE in os.environ:
        yield
        return
    path = os.path.join(folder, "token")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_local_token())
    os.environ[FILE] = path
    try:
        yield
    finally:
        del os.environ[FILE]


def asked_for() -> bool:
    """Return True if this process presents a token to Ray."""
    return os.environ.get(MODE, "").lower() == "token"


def check_token(address: str) -> None:
    """Raise ClusterError if Ray is set to use a token and there is none that it could read."""
    if not asked_for() or TOKEN in os.environ:
        return
    path = _path()
    try:
        empty = not path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(
            f"engine.address {address!r}: no token for it: {path}: "
            f"{getattr(error, 'strerror', None) or 'no text'}; {REMEDY}"
        ) from None
    if empty:
        raise ClusterError(f"engine.address {address!r}: {path} is empty; {REMEDY}")


def is_refusal(error: BaseException | None) -> bool:
    """Return True if Ray could not be joined because the token was wrong or missing.

    Ray reports that as text, in the error or in one of its causes.
    """
    while error is not None:
        if "uthenticat" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def token_error(address: str) -> ClusterError:
    """Return the error for a cluster that requires another token than this process has."""
    if not asked_for():
        reason = f"none is shown ({MODE} is {os.environ.get(MODE, 'not set')})"
    else:
        source = TOKEN if TOKEN in os.environ else str(_path())
        reason = f"the one of {source} is not the cluster's"
    return ClusterError(
        f"engine.address {address!r}: this Ray cluster asks for a token, and {reason}; {REMEDY}"
    )


def check_joined(engine: EngineSettings) -> None:
    """Check the encryption after a cluster was joined.

    Raises ClusterError if the run's keys would be readable by all and `engine.encryption` is 'on'.
    """
    if engine.encryption is Encryption.ON and not asked_for():
        raise ClusterError(
            f"engine.encryption 'on': the Ray cluster at {engine.address} asks for no token, so "
            f"whoever reaches it gets the keys; {REMEDY}, or use 'auto'"
        )


def token_notes(engine: EngineSettings) -> list[str]:
    """Return a warning if anybody can use the joined cluster, or read its token."""
    if engine.address is None:
        return []
    if not asked_for():
        return [
            f"the Ray cluster at {engine.address} asks for no token: whoever reaches its ports can "
            f"run code on its hosts; {REMEDY}"
        ]
    path = _path()
    if TOKEN not in os.environ and path.exists() and path.stat().st_mode & 0o077:
        return [f"{path}: other users of this host can read Ray's token; chmod 600 {path}"]
    return []


def _path() -> Path:
    return Path(os.environ.get(FILE) or Path.home() / ".ray" / "auth_token")
