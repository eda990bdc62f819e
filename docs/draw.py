"""Draw the pictures of README and site: `python docs/draw.py` writes docs/pages/assets/*.svg.

Each picture is drawn twice, for light and for dark pages. Colours are those of Okabe and Ito.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ASSETS = Path(__file__).parent / "pages" / "assets"


@dataclass(frozen=True)
class Theme:
    """Colours of one variant."""

    name: str
    ink: str
    faint: str
    box: str
    forward: str
    backward: str


LIGHT = Theme("light", "#1f2328", "#59636e", "#f3f6fa", "#0072B2", "#B84A00")
DARK = Theme("dark", "#e6edf3", "#9aa4ae", "#1c2430", "#56B4E9", "#F0A03C")


@dataclass
class Picture:
    """An SVG under construction; coordinates in pixels, the origin at the top left."""

    theme: Theme
    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: int = 14, **style: str) -> None:
        """Write `words` centred on x (or as `anchor` says), the baseline at y."""
        colour = style.get("colour", self.theme.ink)
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{style.get("anchor", "middle")}" '
            f'font-weight="{style.get("weight", "normal")}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, **style: str) -> None:
        """Draw a rounded rectangle; `dash` for a dashed border, `fill` for another ground."""
        dash = f' stroke-dasharray="{style["dash"]}"' if "dash" in style else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" '
            f'fill="{style.get("fill", self.theme.box)}" '
            f'stroke="{style.get("colour", self.theme.faint)}" stroke-width="1.4"{dash}/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str, **style: str) -> None:
        """Draw an arrow; `dash` for a dashed line, `both` for heads at both ends."""
        dash = f' stroke-dasharray="{style["dash"]}"' if "dash" in style else ""
        start = f' marker-start="url(#{_marker(colour)})"' if "both" in style else ""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2"'
            f'{dash}{start} marker-end="url(#{_marker(colour)})"/>'
        )

    def svg(self) -> str:
        """Return the whole file."""
        colours = (self.theme.ink, self.theme.faint, self.theme.forward, self.theme.backward)
        heads = "".join(
            f'<marker id="{_marker(c)}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" '
            f'markerHeight="6" orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" '
            f'fill="{c}"/></marker>'
            for c in colours
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n<defs>{heads}</defs>\n{body}\n</svg>\n"
        )


def _marker(colour: str) -> str:
    return f"head{colour[1:]}"


def network(theme: Theme) -> Picture:
    """Draw a chain of blocks, what crosses its edges, and the levels below it."""
    p = Picture(theme, 876, 330, "A network as a graph of blocks that exchange neighbour signals")
    names = ["block 0", "block 1", "block 2", "readout"]
    left, width, gap, top, height = 130, 110, 70, 62, 92
    for i, name in enumerate(names):
        x = left + i * (width + gap)
        p.box(x, top, width, height)
        p.text(x + width / 2, top + 30, name, 15, weight="600")
        p.text(x + width / 2, top + 54, "h  z  θ  ω", 14, colour=theme.faint)
        p.text(
            x + width / 2, top + 78, f"sample n − {i}" if i else "sample n", 13, colour=theme.faint
        )
        if i + 1 < len(names):
            a, b = x + width + 6, x + width + gap - 6
            p.arrow(a, top + 32, b, top + 32, theme.forward)
            p.text((a + b) / 2, top + 22, "h", 15, colour=theme.forward, weight="600")
            p.arrow(b, top + 64, a, top + 64, theme.backward)
            p.text((a + b) / 2, top + 84, "m", 15, colour=theme.backward, weight="600")
    end = left + 4 * width + 3 * gap
    p.text(56, top + 28, "stream", 15, weight="600")
    p.text(56, top + 52, "u, ŷ", 14, colour=theme.faint)
    p.arrow(86, top + 32, left - 6, top + 32, theme.forward)
    p.arrow(end + 2, top + 32, end + 26, top + 32, theme.forward)
    p.text(end + 60, top + 28, "loss", 15, weight="600")
    p.text(end + 60, top + 52, "L(y, ŷ)", 14, colour=theme.faint)
    p.text(430, 26, "Each block owns its state, costate and weights; each edge takes one tick", 15)
    p.text(
        430,
        188,
        "forward: the state h; backward: a vector-Jacobian product m of the costate z",
        14,
        colour=theme.faint,
    )
    y = 258
    p.arrow(110, y, 750, y, theme.ink)
    p.text(430, 234, "one setting: level", 15, weight="600")
    for x, name, why in (
        (150, "local", "messages 2D ticks late"),
        (330, "trace", "late, matched by memory"),
        (530, "more hops per sample", "less late"),
        (710, "backprop", "nothing late: exact"),
    ):
        p.parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{theme.forward}"/>')
        p.text(x, y + 26, name, 15, weight="600")
        p.text(x, y + 46, why, 13, colour=theme.faint)
    return p


def architecture(theme: Theme) -> Picture:
    """Draw driver, Ray, two hosts with actors, and the ways that signals take."""
    p = Picture(theme, 860, 420, "Driver, Ray and actors: who talks with whom")
    p.box(320, 20, 220, 64)
    p.text(430, 46, "driver", 15, weight="600")
    p.text(430, 68, "plan, progress, result", 13, colour=theme.faint)
    p.text(652, 46, "Ray: starts, watches and", 13, colour=theme.faint)
    p.text(652, 64, "replaces actors; no signal", 13, colour=theme.faint)
    for host, x in enumerate((30, 460)):
        p.box(x, 150, 370, 170, fill="none", dash="6 4")
        p.text(x + 12, 312, f"host {'AB'[host]}", 13, anchor="start", colour=theme.faint)
    actors = [(46, "stream, block 0"), (236, "block 1"), (476, "block 2"), (666, "readout")]
    for i, (x, blocks) in enumerate(actors):
        p.box(x, 184, 148, 92)
        p.text(x + 74, 210, f"actor {i}", 15, weight="600")
        p.text(x + 74, 234, blocks, 14)
        p.text(x + 74, 258, "one loop, its nodes", 13, colour=theme.faint)
        p.arrow(430, 86, x + 74, 180, theme.faint, dash="4 4")
    for a, b in ((194, 236), (384, 476), (624, 666)):
        p.arrow(a + 5, 216, b - 5, 216, theme.forward)
        p.arrow(b - 5, 244, a + 5, 244, theme.backward)
    p.text(215, 298, "shared memory", 13, colour=theme.faint)
    p.text(645, 298, "shared memory", 13, colour=theme.faint)
    p.text(430, 340, "between hosts: ZeroMQ over tcp, encrypted", 13, colour=theme.faint)
    p.box(240, 350, 380, 54)
    p.text(430, 373, "storage: snapshots at the same ticks in every actor", 14)
    p.text(430, 393, "safetensors and JSON, with checksums", 13, colour=theme.faint)
    p.arrow(120, 324, 236, 372, theme.faint, dash="4 4")
    p.arrow(740, 324, 624, 372, theme.faint, dash="4 4")
    return p


def main() -> None:
    """Write all pictures."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name, draw in (("network", network), ("architecture", architecture)):
        for theme in (LIGHT, DARK):
            (ASSETS / f"{name}-{theme.name}.svg").write_text(draw(theme).svg(), "utf-8")


if __name__ == "__main__":
    main()
