"""Options that several commands share, and the settings that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hamdist.config import EngineKind, Level, Settings, did_you_mean, parse_override
from hamdist.errors import SettingsError

SettingsArgument = Annotated[
    str, typer.Argument(metavar="SETTINGS", help="A YAML file, or a recipe (`hamdist recipes`).")
]
# The recipe of a command without arguments: it learns from what scikit-learn ships.
DEFAULT_SETTINGS = "digits"
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. stream.batch=8."),
]
EngineOption = Annotated[
    EngineKind | None, typer.Option("--engine", help="One process, or Ray actors.")
]
LevelOption = Annotated[
    str | None,
    typer.Option(
        "--level",
        metavar="LEVEL",
        help=f"Locality: {', '.join(one.value for one in Level)}.",
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="The (first) seed.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Samples of the stream.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for the result's files.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Write into the folder, though it is not empty.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="Makes the model (or PACKAGE.MODULE:FUNCTION).",
    ),
]
StabiliseOption = Annotated[
    bool | None,
    typer.Option("--stabilise", help="Normed inputs and scaled residuals for the model's layers."),
]
StreamOption = Annotated[
    str | None,
    typer.Option(
        "--stream",
        metavar="FILE.py:FUNCTION",
        help="Makes the stream; or the stream and what is held out.",
    ),
]


JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result there; -: print it alone."),
]


def names(text: str | None) -> list[str]:
    """Return the names in a list `a,b`; none without a list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def level_names(text: str) -> list[Level]:
    """Return the levels in a list `a,b`. Raises SettingsError for an unknown one, or none."""
    known = [level.value for level in Level]
    levels = names(text)
    wrong = [name for name in levels if name not in known]
    if wrong or not levels:
        raise SettingsError(
            f"--levels {text!r}: {', '.join(wrong) or 'nothing'} is no level; "
            f"levels: {', '.join(known)}{did_you_mean(wrong[0], known) if wrong else ''}"
        )
    return [Level(name) for name in levels]


def changes(
    *,
    level: str | None = None,
    engine: EngineKind | None = None,
    seed: int | None = None,
    steps: int | None = None,
    stabilise: bool | None = None,
) -> dict[str, Any]:
    """Return the changes of the settings by those options that were given."""
    return given(
        {
            "level": level,
            "engine": None if engine is None else {"kind": engine.value},
            "seed": seed,
            "steps": steps,
            "model": None if stabilise is None else {"stabilise": stabilise},
        }
    )


def load(source: str, set_: list[str] | None, options: dict[str, Any]) -> Settings:
    """Load the recipe or file `source`, with `--set` and then `options` laid over it.

    If it asks for portable bits, this process will compute them. Raises SettingsError if there is
    no such source, or a value in it is wrong.
    """
    from hamdist.runtime.process.portable import pin
    from hamdist.study.shared.recipes import load_settings

    overrides = [parse_override(text) for text in set_ or []]
    settings = load_settings(source, [*overrides, options])
    pin(settings.engine)
    return settings


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options, by name, that were given."""
    return {key: value for key, value in options.items() if value is not None}
