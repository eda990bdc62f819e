"""The table of architecture: who may import whom, walked with `ast`; what importing costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import hamdist

ROOT = Path(hamdist.__file__).parent

# Each layer may import itself and those named here.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "dynamics": {"errors", "config"},
    "streams": {"errors", "config"},
    "networks": {"errors", "config", "streams"},
    "loading": {"errors"},
    "models": {"errors", "config", "dynamics", "streams", "networks", "loading"},
    "runtime": {"errors", "config", "dynamics", "streams"},
    "api": {"errors", "config", "dynamics", "streams", "runtime"},
    "study": {"errors", "config", "dynamics", "streams", "runtime", "models", "loading"},
    "launch": {"errors", "config", "dynamics", "streams", "runtime", "models", "study", "loading"},
    "cli": {"errors", "config", "runtime", "models", "study", "launch"},
    "__main__": {"cli"},
    "__init__": {"errors", "config", "dynamics", "streams", "runtime", "api"},
}
RAY = {
    *("runtime/actors.py", "runtime/crew.py", "runtime/recovery.py", "runtime/cluster.py"),
    *("runtime/tasks.py", "launch/jobs.py", "launch/examine.py"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            if node.module == "hamdist":
                yield from (f"hamdist.{alias.name}" for alias in node.names)


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_import_direction():
    for path in ROOT.rglob("*.py"):
        mine = layer(path)
        for name in imports(path):
            if name.startswith("hamdist."):
                other = name.split(".")[1]
                assert other == mine or other in ALLOWED[mine], f"{path} imports {name}"
            assert name != "hamdist" or mine == "__init__", f"{path} imports the package root"


def test_public_names_are_told_to_type_checkers_too():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: "hamdist.streams" if node.module == "hamdist" else node.module
        for node in block.body
        for alias in node.names
        if alias.asname == alias.name
    }
    assert sorted(told) == hamdist.__all__
    for name, home in told.items():
        found = importlib.import_module(home)
        assert getattr(hamdist, name) is (found if name == "streams" else getattr(found, name))


def test_no_import_cycle():
    modules = {
        "hamdist." + ".".join(p.relative_to(ROOT).with_suffix("").parts): p
        for p in ROOT.rglob("*.py")
        if p.name != "__init__.py"
    }
    edges = {m: {n for n in imports(p) if n in modules} for m, p in modules.items()}
    while edges:
        free = {m for m, targets in edges.items() if not targets & edges.keys()}
        assert free, f"a cycle among {sorted(edges)}"
        edges = {m: t for m, t in edges.items() if m not in free}


def test_dynamics_knows_no_ray_sockets_files_or_clock():
    forbidden = {"ray", "zmq", "pathlib", "os", "socket", "io"}
    for path in (ROOT / "dynamics").glob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & forbidden, path
        assert "time" not in names or path.name == "split.py", path  # balance by measured time


def test_ray_is_imported_where_it_may_be():
    for path in ROOT.rglob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert "ray" not in names or path.relative_to(ROOT).as_posix() in RAY, path


def test_importing_hamdist_imports_neither_ray_nor_matplotlib():
    code = (
        "import hamdist, sys; "
        "print([m for m in ('ray', 'matplotlib', 'sklearn', 'zmq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
