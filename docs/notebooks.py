"""Notebooks as pages of the site: read with json alone, so that a build needs no Jupyter.

`python docs/notebooks.py` runs all tutorials (or those that are named) and writes their outputs
into them; that needs nbclient and ipykernel, of the extra `docs`.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"
LINES = 40  # of an output that a page shows
RICH: dict[str, str] = {}  # HTML and SVG of outputs, which Markdown would take apart, by name


def page(path: Path) -> dict[str, str | bytes]:
    """Return the page of a notebook, and its pictures, by the address that each has in the site."""
    book = json.loads(path.read_text("utf-8"))
    files: dict[str, str | bytes] = {}
    parts: list[str] = []
    for number, cell in enumerate(book["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```{_language(source)}\n{_shell_less(source)}\n```")
            for name, content, text in _outputs(cell, f"{path.stem}-{number}"):
                parts.append(text)
                if content:
                    files[f"tutorials/{name}"] = content
    files[f"tutorials/{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return files


def _language(source: str) -> str:
    return "bash" if source.startswith("%%bash") else "python"


def _shell_less(source: str) -> str:
    return source.removeprefix("%%bash\n")


def _outputs(cell: dict[str, Any], stem: str) -> Iterator[tuple[str, bytes, str]]:
    """Yield file name, content and text of the page for every output of a cell."""
    for n, output in enumerate(cell.get("outputs", [])):
        data = output.get("data", {})
        rich = "".join(data.get("image/svg+xml", data.get("text/html", "")))
        if rich:
            RICH[f"{stem}-{n}"] = rich.replace(' class="sortable"', "")
            yield "", b"", f'<div class="rich-output" data-output="{stem}-{n}"></div>'
        elif "image/png" in data:
            name = f"{stem}-{n}.png"
            yield name, base64.b64decode("".join(data["image/png"])), f"![]({name})"
        else:
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            lines = text.split("\n")
            shown = lines if len(lines) <= LINES else [*lines[:LINES], "..."]
            yield "", b"", "\n".join(["```{.text .output}", *shown, "```"])


def run(path: Path) -> None:
    """Run a notebook from a clean kernel and write it back with its outputs."""
    import nbclient
    import nbformat

    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=300, record_timing=False).execute(cwd=str(path.parent))
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        # Warnings and Ray's news name paths and addresses of this machine.
        cell.outputs = [one for one in cell.outputs if not _local(one)]
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(book, path)


def _local(output: Any) -> bool:
    return output.get("name") == "stderr" or "(raylet)" in output.get("text", "")


if __name__ == "__main__":
    for notebook in sys.argv[1:] or sorted(TUTORIALS.glob("*.ipynb")):
        print(notebook)
        run(Path(notebook))
