"""`hamdist simulate --sweep`: cuts, placements, actors, delays, codecs and levels, by the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hamdist.config import Compress, Level, Settings, to_yaml
from hamdist.errors import ClusterError, GraphError, LevelError, SettingsError
from hamdist.study.run.export import at_one_level
from hamdist.study.shared.result_folder import write_file
from hamdist.study.simulate.simulate import PlacedRun, Planner, fastest_first

BLOCKS = (2, 3, 4, 6, 8, 12, 16)
CODECS = (Compress.NONE, Compress.BF16, Compress.INT8, Compress.INT4)
KEPT = 5  # candidates that are simulated, and written
LIKE = 0.01  # candidates of one cut whose rates differ by less count as one


def sweep(
    settings: Settings, planner: Planner, levels: Sequence[Level | str], say: Callable[[str], None]
) -> list[PlacedRun]:
    """Return the fastest candidates that fit the hosts' memory, the fastest first.

    Args:
        settings: that are varied; delays, codecs and blocks that they give are kept as one choice.
        planner: of the cluster.
        levels: to try, besides that of the settings.
        say: receives a line about each cut.

    Raises:
        SettingsError: nothing can run, or no candidate fits the hosts' memory.
    """
    runs: list[PlacedRun] = []
    fault: Exception | None = None
    full: list[str] = []
    for variant in _variants(settings, levels):
        try:
            model = planner.model(variant)
            here = fastest_first(planner.candidates(variant, model))
        except (ClusterError, GraphError, LevelError, SettingsError) as error:
            fault = error
            continue
        later = [planner.with_least_delays(placed) for placed in here[: 2 * KEPT]]
        here = later if variant.partition.delays == "auto" else [*here, *later]
        full += [text for placed in here for text in placed.too_full()]
        here = fastest_first(placed for placed in here if not placed.too_full())
        if here:
            say(f"{_name(variant)}: {here[0].rate:,.0f} samples/s, {here[0].period.words}")
        runs += here[:KEPT]
    if not runs:
        why = full[0] if full else str(fault)
        raise SettingsError(f"--sweep: no way to run these settings on these hosts: {why}")
    return _apart(fastest_first(runs))


def _name(settings: Settings) -> str:
    codec = settings.engine.compress
    compress = codec.value if isinstance(codec, Compress) else "by edge"
    blocks = settings.partition.blocks or "default"
    return f"{settings.level_name}, blocks {blocks}, compress {compress}"


def _variants(settings: Settings, levels: Sequence[Level | str]) -> Iterator[Settings]:
    """Yield settings of each level, cut and codec; those that are given come first."""
    part, given = settings.partition, settings.engine.compress
    cuts = [part.blocks]
    if part.cuts is None and not part.slices:
        cuts += [n for n in BLOCKS if n != part.blocks]
    codecs = [given, *(codec for codec in CODECS if codec != given)]
    all_levels = dict.fromkeys([settings.level, *levels])
    for level, blocks, codec in itertools.product(all_levels, cuts, codecs):
        cut = {} if blocks == part.blocks else {"blocks": blocks}
        yield at_one_level(settings.changed(partition=cut, engine={"compress": codec}), level)


def _apart(runs: Sequence[PlacedRun]) -> list[PlacedRun]:
    """Return the first candidates that are not nearly alike."""
    apart: list[PlacedRun] = []
    for placed in runs:
        alike = (
            placed.settings.engine.compress == other.settings.engine.compress
            and placed.settings.partition.blocks == other.settings.partition.blocks
            and placed.settings.level == other.settings.level
            and placed.rate > (1 - LIKE) * other.rate
            for other in apart
        )
        if not any(alike):
            apart.append(placed)
    return apart[:KEPT]


def write_sweep(folder: Path, runs: Sequence[PlacedRun]) -> list[Path]:
    """Write the settings of the winner, and of the runners-up; return the files."""
    files = []
    for i, placed in enumerate(runs):
        files.append(folder / ("settings.yaml" if not i else f"runner-up-{i}.yaml"))
        write_file(files[-1], to_yaml(placed.chosen(), only_set=True))
    return files
