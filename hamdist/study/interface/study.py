"""`hamdist.study`, and what `hamdist study levels` does: a grid of runs, tables, a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamdist.config import parse_override
from hamdist.display.table import Table
from hamdist.errors import SettingsError
from hamdist.study.grid.run import OnRecord, StudyOutcome, check, run_study
from hamdist.study.grid.settings import Axis, StudySettings, load_study
from hamdist.study.grid.summary import SummaryLine, summary
from hamdist.study.grid.tables import save_study
from hamdist.study.shared.result_folder import RUNS, prepare_folder, results_of


@dataclass(frozen=True, slots=True)
class StudyResult:
    """The outcomes of a study, its tables by title, and the folder of its files."""

    settings: StudySettings
    outcomes: Sequence[StudyOutcome]
    tables: Mapping[str, Table]
    folder: Path

    @property
    def lines(self) -> list[SummaryLine]:
        """Return the outcomes as numbers: means over seeds, gaps, choices."""
        return summary(self.outcomes, self.settings.goal)

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{name}</h4>{t._repr_html_()}" for name, t in self.tables.items())


def study(
    settings: str | Path,
    axis: str | None = None,
    *,
    out: str | Path | None = None,
    chosen: bool = False,
    workers: int | None = None,
    changes: Mapping[str, Any] | Sequence[str] = (),
    on_record: OnRecord | None = None,
    command: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> StudyResult:
    """Run a study: every side tuned on a validation part, then run with all seeds.

        found = hamdist.study("fashion-1", out="results/levels", workers=2)
        found.tables, found.lines

    Args:
        settings: a study's YAML file, or the name of a shipped one.
        axis: along which the report draws it (`depth`, `smoothness`, `batch`); None: by side.
        out: the folder of its runs and its report (None: results/NAME); a study that was ended
            goes on there.
        chosen: tune nothing: take what the file names as `best`.
        workers: runs at a time; None: one per core.
        changes: fields of the study, laid over its file; or texts such as `seeds=5`.
        on_record: called for each run that has ended.
        command: what the report says of its origin.
        say: called with a line about the folder.

    Raises:
        HamdistError: of the settings, before anything runs; of a run.
    """
    over = [changes] if isinstance(changes, Mapping) else [*map(parse_override, changes)]
    plan = load_study(str(settings), [*over, *([] if workers is None else [{"workers": workers}])])
    if axis is not None and axis not in [a.value for a in Axis]:
        raise SettingsError(f"axis {axis!r}: give {', '.join(a.value for a in Axis)}, or None")
    along = None if axis is None else Axis(axis)
    if along is not None and len(plan.axes.of(along)) < 2:
        raise SettingsError(
            f"axes.{along.value}: a study of it needs several values "
            f"(received {list(plan.axes.of(along))}); `hamdist study levels` needs none"
        )
    check(plan, chosen=chosen)
    folder = results_of(plan.name) if out is None else Path(out)
    prepare_folder(folder)
    say(f"{plan.name}: runs are kept in {folder / RUNS}; start it again to go on there")
    outcomes = run_study(plan, folder, chosen=chosen, on_record=on_record)
    origin = command or f"hamdist.study({str(settings)!r}, {axis!r}, out={str(folder)!r})"
    tables = save_study(folder, plan, outcomes, command=origin, first=along)
    return StudyResult(plan, outcomes, tables, folder)
