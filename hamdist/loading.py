"""Functions that a user names on the command line: `package.module:function`, `file.py:function`.

What is named is imported, so its code runs: a name may come from a command line or a program; of a
settings file, from `learning.rules`, `learning.optimizer`, `locality.level` and `compare` alone.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hamdist.errors import SettingsError

FORMS = "package.module:function or path/file.py:function"


def load_function(option: str, name: str) -> Callable[..., object]:
    """Import the function that `name` names, without calling it.

    Modules are searched for in the current directory, too. For a file, its folder is added to the
    places where modules are searched for (as in `python file.py`), so that it can import its
    neighbours, and so that other processes of this host find it. option: what the user wrote before
    it ('--model'), for errors. Raises SettingsError for every way in which it can be wrong.
    """
    origin = f"{option} {name!r}"
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise SettingsError(f"{origin}: write it as {FORMS}")
    file = where.endswith(".py")
    module = _from_file(Path(where), origin) if file else _imported(where, origin)
    function = getattr(module, attribute, None)
    if function is None:
        kind = "file" if file else "module"
        raise SettingsError(f"{origin}: {kind} {where!r} has no {attribute!r}")
    if not callable(function):
        raise SettingsError(f"{origin}: {attribute!r} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]  # callable() narrows to Callable[..., object]


def check_call(option: str, name: str, function: Callable[..., object], *arguments: str) -> None:
    """Raise SettingsError if `function` cannot be called with the keyword `arguments`."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C have none
        return
    try:
        signature.bind(**dict.fromkeys(arguments))
    except TypeError as error:
        how = f"with {', '.join(arguments)}" if arguments else "without arguments"
        raise SettingsError(f"{option} {name!r}: it is called {how}, but {error}") from None


def call_function(option: str, function: Callable[..., object], **arguments: Any) -> object:
    """Call the user's function and return its result; raise SettingsError if it fails."""
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        raise SettingsError(f"{option}: {title(function)}() failed: {shortened(error)}") from error


def title(function: Callable[..., object]) -> str:
    """Return the name of a function as errors show it."""
    return getattr(function, "__qualname__", repr(function))


def _from_file(path: Path, origin: str) -> ModuleType:
    if not path.is_file():
        raise SettingsError(f"{origin}: there is no file {str(path)!r}")
    path = path.resolve()
    if "." in path.stem:
        raise SettingsError(
            f"{origin}: Python cannot import a file with a dot in its name; rename it"
        )
    _search(path.parent)
    module = _imported(path.stem, origin)
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() != path:
        raise SettingsError(
            f"{origin}: Python has another module {path.stem!r} ({file or 'its own'}), which it "
            "takes instead; rename the file"
        )
    return module


def _imported(module_name: str, origin: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise SettingsError(
                f"{origin}: no module {error.name!r} in the current directory or on the Python path"
            ) from None
        raise SettingsError(f"{origin}: its import failed: {shortened(error)}") from error
    except (Exception, SystemExit) as error:
        raise SettingsError(f"{origin}: its import failed: {shortened(error)}") from error


def _search(folder: Path) -> None:
    if str(folder) not in sys.path and not (folder == Path.cwd() and "" in sys.path):
        sys.path.insert(0, str(folder))


def shortened(error: BaseException) -> str:
    """Return type, message and place of an error in a user's code, also where torch raised it."""
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return text
    known = [getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "hamdist")]
    folders = tuple(f"{Path(file).parent}{os.sep}" for file in known if file)
    place = [f for f in frames if not f.filename.startswith(folders)] or frames
    return f"{text} ({place[-1].filename}, line {place[-1].lineno})"
