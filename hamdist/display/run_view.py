"""The display of a running run: rich renderables for a terminal, plain lines elsewhere.

Nothing here prints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from html import escape
from statistics import fmean

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hamdist.display.table import number, percent
from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.runtime.process.startup import TITLES
from hamdist.runtime.results.result import BlockProgress, Progress

RATE_SECONDS = 5.0
LINES_AROUND_BLOCKS = 7
FEWEST_BLOCKS = 4
BAR_WIDTH = 60
SECONDS_TO_JUDGE = 1.0


class TimeLeft:
    """Time that several runs take, judged by those that have ended.

    Attributes:
        more: runs after the one that goes on.
        ended: seconds of each run that has ended.
    """

    def __init__(self, more: int = 0) -> None:
        self.more = more
        self.ended: list[float] = []

    def after(self, whole: float) -> float:
        """Return the seconds of the runs to come; `whole`: of the one that goes on, as judged."""
        return self.more * (fmean(self.ended) if self.ended else whole)


class RunView:
    """The state of one run.

    Attributes:
        batch: rows of a sample, if they are known.
        others: the time of further runs, where there are some.
    """

    def __init__(self, title: str, batch: int | None, others: TimeLeft | None = None) -> None:
        self.title = title
        self.batch = batch
        self.others = others or TimeLeft()
        self.over = False
        self._last: Progress | None = None
        self._phase = ""
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)])

    def update(self, progress: Progress) -> None:
        """Take what a run reports."""
        if progress.phase is not None:
            self._phase = f" ({TITLES.get(progress.phase, progress.phase)})"
            return
        self._last = progress
        self._recent.append((progress.seconds, progress.samples - progress.resumed))
        while len(self._recent) > 2 and self._recent[1][0] < progress.seconds - RATE_SECONDS:
            self._recent.popleft()

    @property
    def line(self) -> str:
        """Return all of it but the blocks, on one line."""
        if self._last is None:
            return f"{self.title}: starting{self._phase}"
        return f"{self.title}: " + ", ".join(self._facts(self._last))

    def _repr_html_(self) -> str:
        last = self._last
        done = 0 if last is None else last.samples
        most = None if last is None else last.steps
        if last is not None and self.over:
            done = most = max(1, last.samples)
        bar = f'value="{done}" max="{most}"' if most else ""
        return f"<div><progress {bar}></progress> {escape(self.line)}</div>"

    def __rich_console__(self, console: Console, _: ConsoleOptions) -> RenderResult:
        last = self._last
        if last is None:
            yield Text(self.line, style="bold")
            return
        parts: list[RenderableType] = [Text(self.title, style="bold")]
        if last.steps is not None:
            parts.append(_bar(last.samples, last.steps))
        parts.append(Text(" · ".join(self._facts(last))))
        if last.note:
            parts.append(Text(last.note, style="yellow"))
        if last.blocks:
            most = max(FEWEST_BLOCKS, console.height - LINES_AROUND_BLOCKS)
            parts.append(_blocks(last.blocks, most))
        yield Group(*parts)

    def _facts(self, last: Progress) -> list[str]:
        ticks = max((block.tick for block in last.blocks), default=0)
        of = f"/{last.steps}" if last.steps is not None else ""
        rate = self._samples_per_second()
        batch = last.rows / last.samples if last.rows else self.batch  # (batches may be uneven)
        in_rows = batch is not None
        speed = f"{rate * (batch or 1):,.0f} {'rows' if in_rows else 'samples'}/s"
        facts = [f"sample {last.samples}{of}", f"tick {ticks}", speed]
        facts += _metrics(last)
        if (
            not self.over
            and last.steps is not None
            and rate > 0
            and last.seconds >= SECONDS_TO_JUDGE
        ):
            left = (last.steps - last.samples) / rate
            facts.append(f"{_clock(left)} left")
            if self.others.more:
                whole = left + self.others.after(last.seconds + left)
                facts.append(f"{_clock(whole)} with the {self.others.more} runs to come")
        return facts

    def _samples_per_second(self) -> float:
        (first, samples), (last, more) = self._recent[0], self._recent[-1]
        return (more - samples) / (last - first) if last > first else 0.0


def _bar(done: int, steps: int) -> Table:
    """Return the progress bar on a line of its own."""
    line = Table.grid()
    line.add_row(ProgressBar(total=steps, completed=done, width=BAR_WIDTH))
    return line


def _metrics(last: Progress) -> list[str]:
    """Return the prequential accuracy (or loss) of the last window and of the whole run."""
    if not last.windows:
        return []
    latest, whole = last.windows[-1], merge_windows(last.windows)
    if whole.accuracy is None:
        return [f"loss {number(latest.mean_loss)} (run {number(whole.mean_loss)})"]
    return [f"accuracy {percent(latest.accuracy)} % (run {percent(whole.accuracy)} %)"]


def _blocks(blocks: Sequence[BlockProgress], most: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("block")
    table.add_column("tick", justify="right")
    table.add_column("updates", justify="right")
    table.add_column("state")
    for block in blocks[:most]:
        state = "computing" if block.waiting is None else f"waiting for {block.waiting}"
        table.add_row(
            Text(block.block), str(block.tick), str(block.updates), Text(state, overflow="ellipsis")
        )
    if len(blocks) > most:
        table.add_row(f"and {len(blocks) - most} more", "", "", "")
    return table


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
