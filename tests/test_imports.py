"""The table of architecture: who may import whom, walked with `ast`; what importing costs."""

from __future__ import annotations

import ast
import collections
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import hamdist

ROOT = Path(hamdist.__file__).parent

# Each place may import itself, and those named for it: a folder of hamdist/, or a file that lies
# beside folders. A name stands for all that is below it; the most special entry of ALLOWED holds.
DYNAMICS = "errors config"
STATE = "dynamics/finite dynamics/saved_state"
PICTURES = "display/figure display/network display/table display/windows"
RUNTIME = f"errors config dynamics streams {PICTURES}"
STUDY = f"{RUNTIME} runtime models loading display"
CLI_PARTS = "cli/console cli/options"
CLI = f"display errors config runtime models study launch trackers {CLI_PARTS}"
ALLOWED = {
    "errors": "",
    "config": "errors config/sections",
    "config/sections": "errors",
    # Pictures and tables know nothing of runs; the view of a run does.
    "display": "config errors dynamics runtime",
    "display/figure": "",
    "display/network": "display/figure",
    "display/table": "",
    "display/windows": "display/figure dynamics",
    "dynamics": "",
    "dynamics/native": "",
    "dynamics/finite": "dynamics/native",
    "dynamics/saved_state": DYNAMICS,
    "dynamics/user_modules": DYNAMICS,
    "dynamics/objective": f"{DYNAMICS} dynamics/native {STATE} dynamics/user_modules",
    "dynamics/rules": "errors",
    "dynamics/graph": (
        f"{DYNAMICS} display/network dynamics/objective dynamics/rules dynamics/user_modules"
    ),
    "dynamics/schedule": f"{DYNAMICS} dynamics/graph {STATE}",
    "dynamics/modules": f"{DYNAMICS} dynamics/graph dynamics/native dynamics/user_modules",
    "dynamics/tracing": f"{DYNAMICS} {STATE} dynamics/user_modules",
    "dynamics/vjp": (
        f"{DYNAMICS} dynamics/graph dynamics/modules dynamics/native dynamics/objective {STATE} "
        "dynamics/tracing dynamics/user_modules"
    ),
    "dynamics/slicing": (
        f"{DYNAMICS} dynamics/graph dynamics/tracing dynamics/user_modules dynamics/vjp"
    ),
    "dynamics/partition": (
        f"{DYNAMICS} dynamics/graph dynamics/modules dynamics/native dynamics/objective "
        "dynamics/schedule dynamics/slicing dynamics/tracing dynamics/updates "
        "dynamics/user_modules dynamics/vjp"
    ),
    "dynamics/updates": (f"{DYNAMICS} dynamics/graph dynamics/schedule {STATE} dynamics/vjp"),
    # `blocks` does not import `schedule`: what a block computes does not know when.
    "dynamics/blocks": (
        f"{DYNAMICS} dynamics/graph dynamics/modules dynamics/native dynamics/objective "
        f"dynamics/rules {STATE} dynamics/updates dynamics/vjp"
    ),
    "streams": "errors config",
    "streams/sources": "errors config streams/sample",
    "streams/wrappers": "errors config streams/sample streams/replay",
    "streams/factory": "errors config streams/sample streams/sources streams/wrappers",
    "streams/__init__": "errors config streams",
    "loading": "errors",
    "models": "errors config dynamics streams loading",
    "runtime": "",
    "runtime/signals": RUNTIME,
    "runtime/results": (f"{RUNTIME} display/figure display/table display/windows runtime/signals"),
    "runtime/process": f"{RUNTIME} runtime/results",
    "runtime/storage": f"{RUNTIME} runtime/process",
    "runtime/transport": f"{RUNTIME} runtime/process runtime/signals",
    "runtime/plan": (
        f"{RUNTIME} loading runtime/process runtime/results runtime/signals runtime/storage"
    ),
    "runtime/timing": f"{RUNTIME} runtime/plan runtime/signals",
    "runtime/nodes": f"{RUNTIME} loading runtime/plan runtime/results runtime/signals",
    "runtime/snapshots": (
        f"{RUNTIME} runtime/nodes runtime/plan runtime/process runtime/signals runtime/storage"
    ),
    "runtime/placement": (
        f"{RUNTIME} runtime/nodes runtime/plan runtime/process runtime/signals runtime/timing "
        "runtime/transport"
    ),
    "runtime/advice": (
        f"{RUNTIME} runtime/placement runtime/plan runtime/process runtime/results "
        "runtime/signals runtime/transport"
    ),
    "runtime/engines": (
        f"{RUNTIME} runtime/nodes runtime/plan runtime/process runtime/results runtime/signals "
        "runtime/snapshots runtime/transport"
    ),
    "runtime/ray_engine": (
        f"{RUNTIME} runtime/advice runtime/engines runtime/placement runtime/plan runtime/process "
        "runtime/results runtime/signals runtime/snapshots runtime/storage runtime/timing "
        "runtime/transport"
    ),
    "runtime/train": f"{RUNTIME} runtime loading",
    "runtime/live": f"{RUNTIME} runtime",
    "api": f"{RUNTIME} display runtime models trackers",
    "trackers": f"{RUNTIME} runtime",
    "study": "",
    "study/interface": f"{STUDY} study trackers",
    "study/shared": STUDY,
    "study/run": f"{STUDY} study/shared",
    "study/view": f"{STUDY} study/shared",
    "study/report": f"{STUDY} study/shared study/run study/view",
    "study/grid": f"{STUDY} study/shared study/run study/report study/view",
    "study/gradient_descent": f"{STUDY} study/shared study/report",
    "study/propagation": f"{STUDY} study/shared study/report study/view",
    "study/replay": f"{STUDY} study/shared study/run study/report",
    "study/simulate": f"{STUDY} study/shared study/run",
    "study/verify": STUDY,
    "study/verify/oracles": f"{STUDY} study/shared",
    "study/verify/topics": (
        f"{STUDY} study/shared study/run study/gradient_descent study/propagation "
        "study/verify/oracles"
    ),
    "serve": f"{RUNTIME} runtime",
    "attached": f"{RUNTIME} runtime launch",
    "adapters": f"{RUNTIME} runtime api",
    "launch": f"{STUDY} study api serve",
    "cli": f"{CLI} api serve cli",
    "__main__": "cli",
    "__init__": "errors config dynamics streams runtime api attached study",
}
LARGEST_FOLDER = 16  # files
LONGEST_FILE = 400  # lines; those that are longer still, none of which may grow
LONGER: dict[str, int] = {}
RAY = {
    *("runtime/ray_engine/worker_actor.py", "runtime/ray_engine/worker_group.py"),
    *("runtime/ray_engine/replacement.py", "runtime/ray_engine/session.py"),
    *("runtime/ray_engine/placed_workers.py", "runtime/ray_engine/wired_workers.py"),
    *("runtime/ray_engine/cluster_hosts.py", "runtime/ray_engine/local_ray.py"),
    *("runtime/ray_engine/worker_process.py", "runtime/ray_engine/forked_workers.py"),
    *("launch/jobs_api.py", "launch/doctor_job.py"),
}


@cache
def parsed(path):
    return ast.parse(path.read_text())


def imports(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            if node.module == "hamdist":
                yield from (f"hamdist.{alias.name}" for alias in node.names)


def above(place):
    """A place and what it lies in: 'a/b/c', 'a/b', 'a'."""
    parts = place.split("/")
    return ["/".join(parts[:k]) for k in range(len(parts), 0, -1)]


def place_of(module):
    return module.removeprefix("hamdist").lstrip(".").replace(".", "/") or "__init__"


def test_import_direction():
    seen = set()
    for path in ROOT.rglob("*.py"):
        mine = above(path.relative_to(ROOT).with_suffix("").as_posix())
        home = next(name for name in mine if name in ALLOWED)
        seen.add(home)
        for name in imports(path):
            if not name.startswith("hamdist."):
                assert name != "hamdist" or home == "__init__", f"{path} imports the package root"
                continue
            other = above(place_of(name))
            inside = home in other or next((o for o in other if o in ALLOWED), None) == home
            assert inside or set(other) & set(ALLOWED[home].split()), f"{path} imports {name}"
    assert seen == {*ALLOWED}, "a place without files"


def test_folders_and_files_are_small():
    """A folder has a sign, its docstring, and few files; a file can be read at one sitting."""
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        sign = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert sign, f"{folder}: __init__.py does not say what lies here"
        assert len([*folder.glob("*.py")]) <= LARGEST_FOLDER, folder
    for path in ROOT.rglob("*.py"):
        name, lines = path.relative_to(ROOT).as_posix(), len(path.read_text().splitlines())
        assert lines <= LONGER.get(name, LONGEST_FILE), f"{name}: {lines} lines"


def test_public_names_are_told_to_type_checkers_too():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: "hamdist.streams" if node.module == "hamdist" else node.module  # type: ignore[attr-defined]
        for node in block.body
        for alias in node.names  # type: ignore[attr-defined]
        if alias.asname == alias.name
    }
    assert sorted(told) == hamdist.__all__
    for name, home in told.items():
        found = importlib.import_module(home)
        if name != "study":  # (the package of that name, which can be called)
            assert getattr(hamdist, name) is (found if name == "streams" else getattr(found, name))


def test_a_public_class_name_is_defined_once():
    homes = {}
    for path in ROOT.rglob("*.py"):
        for node in parsed(path).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, (ast.Assign, ast.AnnAssign)):  # an alias of a type
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name)]
                names = [name for name in names if name[0].isupper() and not name.isupper()]
            for name in (name for name in names if not name.startswith("_")):
                homes.setdefault(name, []).append(path)
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_nouns_of_class_names_are_in_the_glossary():
    """One word for one thing: what three or more public classes are called is explained."""
    nouns = collections.Counter()
    for path in ROOT.rglob("*.py"):
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                nouns[re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", node.name)[-1].lower()] += 1
    page = ROOT.parent / "docs" / "pages" / "concepts" / "glossary.md"
    words = {*re.findall(r"\w+", page.read_text().lower())}
    often = {noun for noun, many in nouns.items() if many >= 3}
    assert not {noun for noun in often if not {noun, noun.removesuffix("s")} & words}


def test_public_functions_classes_and_methods_have_docstrings():
    """A method that overrides has its base's, or that of the interface (docs: develop/adding)."""
    trees = [(path, parsed(path)) for path in ROOT.rglob("*.py")]
    classes = [node for _, tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    documented = {m.name for node in classes for m in _methods(node) if ast.get_docstring(m)}
    documented |= {"forward", "extra_repr", "emit"}  # of torch and logging
    bare = []
    for path, tree in trees:
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                bare += [] if ast.get_docstring(node) else [f"{path}: {node.name}"]
                for m in _methods(node) if isinstance(node, ast.ClassDef) else []:
                    if not ast.get_docstring(m) and m.name not in documented:
                        bare.append(f"{path}: {node.name}.{m.name}")
    assert not bare


def _methods(node):
    functions = [m for m in node.body if isinstance(m, ast.FunctionDef)]
    return [m for m in functions if not m.name.startswith("_")]


def test_state_is_attributes_that_the_class_sets():
    """Names in STATE are texts, in which mypy sees no typo."""
    every = (node for path in ROOT.rglob("*.py") for node in ast.walk(parsed(path)))
    classes = {node.name: node for node in every if isinstance(node, ast.ClassDef)}
    states = {}
    for name, node in classes.items():
        for part in node.body:
            of = getattr(part, "value", None)
            if isinstance(of, ast.Tuple) and "STATE" in names_set_in(part):
                states[name] = {n.value for n in of.elts if isinstance(n, ast.Constant)}

    def sets(name):
        node = classes.get(name, ast.Module([], []))
        bases = (ast.unparse(base).partition("[")[0] for base in getattr(node, "bases", ()))
        return names_set_in(node).union(*map(sets, bases))

    assert len(states) > 25
    assert not {name: wrong for name, of in states.items() if (wrong := of - sets(name))}


def names_set_in(node):
    """Returns the variables and attributes that are assigned to anywhere in `node`."""
    targets = (n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store))
    return {getattr(n, "id", None) or getattr(n, "attr", None) for n in targets}


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
    for path in (ROOT / "dynamics").rglob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & forbidden, path
        measures = path.name == "step_seconds.py"  # (balance by measured time)
        assert "time" not in names or measures, path


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


def test_importing_what_a_worker_needs_leaves_torchs_compiler_alone():
    """It takes a second and 70 MiB, of every process."""
    code = "import hamdist.runtime.engines.worker, sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
