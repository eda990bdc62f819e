"""Options that several commands share, and the settings that follow from them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hamdist.cli.console import OUTPUT
from hamdist.config import EngineKind, Level, Settings, did_you_mean, parse_override
from hamdist.errors import SettingsError

if TYPE_CHECKING:
    from hamdist.models.build import ModelFactory
    from hamdist.study.run.own_data import OwnFunctions


def option(words: str, metavar: str | None = None, *, shown: str | bool = True, **more: Any) -> Any:
    """Return an option that is called as its parameter is (`steps_ratio`, `set_`: --steps-ratio,
    --set).

    Args:
        words: its help; metavar: the name of its value; shown: its default in words.
        more: as of `typer.Option`.
    """
    return typer.Option(metavar=metavar, help=words, show_default=shown, **more)


def argument(words: str, metavar: str, *, shown: str | bool = True) -> Any:
    """Return an argument, of the same words as an `option`."""
    return typer.Argument(metavar=metavar, help=words, show_default=shown)


SettingsArgument = Annotated[
    str, argument("A YAML file, or a recipe (`hamdist recipes`).", "SETTINGS")
]
# The recipe of a command without arguments: it learns from what scikit-learn ships.
DEFAULT_SETTINGS = "digits"
OutOption = Annotated[Path | None, option("Folder for the result's files.")]
OverwriteOption = Annotated[bool, option("Write into the folder, though it is not empty.")]
JsonFileOption = Annotated[
    Path | None, option("Write the result there; -: print it alone.", "FILE")
]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run; a command takes those it names: `Annotated[RunOptions, "level engine"]`."""

    level: Annotated[
        str | None,
        option(
            f"Locality: {', '.join(v.value for v in Level)}; or your own, FILE.py:NAME.", "LEVEL"
        ),
    ] = None
    engine: Annotated[EngineKind | None, option("One process, or Ray actors.")] = None
    seed: Annotated[int | None, option("The (first) seed.", min=0)] = None
    steps: Annotated[int | None, option("Samples of the stream.", min=1)] = None
    set_: Annotated[
        list[str] | None, option("Change a setting, e.g. stream.batch=8.", "KEY=VALUE")
    ] = None
    model: Annotated[
        str | None, option("Makes the model (or PACKAGE.MODULE:FUNCTION).", "FILE.py:FUNCTION")
    ] = None
    stream: Annotated[
        str | None,
        option("Makes the stream; or the stream and what is held out.", "FILE.py:FUNCTION"),
    ] = None
    stabilise: Annotated[
        bool | None, option("Normed inputs and scaled residuals for the model's layers.")
    ] = None

    def changes(self) -> dict[str, Any]:
        """Return the changes of the settings by those options that were given."""
        level: dict[str, Any] = {"level": self.level}
        if ":" in (self.level or ""):
            from hamdist.runtime.train.prepare import level_fields

            level = level_fields("--level", str(self.level))
        return without_none(
            {
                **level,
                "engine": None if self.engine is None else {"kind": self.engine.value},
                "seed": self.seed,
                "steps": self.steps,
                "model": None if self.stabilise is None else {"stabilise": self.stabilise},
            }
        )

    def load(self, source: str, **others: Any) -> Settings:
        """Load the recipe or file `source` with `--set`, and then the other options, laid over it.

        If it asks for portable bits, this process will compute them. Raises SettingsError if there
        is no such source, or a value in it is wrong.
        """
        from hamdist.runtime.process.portable import pin
        from hamdist.study.shared.recipes import load_settings

        overrides = [parse_override(text) for text in self.set_ or []]
        settings = load_settings(source, [*overrides, {**self.changes(), **others}])
        pin(settings.engine)
        return settings

    def functions(self, settings: Settings, plain: str | None = None) -> OwnFunctions:
        """Return the functions that `--model` and `--stream` name, and that of `--baseline-model`.

        Raises SettingsError if there is none such.
        """
        for section, function, used in (
            ("model", self.model, "stabilise"),
            ("stream", self.stream, "names"),
        ):
            if function is not None:
                self._check_beside(section, function, used)
        from hamdist.study.run.own_data import load_functions

        return load_functions(settings, self.model, self.stream, plain)

    def factory(self) -> ModelFactory | None:
        """Return the function that `--model` names. Raises SettingsError if there is none."""
        return self.functions(Settings()).model

    def _check_beside(self, section: str, function: str, used: str) -> None:
        """Raise SettingsError for a setting of a section whose thing a function makes."""
        for text in self.set_ or []:
            fields = parse_override(text).get(section)
            if isinstance(fields, dict) and set(fields) - {used}:
                raise SettingsError(
                    f"--set {text!r} beside --{section} {function!r}: the {section} is your "
                    f"function's alone (of the section {section} `{used}` counts); change it there"
                )


def names(text: str | None) -> list[str]:
    """Return the names in a list `a,b`; none without a list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def level_names(text: str) -> list[Level | str]:
    """Return the levels in a list `a,b`, those of one's own as they are named.

    Raises SettingsError for an unknown one, or none.
    """
    known = [level.value for level in Level]
    levels = names(text)
    wrong = [name for name in levels if name not in known and ":" not in name]
    if wrong or not levels:
        raise SettingsError(
            f"--levels {text!r}: {', '.join(wrong) or 'nothing'} is no level; "
            f"levels: {', '.join(known)}{did_you_mean(wrong[0], known) if wrong else ''}"
        )
    return [name if ":" in name else Level(name) for name in levels]


def without_none(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options, by name, that were given."""
    return {key: value for key, value in options.items() if value is not None}


STANDARD_OUTPUT = Path("-")


def command_line() -> str:
    r"""Return the command as it was typed, for the files of its results.

    Bytes of a path that is not UTF-8 are written as \udcXX.
    """
    typed = shlex.join(["hamdist", *sys.argv[1:]])
    return typed.encode("utf-8", "backslashreplace").decode()


def json_file(path: Path | None) -> Path | None:
    """Return the file of `--json`; none for `-`, which has the command print the document alone.

    Raises SettingsError if it cannot be written, before anything is computed.
    """
    if path == STANDARD_OUTPUT:
        OUTPUT.as_json = True
        return None
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise SettingsError(f"--json '{path}': cannot write there: {error.strerror}") from None
    return path
