"""`hamdist.verify`, and what `hamdist verify` does: checks against oracles, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from hamdist.display.table import Table
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import SettingsError
from hamdist.models.build import ModelFactory, load_factory
from hamdist.study.verify.runner import Topic, VerifyRow, run, topics
from hamdist.study.verify.topics.own_model import VerifiedModel, parse_shape
from hamdist.study.verify.topics.rule import VerifiedLevel, VerifiedRule

ROWS = 4  # of the input of a model of one's own


@dataclass(slots=True, repr=False)
class Verification:
    """The checks that have run; a notebook shows them as a table."""

    rows: list[VerifyRow] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return True if there are checks, and none failed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def table(self) -> Table:
        """Return the checks as text."""
        cells = [
            ["pass" if row.passed else "FAIL", row.topic, row.name, row.oracle,
             f"{row.difference:.2g}", f"{row.bound:.2g}", f"{row.seconds:.1f} s"]
            for row in self.rows
        ]  # fmt: skip
        notes = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        return Table(
            ["", "topic", "statement", "oracle", "difference", "bound", "time"], cells, notes
        )

    def __repr__(self) -> str:
        failed = sum(not row.passed for row in self.rows)
        return f"Verification({len(self.rows) - failed} passed, {failed} failed)"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def chosen_topics(
    model: nn.Module | ModelFactory | str | None,
    *,
    only: Sequence[str] = (),
    golden: Path | None = None,
    rule: str | None = None,
    level: str | None = None,
    input_shape: str | Sequence[int] | None = None,
    classes: int | None = None,
    batch: int | None = None,
    blocks: int | None = None,
    option: Callable[[str], str] = lambda name: name,
) -> list[Topic]:
    """Return the topics of a call of `verify`. Raises SettingsError for what has no effect.

    Args:
        option: the text of an argument's name in errors.
        model, only, golden, rule, level, input_shape, classes, batch, blocks: as of `verify`.
    """
    of_model = {"input_shape": input_shape, "classes": classes, "batch": batch, "blocks": blocks}
    extra = next((option(name) for name, value in of_model.items() if value is not None), None)
    of_topics = {"golden": golden, "only": only or None}
    chooses = next((option(name) for name, value in of_topics.items() if value is not None), None)
    alone = [(kind, name) for kind, name in (("rule", rule), ("level", level)) if name is not None]
    if alone and (model is not None or chooses or alone[1:]):
        kind, name = alone[0]
        raise SettingsError(f"{option(kind)} {name!r} is verified alone: leave the others out")
    if model is None and extra:
        raise SettingsError(f"{extra} belongs to {option('model')}: give both")
    if alone:
        kind, name = alone[0]
        return _alone(kind, name, VerifiedRule(name) if kind == "rule" else VerifiedLevel(name))
    if model is None:
        names = [name.strip() for text in only for name in text.split(",") if name.strip()]
        return topics(names, golden)
    name = model if isinstance(model, str) else type(model).__name__
    if chooses:
        raise SettingsError(
            f"{chooses} chooses among the checks of hamdist, but {option('model')} {name!r} is "
            "verified alone: give one of them"
        )
    if input_shape is None:
        raise SettingsError(
            f"{option('model')} {name!r}: say what it takes as well, without the batch: "
            f"{option('input_shape')} 3,28,28"
        )
    shape = parse_shape(input_shape) if isinstance(input_shape, str) else tuple(input_shape)
    factory: ModelFactory = load_factory(model) if isinstance(model, str) else _factory(model)
    subject = VerifiedModel(factory, name, shape, classes, batch or ROWS, blocks)
    return _alone("model", name, subject)


def _alone(kind: str, name: str, verified: VerifiedModel | VerifiedRule) -> list[Topic]:
    return [Topic(kind, f"the {kind} {name}", lambda full: verified.checks(), answers=True)]  # noqa: ARG005


def _factory(model: nn.Module | ModelFactory) -> ModelFactory:
    return (lambda: copied(model)) if isinstance(model, nn.Module) else model


def verify(
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    only: Sequence[str] = (),
    full: bool = False,
    golden: str | Path | None = None,
    rule: str | None = None,
    level: str | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    batch: int | None = None,
    blocks: int | None = None,
    on_row: Callable[[VerifyRow], object] | None = None,
) -> Verification:
    """Return the checks of the papers' statements, or of a model, against oracles of their own.

        assert hamdist.verify(model, input_shape=(3, 28, 28), classes=10).passed

    Args:
        model: verified alone: a module, or what makes one; None: hamdist itself.
        only: topics (`hamdist verify --help`); none: all.
        full: the papers' sizes, which take half an hour.
        golden: a folder of golden files, instead of those that are shipped.
        rule: `file.py:name` of a rule of learning, which is verified alone; level: of a level.
        input_shape: of the model, without the batch.
        classes: the model's targets are classes; None: real values.
        batch: rows of the model's input; None: 4.
        blocks: into how many the model is cut; None: as the level does.
        on_row: called with each check that has run.

    Raises:
        SettingsError: of an argument. A check that fails is a row.
    """
    folder = None if golden is None else Path(golden)
    chosen = chosen_topics(
        model, only=only, golden=folder, rule=rule, level=level, input_shape=input_shape,
        classes=classes, batch=batch, blocks=blocks,
    )  # fmt: skip
    verification = Verification()
    for row in run(chosen, full, lambda *_: None):
        verification.rows.append(row)
        if on_row is not None:
            on_row(row)
    return verification
