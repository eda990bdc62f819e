"""The programs of scripts/: all are linted and typed, and each defect of scripts/mutants.py has its
place in the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from mutants import MUTANTS

TREE = Path(__file__).resolve().parents[2]
PYPROJECT = (TREE / "pyproject.toml").read_text("utf-8")
STRICT = PYPROJECT.partition("[[tool.mypy.overrides]]")[2].partition("disallow")[0]


def programs():
    """Python programs without a suffix, by their first line."""
    for path in sorted((TREE / "scripts").rglob("*")):
        if path.is_file() and not path.suffix:
            with path.open("rb") as file:
                if b"python" in file.readline():
                    yield path.relative_to(TREE).as_posix()


@pytest.mark.parametrize("name", list(programs()))
def test_a_program_is_linted_and_typed(name):
    """ruff and mypy look for .py alone: the others stand in pyproject.toml, by name."""
    linted = PYPROJECT.partition("[tool.ruff]")[2].partition("\n[")[0]
    assert f'"{name}"' in linted or f'"{Path(name).parent.as_posix()}/*"' in linted
    assert f'"{name}"' in PYPROJECT.partition("[tool.mypy]")[2].partition("\n[")[0]
    assert f'"{Path(name).name}"' in STRICT


def test_modules_of_scripts_are_typed_strictly():
    for path in (TREE / "scripts").glob("*.py"):
        assert f'"{path.stem}"' in STRICT, path
    for path in (TREE / "scripts").glob("*/__init__.py"):
        assert f'"{path.parent.name}.*"' in STRICT, path


def test_the_tests_that_programs_name_are_there():
    for program in ("scripts/test", ".ci/run", "scripts/matrix.py"):
        for path in re.findall(r"\btests/[\w/.]*\w", (TREE / program).read_text("utf-8")):
            assert (TREE / path).exists(), f"{program}: no {path}"


def test_each_defect_has_its_place_and_its_tests():
    place_of = runpy.run_path(str(TREE / "scripts" / "mutate"))["place_of"]
    assert len(MUTANTS) >= 30
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        path = place_of(mutant, TREE)  # raises where the text stands nowhere, or twice
        assert mutant.text != mutant.defect
        compile(path.read_text("utf-8").replace(mutant.text, mutant.defect), path.name, "exec")
        for word in mutant.tests.split():
            assert not word.startswith("tests/") or (TREE / word).is_file(), word


def test_a_defect_without_a_place_is_an_error(tmp_path):
    place_of = runpy.run_path(str(TREE / "scripts" / "mutate"))["place_of"]
    (tmp_path / "hamdist").mkdir()
    (tmp_path / "hamdist" / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(ValueError, match="stands 2 times"):
        place_of(MUTANTS[0]._replace(text="x = 1"), tmp_path)
    with pytest.raises(ValueError, match="stands 0 times"):
        place_of(MUTANTS[0]._replace(text="y = 1"), tmp_path)
