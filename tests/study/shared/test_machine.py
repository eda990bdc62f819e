"""Processes of a study beside the user's program, whatever that is."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from hamdist.study.shared.machine import Processes
with Processes(1) as pool:
    print(pool.submit(abs, -3).result())
"""


@pytest.mark.timeout(180)
def test_a_program_needs_no_guard_and_no_file(tmp_path):
    """Neither `if __name__ == "__main__"`, nor a script that could be run again."""
    (tmp_path / "script.py").write_text(PROGRAM)
    started = {}
    for where, text in (("script.py", ""), ("-", PROGRAM)):
        started[where] = subprocess.Popen(
            [sys.executable, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            text=True,
        )
        started[where].stdin.write(text)
        started[where].stdin.close()
    for process in started.values():
        process.wait(150)
    assert [p.stdout.read() for p in started.values()] == ["3\n", "3\n"]
