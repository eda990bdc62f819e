"""`hamdist recipes`: the shipped recipes."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from hamdist.cli.console import console, report


def recipes() -> None:
    """List the shipped recipes, and which of them need files that hamdist does not bring."""
    from hamdist.study.shared.recipes import needed_files
    from hamdist.study.shared.recipes import recipes as shipped

    table = Table("recipe", "what it is", "needs", box=None, pad_edge=False)
    rows = [(name, description, needed_files(name)) for name, description in shipped().items()]
    report(recipes=[dict(zip(("name", "description", "needs"), row, strict=True)) for row in rows])
    for name, *cells in rows:
        table.add_row(name, *map(Text, cells))
    console().print(table)
