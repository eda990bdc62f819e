"""Bad input to the real command, a process each: one line of error, an exit code, no file left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from bad_input import MODELS, TINY
from safetensors import safe_open
from safetensors.torch import save_file

from hamdist.config import read_settings
from hamdist.runtime.storage.snapshot_files import Manifest
from hamdist.study.run.run import run_level

pytestmark = pytest.mark.timeout(200)

# As `python -m hamdist`, with arguments that no operating system passes on: a NUL, a surrogate.
COMMAND = """
import sys
sys.argv[1:] = [a.replace("<NUL>", "\\0").replace("<LONE>", "\\ud800") for a in sys.argv[1:]]
from hamdist.cli import main
main()
"""
# The same for many, each a fork of a process that has imported what a run needs (as it has ended a
# wrong one); NUMBER.err is what each writes. Prints the exit codes.
COMMANDS = """
import json, os, sys
from hamdist.cli import app, main
from typer.testing import CliRunner
CliRunner().invoke(app, ["run", "tiny.yaml", "--resume", "nothing"])
codes = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    out = os.open(f"{sys.argv[2]}/{number}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(out, 2)
    sys.argv[1:] = [a.replace("<NUL>", "\\0").replace("<LONE>", "\\ud800") for a in arguments]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    sys.stderr.flush()
    os._exit(code)  # (taking torch down takes longer than all before)
print(json.dumps(codes))
"""
FILES = {
    "tiny.yaml": TINY,
    "models_here.py": MODELS,
    "file": "no folder",
    "twice.yaml": TINY + "level: local\n",
    "empty.yaml": "",
    "true.yaml": TINY.replace("steps: 6", "steps: true"),
    "time.yaml": TINY.replace("steps: 6", "steps: 1:30"),
    "nul.yaml": TINY + 'snapshots: {path: "a\\0b"}\n',
    "lone.yaml": TINY + 'name: "a\\ud800b"\n',
}
CASES = [  # arguments; exit code; what the line of error says
    (["tiny.yaml", "--seed", "9" * 23], 2, "seed: .*less than or equal"),
    (["tiny.yaml", "--steps", "1" + "0" * 400], 2, "steps: .*less than or equal"),
    (["tiny.yaml", "--set", "model.width=1000000000"], 2, "model.width 1,000,000,000.*this host"),
    (["tiny.yaml", "--set", "stream.batch=1000000000"], 2, "stream.batch 1,000,000,000.*this host"),
    (["tiny.yaml", "--set", "model.depth=10000000"], 2, "model.depth 10,000,000.*this host"),
    (["nul.yaml"], 2, "'path' has a NUL character"),
    (["tiny.yaml", "--out", "a<NUL>b"], 2, "Invalid value for '--out': .*null byte"),
    (["tiny.yaml", "--resume", "a<NUL>b"], 1, r"'a\\x00b': a path has no NUL"),
    (["tiny.yaml", "--weights", "a<NUL>b"], 2, "Invalid value for '--weights': .*null byte"),
    (["tiny.yaml", "--model", "a<NUL>b.py:make"], 2, r"--model .*a\\x00b"),
    (["a<NUL>b.yaml"], 2, r"a\\x00b"),
    (["tiny.yaml", "--out", "a<LONE>b"], 2, "Invalid value for '--out': "),
    (["lone.yaml"], 2, r"lone.yaml, line 7: 'a\\ud800b' has a lone"),
    (["twice.yaml"], 2, "line 7: 'level' is given twice"),
    (["empty.yaml"], 2, "empty.yaml: is empty"),
    (["true.yaml"], 2, "steps: give a number, not true or false"),
    (["time.yaml"], 2, "steps: .*received '1:30'"),
    (["tiny.yaml", "--set", "engine.actors=2"], 2, "'actors' is 2 with kind 'inprocess'"),
    (["tiny.yaml", "--model", "models_here.py:without"], 2, "the model has no weights"),
    (["tiny.yaml", "--model", "models_here.py:lock"], 2, "the model's 1.guard is a lock"),
    (["tiny.yaml", "--model", "models_here.py:generator"], 2, "model's 1.guard is a generator"),
    (["tiny.yaml", "--model", "models_here.py:meta"], 2, "'weight' lies on the meta device"),
    (["tiny.yaml", "--model", "models_here.py:leaves"], 2, r"leaves\(\) failed: SystemExit: 7"),
    (["tiny.yaml", "--level", "backprob"], 2, "level: .*did you mean 'backprop'"),
    (["tiny.yaml", "--snapshots", "file"], 1, "file: cannot be read: Not a directory"),
    (["tiny.yaml", "--resume", "damaged", "--steps", "20"], 1, "random generator"),
]


def start(folder, *arguments, python=()):
    """`hamdist ARGUMENTS` in `folder`, as a process."""
    return subprocess.Popen(
        [sys.executable, *python, "-c", COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )


def write_damaged_snapshots(folder):
    """Snapshots of a run whose random generators' states are random bytes, of right checksums."""
    path = folder / "damaged"
    kept = {"snapshots": {"path": str(path), "every": 3}}
    settings = read_settings(TINY, "here", [kept])
    run_level(settings.for_level(settings.level))
    for manifest_file in path.glob("*/manifest.json"):
        values = json.loads(manifest_file.read_text())
        values.pop("sha256")
        for part in values["parts"].values():
            file = manifest_file.with_name(part["file"])
            with safe_open(file, "pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                metadata = stored.metadata()
            for key, tensor in tensors.items():
                if tensor.dtype == torch.uint8:
                    tensors[key] = torch.randint(256, tensor.shape, dtype=torch.uint8)
            save_file(tensors, file, metadata)
            data = file.read_bytes()
            part.update(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        manifest_file.write_bytes(Manifest.model_validate(values).dumped())


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What each case has ended with: exit code, standard error; and the folder before and after."""
    folder = tmp_path_factory.mktemp("here")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    write_damaged_snapshots(folder)
    before = contents(folder)

    errors = tmp_path_factory.mktemp("errors")
    arguments = json.dumps([["run", *case[0]] for case in CASES])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, arguments, str(errors)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert not done.returncode, done.stderr
    texts = [(errors / f"{n}.err").read_text(errors="backslashreplace") for n in range(len(CASES))]
    results = list(zip(json.loads(done.stdout), texts, strict=True))
    return results, before, contents(folder)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(c[0])[:40] for c in CASES])
def test_one_line_of_error(ended, number):
    code, errors = ended[0][number]
    _, expected, words = CASES[number]
    lines = [line for line in errors.splitlines() if re.match("Error: |│ Invalid value", line)]
    assert len(lines) == 1, errors
    assert re.search(words, lines[0]), errors
    assert code == expected, errors
    assert "Traceback" not in errors
    if lines[0].startswith("Error"):  # (typer draws a box around its own)
        others = [line for line in errors.splitlines() if line not in lines]
        others = [line for line in others if not re.match("Results go to|results/|Note: ", line)]
        assert all(line.startswith("Warning: ") for line in others), errors


def test_nothing_is_left_behind(ended):
    _, before, after = ended
    assert set(after) - set(before) <= {"results"}  # (an empty folder, in which those of runs were)
    assert set(before) <= set(after)


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    """What a file system takes is taken; what shows it, shows its bytes."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    process = start(tmp_path, "run", "tiny.yaml", "--out", b"a\xffb")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / os.fsdecode(b"a\xffb") / "summary.json").read_text())


@pytest.mark.parametrize("imported", ["psutil", "torch._C", None])
def test_ctrl_c_while_it_starts(tmp_path, imported):
    """SIGINT as soon as a module has been imported, or (None) as the first line is shown."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = () if imported is None else ("-X", "importtime")
    process = start(tmp_path, "run", "tiny.yaml", "--steps", "100000000", python=options)
    shown = []
    for line in process.stderr:
        shown.append(line)
        if line.startswith("Results go to") or (imported and line.split()[-1] == imported):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted" in errors


def test_a_folder_that_is_gone_is_named(tmp_path):
    """Before torch is imported, whose libraries end the process there with a reason of theirs."""
    gone = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = ["sh", "-c", gone, "sh", sys.executable, "-m", "hamdist", "run", "--out", "../out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "Error: the current folder is gone; change to another one\n"
    assert not (tmp_path / "out").exists()
