"""Hooks of the site's build: pages made from code and notebooks, and formulas made into MathML."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import notebooks
import reference

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
OUTPUT = re.compile(r'(<div class="rich-output") data-output="([^"]+)">')
TUTORIALS = Path(__file__).parent / "tutorials"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages: settings, commands, and one page for each notebook."""
    pages: dict[str, str | bytes] = {
        "reference/settings.md": reference.settings_page(),
        "reference/commands.md": reference.commands_page(),
    }
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        pages.update(notebooks.page(path))
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Put in the notebooks' outputs, and MathML, which browsers draw without a script."""
    content = OUTPUT.sub(lambda match: f"{match[1]}>{notebooks.RICH[match[2]]}", content)
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tex = html.unescape(match[2]).strip()
    display = "block" if match[1] == "div" else "inline"
    return latex2mathml.converter.convert(tex[2:-2].strip(), display=display)
