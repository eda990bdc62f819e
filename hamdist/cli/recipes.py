"""`hamdist recipes`, `hamdist rules`: the shipped recipes, and the built-in rules of learning."""

from __future__ import annotations

from importlib.resources import files

from rich.table import Table
from rich.text import Text

from hamdist.cli.console import OUTPUT, console, report, say
from hamdist.config import read_yaml


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


def rules() -> None:
    """List the built-in rules of learning: what crosses an edge, what is kept, locality, cost."""
    text = (files("hamdist") / "dynamics" / "rules" / "facts.yaml").read_text("utf-8")
    facts: dict[str, dict[str, str]] = read_yaml(text, "facts.yaml")
    OUTPUT.document = [{"name": name, **by_name} for name, by_name in facts.items()]
    for name, by_name in facts.items():
        console().print(Text(name, style="bold"))
        for fact, text in by_name.items():
            say(f"  {fact:<8} {text}")
