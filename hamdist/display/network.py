"""A network of blocks as plain data, and as a picture: SVG, and DOT for Graphviz.

The columns are depths, as on the page of a run (study/view/assets/page.js).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from hamdist.display.figure import COLOURS, SvgPicture, svg_of

WIDE, HIGH, RIGHT, DOWN, EDGE = 156, 62, 226, 82, 16  # of a block; from block to block; margin
LATE = ("#ffffff", "#fff3d6", "#ffe0a3", "#f7c06a")  # messages are exact, late, later, latest
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>'
)
TOP = 44  # of the first block, below the title


@dataclass(frozen=True, slots=True)
class NetworkBlock:
    """A block of the graph.

    `shape` of its state, batch first (empty: not known); `parameters` are numbers that it learns;
    `depth` is in ticks from the input; its messages lag `delay` updates or ticks (None: no schedule
    says so).
    """

    name: str
    shape: Sequence[int]
    dtype: str
    parameters: int
    depth: int
    delay: int | None
    readout: bool


class NetworkEdge(NamedTuple):
    """An edge; `parent` may be an input of the network. `delay` in ticks."""

    name: str
    parent: str
    child: str
    delay: int


class NetworkActor(NamedTuple):
    """A process and its blocks."""

    name: str
    host: str
    blocks: Sequence[str]


@dataclass(frozen=True, slots=True)
class PlacedNetwork:
    """The graph of a run, and where its blocks live; `staleness` as in `RunFacts`."""

    blocks: Sequence[NetworkBlock]
    edges: Sequence[NetworkEdge]
    actors: Sequence[NetworkActor] = ()
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class NetworkPicture(SvgPicture):
    """The picture of a network, with the same as DOT."""

    dot: str = ""

    def save(self, path: str | Path) -> Path:
        """Write the picture into a file, and return its path.

        Args:
            path: of the file, whose ending, .svg or .dot, says how.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(self.dot if Path(path).suffix == ".dot" else self.svg, "utf-8")
        return Path(path)


def network_picture(network: PlacedNetwork, title: str) -> NetworkPicture:
    """Return the picture of a network: its blocks with their shapes, actors and lateness."""
    texts = dict(_texts(network))
    latest = max((block.delay or 0 for block in network.blocks), default=0)
    late = {b.name: LATE[-(-3 * (b.delay or 0) // (latest or 1))] for b in network.blocks}
    owner = {name: n for n, actor in enumerate(network.actors) for name in actor.blocks}
    dot = "\n".join(_dot(network, title, texts, late))
    places, width, height = _places(network)
    parts = [_words(EDGE, 20, title, ' font-weight="600" font-size="14"')]
    parts += (_line(edge, places) for edge in network.edges)
    for name, (x, y) in places.items():
        box = f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="6" stroke="#59636e"'
        parts.append(f'{box} fill="{late.get(name, "none")}"/>')
        if name in owner and len(network.actors) > 1:
            colour = COLOURS[owner[name] % len(COLOURS)]
            parts.append(f'<rect x="{x}" y="{y}" width="6" height="{HIGH}" fill="{colour}"/>')
        for line, text in enumerate(texts.get(name, [name, "input"])):
            parts.append(
                _words(x + 14, y + 18 + 17 * line, text, "" if line else ' font-weight="600"')
            )
    if latest:
        parts += _legend(latest, height)
        height += 30
    return NetworkPicture(svg_of(width, height, title, [HEAD, *parts]), dot)


def _texts(network: PlacedNetwork) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of each block: its name, its shape, and where it is."""
    places = {b: actor for actor in network.actors for b in actor.blocks}
    for block in network.blocks:
        shape = " × ".join(map(str, block.shape)) or f"{block.parameters:,} weights"
        lines = [block.name + (" (loss)" if block.readout else ""), shape]
        if block.name in places and len(network.actors) > 1:
            lines.append(" on ".join(filter(None, places[block.name][:2])))
        yield block.name, lines


def _places(network: PlacedNetwork) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Return the corner of each block and input, and the size of the picture."""
    depths = {block.name: block.depth for block in network.blocks}
    columns: dict[int, list[str]] = {}
    for name in [*(e.parent for e in network.edges if e.parent not in depths), *depths]:
        column = columns.setdefault(depths.get(name, -1), [])
        column += [] if name in column else [name]
    most = max(map(len, columns.values()))
    places = {
        name: (EDGE + place * RIGHT, TOP + int((row + (most - len(column)) / 2) * DOWN))
        for place, (_, column) in enumerate(sorted(columns.items()))
        for row, name in enumerate(column)
    }
    return places, 2 * EDGE + (len(columns) - 1) * RIGHT + WIDE, TOP + most * DOWN


def _line(edge: NetworkEdge, places: Mapping[str, tuple[int, int]]) -> str:
    (x, y), (to_x, to_y) = places[edge.parent], places[edge.child]
    a, b, c, d = x + WIDE, y + HIGH // 2, to_x, to_y + HIGH // 2
    if c > a + RIGHT and b == d:  # over the blocks between
        way = f"M{a},{b}C{a + 40},{b - 64} {c - 40},{d - 64} {c},{d}"
    elif c > a:
        way = f"M{a},{b}C{(a + c) // 2},{b} {(a + c) // 2},{d} {c},{d}"
    else:  # an edge that leads back goes below
        way = f"M{a},{b}C{a + 50},{b + 76} {c - 50},{d + 76} {c},{d}"
    line = (
        f'<path d="{way}" fill="none" stroke="#59636e" stroke-width="1.5" marker-end="url(#head)"/>'
    )
    if edge.delay == 1:
        return line
    low = 12 if c > a else -50
    return line + _words((a + c) // 2, (b + d) // 2 - low, _ticks(edge), ' text-anchor="middle"')


def _ticks(edge: NetworkEdge) -> str:
    return f"{edge.delay} ticks"


def _words(x: int, y: int, text: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="#1c1c1c"{more}>{escape(text)}</text>'


def _legend(latest: int, y: int) -> Iterator[str]:
    yield _words(EDGE, y + 12, "messages late by, updates")
    marks = dict.fromkeys((0, latest // 3, 2 * latest // 3, latest))
    for number, late in enumerate(marks):
        x = EDGE + 156 + 60 * number
        colour = LATE[-(-3 * late // latest)]
        yield f'<rect x="{x}" y="{y}" width="16" height="16" fill="{colour}" stroke="#59636e"/>'
        yield _words(x + 22, y + 12, str(late))


def _dot(
    network: PlacedNetwork, title: str, texts: Mapping[str, Sequence[str]], late: Mapping[str, str]
) -> Iterator[str]:
    yield f"digraph {_quoted(title)} {{"
    yield f"  rankdir=LR; label={_quoted(title)}; node [shape=box, style=filled];"
    for name, lines in texts.items():
        label = _quoted("\n".join(lines))
        yield f"  {_quoted(name)} [label={label}, fillcolor={_quoted(late[name])}];"
    for number, actor in enumerate(network.actors if len(network.actors) > 1 else ()):
        blocks = " ".join(f"{_quoted(name)};" for name in actor.blocks)
        label = _quoted(" on ".join(filter(None, actor[:2])))
        yield f"  subgraph cluster_{number} {{ label={label}; {blocks} }}"
    for edge in network.edges:
        label = "" if edge.delay == 1 else f" [label={_quoted(_ticks(edge))}]"
        yield f"  {_quoted(edge.parent)} -> {_quoted(edge.child)}{label};"
    yield "}\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
