"""YAML that holds plain values, and no more of them than it looks like."""

from __future__ import annotations

from typing import Any

import yaml

from hamdist.errors import SettingsError

# More than any settings have; beyond it a few lines of text could take minutes or the whole stack.
MAX_NESTING = 50
MAX_VALUES = 10_000


class _PlainLoader(yaml.SafeLoader):
    """Values as they look: 1:30 is no 90, and no name is given twice."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        of_time = kind is yaml.ScalarNode and tag.endswith((":int", ":float")) and ":" in value
        return "tag:yaml.org,2002:str" if of_time else tag

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: {key.value!r} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def plain_values(text: str) -> Any:
    """What YAML `text` holds. Raises ValueError saying why it does not hold settings: besides what
    is no YAML, tags (which name types), and text that is small and becomes large by its aliases."""
    try:
        _look_through(text)
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ValueError(f"{where}no valid YAML: {problem}") from None


def _look_through(text: str) -> None:
    """Raises ValueError for what `plain_values` refuses. Counts values as often as aliases repeat
    them."""
    sizes: dict[str, int] = {}  # by anchor
    open_: list[tuple[str | None, int]] = []  # the collections around: anchor, values before it
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"line {line}: the tag {tag!r}: settings are plain values")
        before, anchor = values, getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise ValueError(f"line {line}: *{anchor} stands before the end of &{anchor}")
            values += sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if anchor is not None:
                sizes[anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            values += 1
            open_.append((anchor, before))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        if values > MAX_VALUES or len(open_) > MAX_NESTING:
            raise ValueError(
                f"line {line}: more than {MAX_VALUES:,} values, or {MAX_NESTING} inside each other"
            )


def read_yaml(text: str, origin: str) -> Any:
    """What YAML `text` holds: plain values, and no more of them than it looks like.

    Raises SettingsError naming `origin`, and the line.
    """
    try:
        return plain_values(text)
    except ValueError as error:
        raise SettingsError(f"{origin}, {error}") from None
