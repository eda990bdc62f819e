"""README and the site's pages against the program: code blocks run, names and messages are there.

Oracles: the program itself. A block that cannot run here says why in a comment above it,
`<!-- not run: why -->`; commands of hamdist are then parsed all the same.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from fashion_files import write_fashion
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.config import Section, checked, read_settings, read_yaml
from hamdist.launch.cluster_file import ClusterSettings
from hamdist.study.grid.settings import read_study
from hamdist.study.simulate.host_plan import HostPlanSettings

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^>]+?) -->\s*)?^```(?P<kind>\w*)[^\n]*\n"
                   r"(?P<text>.*?)^```$", re.S | re.M)  # fmt: skip
FEW = {"run": ["--steps", "2"], "compare": ["--steps", "2", "--seeds", "1"]}
NEEDS_FILES = {"fashion-mnist", "resnet", "vit"}
OUTSIDE = {"tail"}  # programs of the system that pages call


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    line: int
    kind: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("text")), m["kind"], m["text"], m["why"])
        for m in FENCE.finditer(text)
    ]


def pages(*kinds: str) -> list[Path]:
    """README and the pages that have blocks of these kinds."""
    every = [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))]
    return [page for page in every if any(block.kind in kinds for block in blocks(page))]


def runnable() -> list[Any]:
    """Pages with Python or bash, the site's as slow ones; those that start Ray are marked."""
    return [
        pytest.param(
            page,
            marks=[pytest.mark.slow] * (page.name != "README.md")
            + [pytest.mark.ray] * ("--engine ray" in page.read_text()),
        )
        for page in pages("python", "bash")
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of bash, each as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def test_readme_is_short_and_every_page_has_a_title():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    for page in PAGES.rglob("*.md"):
        assert re.search(r"^# \S", page.read_text(), re.M), page


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", runnable(), ids=name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    write_fashion(tmp_path, train=64, held=32)
    own_file(next(one for one in blocks(ROOT / "README.md") if one.text.startswith("# nets.py")))
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        for words in commands(block.text) if block.kind == "bash" else ():
            run_words(words, block)
        if block.kind in ("python", "yaml"):
            own_file(block)
        if block.kind == "python" and block.why is None:
            exec(compile(block.text, str(block), "exec"), names)


def own_file(block: Block) -> None:
    """Keeps a block whose first comment is a file's name as that file."""
    first = re.match(r"# (\w+\.(?:py|yaml))\n", block.text)
    if first:
        Path(first[1]).write_text(block.text)


def run_words(words: list[str], block: Block) -> None:
    """Runs a command of hamdist with few samples; of the project's own scripts, says that they are
    there with these options."""
    program, *arguments = words[: words.index(">")] if ">" in words else words
    if program == "hamdist":
        parse(arguments, block)
        if block.why is None:
            run_hamdist(arguments, block)
    elif program.startswith("scripts/") or (program == "python" and "scripts/" in arguments[0]):
        script = ROOT / (program if program != "python" else arguments[0])
        assert script.is_file(), f"{block}: no {script}"
    elif block.why is None:
        assert program in OUTSIDE, f"{block}: {program} is not run: say why above the block"
        subprocess.run(words, check=True, capture_output=True)


def parse(arguments: list[str], block: Block) -> None:
    """The command and its options exist; values in capitals stand for others."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{block}: no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    options = {option for one in command.params for option in [*one.opts, *one.secondary_opts]}
    for word in rest:
        if word.startswith("--"):
            assert word in options, f"{block}: no option {word} of {' '.join(arguments)}"


def run_hamdist(arguments: list[str], block: Block) -> None:
    """Runs a command of hamdist with few samples; recipes in this process."""
    command, *rest = arguments
    extra = FEW.get(command, [])
    if extra and "--engine" not in rest and not any(word.endswith(".yaml") for word in rest):
        extra = [*extra, "--engine", "inprocess"]
    if extra and rest and rest[0] in NEEDS_FILES:
        extra = [*extra, "--set", "stream.path=."]
    result = CliRunner().invoke(app, [*arguments, *extra], catch_exceptions=False)
    expected = (0, 1) if command == "diff" else (0,)
    assert result.exit_code in expected, f"{block}: {' '.join(arguments)}\n{result.output}"


@pytest.mark.parametrize("page", pages("yaml"), ids=name)
def test_settings_of_pages_are_settings(page):
    for block in blocks(page):
        if block.kind != "yaml" or block.why is not None:
            continue
        raw = read_yaml(block.text, str(block))
        assert isinstance(raw, dict)
        if "sides" in raw:
            read_study(block.text, str(block))
        elif "hosts" in raw:
            checked(HostPlanSettings, raw, str(block))
        elif "jobs" in raw:
            ClusterSettings(**{**raw, "token": None})
        else:
            read_settings(block.text, str(block))


def test_every_setting_is_described():
    models: list[type[Section]] = [Section]
    for model in models:
        models += model.__subclasses__()
        for field, about in model.model_fields.items():
            assert about.description, f"{model.__name__}.{field}: say below it what it means"
    assert len(models) > 25


def test_every_public_name_is_in_the_reference():
    for page, prefix, names in (
        ("api.md", "hamdist", set(hamdist.__all__) - {"streams"}),
        ("streams.md", "hamdist.streams", set(hamdist.streams.__all__)),
    ):
        shown = re.findall(
            rf"^::: {prefix}\.(\w+)$", (PAGES / "reference" / page).read_text(), re.M
        )
        assert set(shown) == names


@cache
def texts() -> str:
    """All texts of the program, one a line; a value inside is an ellipsis."""
    lines = []
    for path in sorted(Path(hamdist.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_messages_of_the_troubleshooting_page_are_the_programs():
    page = (PAGES / "how-to" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 40
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in texts(), message


def test_paths_of_pages_are_there():
    """Paths of the repository that pages name in code."""
    for page in [ROOT / "README.md", *PAGES.rglob("*.md")]:
        for path in re.findall(r"`((?:hamdist|tests|scripts|docs|cluster-configs)/[\w./*-]+)`",
                               page.read_text("utf-8")):  # fmt: skip
            assert "NAME" in path or list(ROOT.glob(path.rstrip("/"))), f"{name(page)}: no {path}"


def test_pages_that_the_code_cites_are_there():
    code = Path(hamdist.__file__).parent
    for folder in (code / "dynamics", code / "runtime", ROOT / "tests" / "dynamics"):
        for path in folder.rglob("*.py"):
            for page in re.findall(r"\b([a-z-]+\.md)\b", path.read_text("utf-8")):
                assert list(PAGES.rglob(page)), f"{path}: no page {page}"


def test_tables_of_the_newcomers_page_name_files_that_are_there():
    page = (PAGES / "develop" / "where.md").read_text("utf-8")
    for row in re.findall(r"^\|[^|]+\|([^|]+)\|$", page, re.M):
        folder = None
        for path in re.findall(r"`([\w/-]+(?:\.py|/))`", row):
            place = ROOT / "hamdist" / path
            if not place.exists() and folder is not None:
                place = folder / path
            assert place.exists(), path
            folder = place if place.is_dir() else place.parent


def test_pages_say_what_their_links_lead_to():
    """Links inside README lead to files that are there (those of pages are mkdocs' business)."""
    for link in re.findall(
        r"(?:\]\(|src=\"|srcset=\")([^)\"#]+)", (ROOT / "README.md").read_text()
    ):
        if "://" not in link:
            assert (ROOT / link).exists(), link
