"""What commands print, and where: one JSON document with --json, results and errors with -q, phases
with -v; `hamdist init`, `hamdist schema`. Oracles: files of the same run, the recipe's settings."""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.cli.commands import OUTPUT_OPTIONS, with_output
from hamdist.config import Settings, read_settings, template
from hamdist.errors import HamdistWarning
from hamdist.study.shared.recipes import load_settings, recipes

TINY = """
name: tiny
steps: 12
dtype: float32
model: {kind: residual-mlp, width: 8, depth: 2}
stream: {batch: 4}
partition: {delays: auto}
engine: {kind: inprocess}
metrics: {window: 4}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_version_has_one_source():
    assert command("--version").stdout == f"hamdist {hamdist.__version__}\n"
    try:
        installed = metadata.version("hamdist")
    except metadata.PackageNotFoundError:
        pytest.skip("hamdist is on the path, not installed")
    assert installed == hamdist.__version__


def test_a_run_prints_one_json_document(folder):
    done = command("run", "tiny.yaml", "--out", "a", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    kept = json.loads((folder / "a" / "summary.json").read_text())
    assert found == {**kept, "out": "a"}
    assert "Results go to a" in done.stderr


def test_a_comparison_prints_one_json_document(folder):
    done = command("compare", "tiny.yaml", "--levels", "trace", "--out", "c", "--json", "-q")
    assert done.exit_code == 0, done.output
    kept = json.loads((folder / "c" / "summary.json").read_text())
    assert json.loads(done.stdout) == {**kept, "out": "c"}


def test_an_error_is_a_json_document_too():
    done = command("run", "nowhere.yaml", "--json")
    assert done.exit_code == 2
    assert f"Error: {json.loads(done.stdout)['error']}" in done.stderr.replace("\n", " ")


def test_recipes_and_differences_as_json(folder):
    found = json.loads(command("recipes", "--json").stdout)["recipes"]
    assert {one["name"]: one["description"] for one in found} == recipes()
    for seed in ("0", "1"):
        arguments = ("run", "tiny.yaml", "--set", "engine.digests=true", "--seed", seed)
        assert command(*arguments, "--out", f"s{seed}", "-q").exit_code == 0
    assert json.loads(command("diff", "s0", "s0", "--json").stdout)["equal"]
    parted = command("diff", "s0", "s1", "--json")
    assert parted.exit_code == 1
    assert not json.loads(parted.stdout)["equal"]


def test_quiet_says_results_and_errors_alone():
    loud, quiet = (command("run", "tiny.yaml", "--out", "q", *o) for o in ((), ("-q",)))
    assert "Results go to" in loud.stderr
    assert all(line.startswith("Warning: ") for line in quiet.stderr.splitlines())
    assert "Written to q-2" in quiet.stdout
    wrong = command("run", "nowhere.yaml", "-q")
    assert wrong.stderr.startswith("Error: ")


def test_verbose_and_quiet_exclude_each_other():
    done = command("run", "tiny.yaml", "-v", "-q")
    assert done.exit_code == 2
    assert "give one of them" in done.stderr


def test_quiet_keeps_warnings(folder):
    (folder / "warns.py").write_text(
        "import warnings\ndef data(seed):\n"
        "    from hamdist.errors import HamdistWarning\n"
        "    warnings.warn('mind this', HamdistWarning)\n"
        "    import hamdist, torch\n"
        "    return hamdist.streams.digits(batch=4, seed=seed, dtype=torch.float32).train\n"
    )
    done = command("run", "tiny.yaml", "--stream", "warns.py:data", "-q")
    assert done.exit_code == 0, done.output
    assert "Warning: mind this" in done.stderr
    # settings of the stream would change nothing beside a stream of one's own
    wrong = ["--set", "stream.pace.period=1"]
    done = command("run", "tiny.yaml", "--stream", "warns.py:data", *wrong)
    assert done.exit_code == 2
    assert "'stream.pace.period=1' beside --stream 'warns.py:data'" in " ".join(done.stderr.split())
    for text in ("model.width=4", "model={width: 4}"):
        done = command("run", "tiny.yaml", "--model", "warns.py:net", "--set", text)
        assert done.exit_code == 2
        assert f"'{text}' beside --model 'warns.py:net'" in " ".join(done.stderr.split())


def test_colours_of_a_log_are_no_screen(monkeypatch):
    """FORCE_COLOR, as hosted test machines set it, makes no live display."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[?25l" not in command("run", "tiny.yaml").stderr  # (which hides the cursor)
    done = command("verify", "--only", "digraphs")
    assert "\x1b[?25l" not in done.output


def test_verbose_tells_the_phases(folder):
    done = command("run", "tiny.yaml", "--out", "v", "-v")
    told = [line for line in done.stderr.splitlines() if "starting (" in line]
    events = (folder / "v" / "events.jsonl").read_text().splitlines()
    phases = [event for event in map(json.loads, events) if event["event"] == "phase"]
    assert len(told) == len(phases) > 1
    assert "starting (" not in command("run", "tiny.yaml", "--out", "w").stderr


def test_every_command_has_the_same_options():
    for name in ("init", "run", "compare", "diff", "doctor", "runs", "launch", "export"):
        text = command(name, "--help").stdout
        assert all(f"--{word}" in text for word in ("json", "quiet", "verbose")), name
    assert set(OUTPUT_OPTIONS) == {"verbose", "quiet", "as_json"}


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_a_settings_file_to_begin_with_reads_as_its_recipe(recipe):
    assert command("init", "mine.yaml", "--recipe", recipe).exit_code == 0
    with open("mine.yaml", encoding="utf-8") as file:
        found = read_settings(file.read(), "mine.yaml")
    settings = load_settings(recipe)
    assert found == settings
    assert found.model_fields_set == settings.model_fields_set
    again = command("init", "mine.yaml")
    assert again.exit_code == 2
    assert "is there already" in again.stderr


def test_the_comments_of_a_settings_file_are_its_defaults():
    """With all marks of comments taken off it has every setting, each with its default."""
    lines = template(load_settings("digits"), "digits").split("\n\n", 1)[1].splitlines()
    plain = [
        line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in lines
    ]
    everything = read_settings("\n".join(plain), "plain")
    assert everything == load_settings("digits")
    assert everything.model_fields_set == set(Settings.model_fields)
    assert everything.engine.model_fields_set == set(type(everything.engine).model_fields)


def test_the_schema_knows_all_settings():
    schema = json.loads(command("schema").stdout)
    assert schema == json.loads(command("schema", "--json").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["properties"]["seed"]["minimum"] == 0
    assert "trace" in schema["$defs"]["Level"]["enum"]


def test_settings_of_a_result_are_those_that_were_set(folder):
    """What reads settings.yaml has the same settings as with all of them, and knows as before which
    were set, which some choices ask (dtype, learning.lr)."""
    assert command("run", "tiny.yaml", "--level", "trace", "--out", "s", "-q").exit_code == 0
    short, whole = (
        read_settings((folder / "s" / name).read_text(), name)
        for name in ("settings.yaml", "settings-all.yaml")
    )
    assert short == whole
    assert whole.model_fields_set == set(Settings.model_fields)
    begun = read_settings(TINY, "tiny.yaml")
    assert short.model_fields_set == {*begun.model_fields_set, "level"}
    assert short.learning.model_fields_set == set()
    assert short.partition.delays != "auto"  # what was chosen
    text = (folder / "s" / "settings.yaml").read_text()
    assert len(text) < len((folder / "s" / "settings-all.yaml").read_text()) / 4
    again = command("run", "s/settings.yaml", "--out", "t", "-q")
    assert again.exit_code == 0, again.output
    model = "model.safetensors"
    assert (folder / "t" / model).read_bytes() == (folder / "s" / model).read_bytes()


def test_every_command_shows_warnings_as_its_own():
    def careless() -> None:
        warnings.warn("the links are slow", HamdistWarning, stacklevel=1)

    one = typer.Typer()
    one.command()(with_output(careless))
    shown = CliRunner().invoke(one, [])
    assert shown.output == "Warning: the links are slow\n"


def test_every_command_has_the_options_of_output():
    def options(commands):
        for name, one in commands.items():
            if hasattr(one, "commands"):
                yield from options(one.commands)
            else:
                yield name, {"-v", "-q", "--json"} - {o for p in one.params for o in p.opts}

    group: Any = typer.main.get_command(app)
    lacking = dict(options(group.commands))
    assert len(lacking) > 25
    assert {name: few for name, few in lacking.items() if few} == {}
    own = {option for p in group.params for option in p.opts}
    assert {"--version", "--install-completion"} <= own
