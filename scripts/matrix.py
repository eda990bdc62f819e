"""Tests in other environments than the usual one, a few for each: `scripts/test --matrix [KIND]`.

    without-native    a copy of this tree without the built C code
    without-extras    matplotlib, scikit-learn and other packages that single commands need cannot
                      be imported
    python3.10, python3.12, python3.13
                      where the system has that Python (on PATH, by pyenv or uv): all files compile
                      without a warning, the C library as built here is loaded there, and what needs
                      no torch is tested. TORCH_PYTHON=python3.13 installs torch for it, too, which
                      may be gigabytes, and tests the core

--minutes M: begins no kind after so long. Exit code 1 where one fails; what the system lacks is
left out with the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
COPIED = ("hamdist", "tests", "scripts", "pyproject.toml", "README.md", "docs", "cluster-configs")
SOME = (
    "tests/test_imports.py",
    "tests/dynamics/levels/test_golden.py",
    "tests/dynamics/vjp/test_closed.py",
)
NATIVE = (*SOME, "tests/dynamics/native/test_rows.py", "tests/dynamics/levels/test_trace_oracle.py")
EXTRAS = (*SOME, "tests/cli/test_missing.py", "tests/test_api.py", "-m", "not ray")
WITH_TORCH = (
    *SOME,
    "tests/dynamics/user_modules/test_exactness.py",
    "tests/runtime/signals/test_signal.py",
)
PYTHONS = ("3.10", "3.12", "3.13")
# What `hamdist.config` and the command's help import, and the tests of settings.
LIGHT = ("pydantic", "pyyaml", "typer", "rich", "psutil", "pytest", "pytest-timeout", "hypothesis")
HIDDEN = ("matplotlib", "sklearn", "mnist1d", "aiohttp", "timm", "transformers")

HIDE = f"""\
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"{{name}} is hidden (scripts/matrix.py)", name=name)

sys.meta_path.insert(0, Hidden())
"""
LOADED = """\
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_rows", sys.argv[1])
spec = importlib.util.spec_from_file_location("_rows", sys.argv[1], loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
print(sys.version.split()[0], "loads", sys.argv[1])
"""


class Missing(Exception):
    """The system lacks what a kind needs."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    asked = parser.parse_args()
    unknown = sorted(set(asked.kinds) - set(KINDS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: kinds are {', '.join(KINDS)}")
    began = time.monotonic()
    failed = []
    for kind in asked.kinds or KINDS:
        if time.monotonic() - began > 60 * asked.minutes:
            say(f"{kind}: not begun, {asked.minutes:g} minutes are over")
            continue
        say(f"-- {kind}")
        try:
            KINDS[kind]()
        except Missing as reason:
            say(f"{kind}: left out: {reason}")
        except subprocess.CalledProcessError as error:
            say(f"{kind}: FAILED ({' '.join(map(str, error.cmd[:6]))} ...)")
            failed.append(kind)
    return 1 if failed else 0


def run(command: Sequence[str | Path], folder: Path, **more: str) -> None:
    """Run a command in `folder`, `more` added to the environment. Raises CalledProcessError."""
    subprocess.run(list(map(str, command)), cwd=folder, env={**os.environ, **more}, check=True)


def pytest(folder: Path, tests: Sequence[str], python: str | Path = sys.executable) -> None:
    """Run a few tests in a copy of the tree, which is what they import."""
    options = ("-q", "-x", "-p", "no:cacheprovider")
    run((python, "-m", "pytest", *options, *tests), folder, PYTHONPATH=str(folder))


def copied(folder: Path, *left_out: str) -> Path:
    """Copy the tree without files of these patterns."""
    for name in COPIED:
        path = TREE / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", *left_out)
            shutil.copytree(path, folder / name, ignore=ignored)
        else:
            shutil.copy2(path, folder / name)
    return folder


def without_native() -> None:
    """Test a copy without the C code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder), "_rows*.so", "_rows*.pyd")
        code = "from hamdist.dynamics.native import rows; assert not rows.built()"
        run((sys.executable, "-c", code), copy, PYTHONPATH=str(copy))
        pytest(copy, NATIVE)


def without_extras() -> None:
    """Test a copy in which no process can import packages that only some commands need."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        (copy / "sitecustomize.py").write_text(HIDE)
        pytest(copy, EXTRAS)


def other_python(version: str) -> None:
    """Compile all files with another Python, load the C library, and test what needs no torch."""
    python = interpreter(version)
    environment = TREE / f".matrix-{version}"
    if not (environment / "bin" / "python").exists():
        run((python, "-m", "venv", environment), TREE)
    own = environment / "bin" / "python"
    install = (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run((*install, *LIGHT), TREE)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        run((own, "-W", "error", "-m", "compileall", "-q", "hamdist", "tests", "scripts"), copy)
        for library in sorted((copy / "hamdist").rglob("_rows.abi3.so")):
            run((own, "-c", LOADED, library), copy)
        tests = ("--noconftest", "tests/fuzz/test_fuzz_settings.py")
        pytest(copy, tests, own)
        run((own, "-m", "hamdist", "--help"), copy, PYTHONPATH=str(copy), COLUMNS="80")
        if os.environ.get("TORCH_PYTHON") == f"python{version}":
            run((*install, os.environ.get("TORCH", "torch==2.13.0")), TREE)
            run((*install, f"{TREE}[dev]"), TREE)
            pytest(copy, WITH_TORCH, own)


def interpreter(version: str) -> Path:
    """Return a Python of that version. Raises Missing."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [*sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True)]
    places += [Path(path) for path in [shutil.which(f"python{version}")] if path]
    if shutil.which("uv"):
        asked = ["uv", "python", "find", "--offline", version]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        places += [Path(done.stdout.strip())] if done.returncode == 0 else []
    for path in places:
        works = [str(path), "-c", "import ctypes, sqlite3, ssl, venv"]
        if (
            path.exists()
            and subprocess.run(works, capture_output=True, check=False).returncode == 0
        ):
            return path
    raise Missing(f"no Python {version} on PATH, by pyenv or by uv")


KINDS: Mapping[str, Callable[[], None]] = {
    "without-native": without_native,
    "without-extras": without_extras,
    "python3.10": lambda: other_python("3.10"),
    "python3.12": lambda: other_python("3.12"),
    "python3.13": lambda: other_python("3.13"),
}

if __name__ == "__main__":
    sys.exit(main())
