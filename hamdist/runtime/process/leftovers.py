"""Temporary folders of runs: claimed while a process uses them, swept when it was killed.

A claim is a shared lock on the folder itself, which the kernel takes back when the process ends in
whatever way: a folder that nobody has locked is left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

RAY_PREFIX = "hdray-"  # of a local Ray
SOCKETS_PREFIX = "hd-"  # of the sockets of a run, before its number in 16 digits
YOUNG_SECONDS = 60.0  # a folder is made a moment before it is claimed

_claims: dict[Path, int] = {}


def claim(folder: Path) -> None:
    """Claim a folder that nobody removes (young, or its run's) until `release` or its end."""
    if folder not in _claims:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _claims[folder] = descriptor


def release(folder: Path) -> None:
    """Take back this process's claim on a folder, if it has one."""
    descriptor = _claims.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def remove_leftovers() -> list[Path]:
    """Remove the folders that killed runs of this user have left in that of temporary files."""
    removed = []
    for place in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for pattern in (RAY_PREFIX + "*", SOCKETS_PREFIX + 16 * "[0-9a-f]"):
            for folder in place.glob(pattern):
                with contextlib.suppress(OSError):  # (another process was faster)
                    if _is_left(folder):
                        shutil.rmtree(folder)
                        removed.append(folder)
    return removed


def _is_left(folder: Path) -> bool:
    status = folder.lstat()
    if status.st_uid != os.getuid() or time.time() - status.st_mtime < YOUNG_SECONDS:
        return False
    # (O_NOFOLLOW: a link with such a name is nobody's folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
