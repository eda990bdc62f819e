"""`hamdist init`, `schema`, `recipes`, `rules`: what settings can say, and files to begin with."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from rich.table import Table
from rich.text import Text

from hamdist.cli.console import OUTPUT, console, report, say
from hamdist.cli.options import DEFAULT_SETTINGS, argument, option
from hamdist.config import json_schema, read_yaml, template
from hamdist.errors import SettingsError


def init(
    file: Annotated[Path, argument("Where to write it.", "[FILE]")] = Path("settings.yaml"),
    recipe: Annotated[str, option("Whose values it begins with.", "NAME")] = DEFAULT_SETTINGS,
) -> None:
    """Write a settings file with a comment for every setting."""
    from hamdist.study.shared.recipes import load_settings
    from hamdist.study.shared.result_folder import write_file

    text = template(load_settings(recipe), recipe)
    if file.exists():
        raise SettingsError(f"'{file}' is there already: name another file")
    write_file(file, text)
    report(file=str(file))
    say(f"Written to {file}. Next: hamdist run {file}")


def schema() -> None:
    """Print the JSON schema of the settings, for editors that complete and check YAML."""
    record = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    record |= json_schema()
    report(**record)
    say(json.dumps(record, indent=2))
    OUTPUT.alone = True


def recipes() -> None:
    """List the shipped recipes, and which of them need files that hamdist does not bring."""
    from hamdist.study.shared.recipes import needed_files
    from hamdist.study.shared.recipes import recipes as shipped

    table = Table("recipe", "what it is", "needs", box=None, pad_edge=False)
    rows = [(name, description, needed_files(name)) for name, description in shipped().items()]
    report(recipes=[dict(zip(("name", "description", "needs"), row, strict=True)) for row in rows])
    for name, *cells in rows:
        table.add_row(name, *map(Text, cells))
    console().print(table)


def rules() -> None:
    """List the built-in rules of learning: what crosses an edge, what is kept, locality, cost."""
    text = (files("hamdist") / "dynamics" / "rules" / "facts.yaml").read_text("utf-8")
    facts: dict[str, dict[str, str]] = read_yaml(text, "facts.yaml")
    OUTPUT.document = [{"name": name, **by_name} for name, by_name in facts.items()]
    for name, by_name in facts.items():
        console().print(Text(name, style="bold"))
        for fact, text in by_name.items():
            say(f"  {fact:<8} {text}")
