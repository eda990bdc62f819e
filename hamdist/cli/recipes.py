"""`hamdist recipes`: what is shipped."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from hamdist.cli.console import console


def recipes() -> None:
    """List the shipped recipes, and which of them need files that hamdist does not bring."""
    from hamdist.study.recipes import recipes as shipped

    table = Table("recipe", "what it is", "needs", box=None, pad_edge=False)
    for name, description in shipped().items():
        table.add_row(name, Text(description), Text(_needs(name)))
    console().print(table)


def _needs(name: str) -> str:
    """Return what the recipe `name` reads from disk and, where it is missing, how to get it."""
    from hamdist.config import Source
    from hamdist.errors import StreamError
    from hamdist.streams.datasets import FASHION_INSTALL, find_fashion_mnist
    from hamdist.study.recipes import load_settings

    stream = load_settings(name).stream
    if stream.source is not Source.FASHION_MNIST:
        return ""
    try:
        return f"Fashion-MNIST (in {find_fashion_mnist(stream.path)})"
    except StreamError:
        return f"Fashion-MNIST: {FASHION_INSTALL}"
