"""Preparations of a command: functions, folders and checks before anything is computed."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hamdist.cli.console import OUTPUT
from hamdist.errors import SettingsError

if TYPE_CHECKING:
    from hamdist.models.build import ModelFactory

STANDARD_OUTPUT = Path("-")


def factory_of(name: str | None, option: str = "--model") -> ModelFactory | None:
    """Return the model's function that `option` names. Raises SettingsError if there is none."""
    if name is None:
        return None
    from hamdist.models.build import load_factory

    return load_factory(name, option)


def code_of(*names: str | None) -> str:
    """Return digests of the files that `--model` and `--stream` have named, which are imported."""
    digests = []
    for name in names:
        where = "" if name is None else name.rpartition(":")[0]
        module = sys.modules.get(Path(where).stem if where.endswith(".py") else where)
        file = getattr(module, "__file__", None)
        digest = "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        digests.append(f"{name} {digest}")
    return "; ".join(digests)


def command_line() -> str:
    r"""Return the command as it was typed, for the files of its results.

    Bytes of a path that is not UTF-8 are written as \udcXX.
    """
    typed = shlex.join(["hamdist", *sys.argv[1:]])
    return typed.encode("utf-8", "backslashreplace").decode()


def json_file(path: Path | None) -> Path | None:
    """Return the file of `--json`; none for `-`, which has the command print the document alone.

    Raises SettingsError if it cannot be written, before anything is computed.
    """
    if path == STANDARD_OUTPUT:
        OUTPUT.as_json = True
        return None
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise SettingsError(f"--json '{path}': cannot write there: {error.strerror}") from None
    return path
