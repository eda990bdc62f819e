"""`hamdist recipes`: what is shipped."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from hamdist.cli.console import console


def recipes() -> None:
    """List the shipped recipes, and which of them need files that hamdist does not bring."""
    from hamdist.study.shared.recipes import needed_files
    from hamdist.study.shared.recipes import recipes as shipped

    table = Table("recipe", "what it is", "needs", box=None, pad_edge=False)
    for name, description in shipped().items():
        table.add_row(name, Text(description), Text(needed_files(name)))
    console().print(table)
