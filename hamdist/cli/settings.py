"""`hamdist init`, `hamdist schema`: a settings file to begin with, and its JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hamdist.cli.console import report, say
from hamdist.cli.options import DEFAULT_SETTINGS
from hamdist.config import json_schema, template
from hamdist.errors import SettingsError


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write it.")] = Path(
        "settings.yaml"
    ),
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME", help="Whose values it begins with.")
    ] = DEFAULT_SETTINGS,
) -> None:
    """Write a settings file with a comment for every setting."""
    from hamdist.study.shared.recipes import load_settings

    text = template(load_settings(recipe), recipe)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise SettingsError(f"'{file}' is there already: name another file") from None
    except OSError as error:
        raise SettingsError(f"'{file}': cannot write there: {error.strerror}") from None
    report(file=str(file))
    say(f"Written to {file}. Next: hamdist run {file}")


def schema() -> None:
    """Print the JSON schema of the settings, for editors that complete and check YAML."""
    record = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    record |= json_schema()
    report(**record)
    say(json.dumps(record, indent=2))
