"""`hamdist recipes`: what is shipped."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from hamdist.cli.console import console


def recipes() -> None:
    """List the shipped recipes."""
    from hamdist.study.recipes import recipes as shipped

    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, description in shipped().items():
        table.add_row(name, Text(description))
    console().print(table)
