"""Any text is settings, or one SettingsError; it names no code, and takes no time."""

from __future__ import annotations

import contextlib
import enum
import typing

import pytest
import yaml
from fuzz.budget import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from hamdist.config import Settings, parse_override, read_settings, to_yaml
from hamdist.errors import SettingsError
from hamdist.launch.cluster_file import read_cluster
from hamdist.study.grid.settings import load_study

pytestmark = pytest.mark.timeout(3600)

# Each of these once ended in another error than SettingsError, or in none for minutes.
FOUND = [
    "seed: 2024-13-45",
    "seed: !!bool maybe",
    "seed: !!timestamp soon",
    "seed: !!int ''",
    "seed: ._",
    f"seed: {'9' * 5000}",
    "seed: " + "[" * 3000,
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 12)),
    "name: !!python/object/apply:os.system ['true']",
    "a: &a [*a]",
    "steps: 1" + "0" * 400 + "\nlearning: {lr: 1" + "0" * 400 + "}",
]


def read_study(text, folder):
    load_study(str(written(text, folder)))


def read_cluster_text(text, folder):
    read_cluster(written(text, folder))


def written(text, folder):
    path = folder / "file.yaml"
    path.write_text(text)
    return path


def names(model):
    """All settings there are: (name, models or enums behind it)."""
    for name, field in model.model_fields.items():
        yield name
        for part in parts(field.annotation):
            if issubclass(part, BaseModel):
                yield from names(part)
            elif issubclass(part, enum.Enum):
                yield from (one.value for one in part)


def parts(annotation):
    if isinstance(annotation, type):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from parts(inner)


WORDS = sorted(set(names(Settings)))
scalars = st.one_of(
    st.sampled_from(WORDS),
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=9),
    st.dates(),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), scalars), inner, max_size=4),
    ),
    max_leaves=12,
)
MARKS = "!&*:{}[],-\n '\"%@`#|>?0123456789.e\t"
GOOD = """
name: fuzz
level: trace
engine: {kind: ray, actors: 2, blocks: {"block*": {cpus: 2}}, compress: {a->b: int8}}
partition: {delays: {"*": 2}}
dynamics: {tau: {values: [0.5, 1], cycle: yes}, reset: {h: never}}
levels: {local: {learning: {lr: 0.2}}}
"""


def fields(model):
    """A mapping of settings of `model` to what may be right for them, or not."""
    chosen = {}
    for name, field in model.model_fields.items():
        inner = [p for p in parts(field.annotation) if issubclass(p, BaseModel)]
        enums = [p for p in parts(field.annotation) if issubclass(p, enum.Enum)]
        options = [fields(p) for p in inner]
        options += [st.sampled_from([one.value for one in p]) for p in enums]
        chosen[name] = st.one_of(*options, st.integers(0, 5), st.floats(0, 1), scalars, trees)
    return st.fixed_dictionaries({}, optional=chosen)


def read(text):
    """The settings, or None if they were refused in one error of a sensible length."""
    message = "here"
    settings = None
    try:
        settings = read_settings(text, "here")
    except SettingsError as error:
        message = str(error)
    assert message.startswith("here")
    assert len(message) < 20_000
    return settings


@st.composite
def altered(draw):
    text = draw(st.sampled_from([GOOD, to_yaml(Settings())]))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(WORDS) | st.text(MARKS, max_size=5))
        text = text[:at] + piece + text[at + draw(st.integers(0, 9)) :]
    return text


def test_what_was_found():
    for text in FOUND:
        assert read(text) is None, text


@fuzz(60)
@given(st.one_of(altered(), st.text(max_size=80), fields(Settings).map(yaml.safe_dump)))
def test_text_is_settings_or_one_error(text):
    settings = read(text)
    if settings is not None:
        assert read(to_yaml(settings)) == settings


@fuzz(30)
@given(st.text(max_size=30), st.one_of(st.text(max_size=30), trees.map(yaml.safe_dump)))
@example("seed", "2024-13-45")
def test_overrides_are_mappings_or_one_error(key, value):
    try:
        over = parse_override(f"{key}={value}")
    except SettingsError:
        return
    assert isinstance(over, dict)
    with contextlib.suppress(SettingsError):
        read_settings(GOOD, "here", [over])


@pytest.mark.parametrize("read", [read_study, read_cluster_text])
@pytest.mark.parametrize("text", FOUND)
def test_other_files_are_read_as_carefully(read, text, tmp_path):
    """Studies, and files that name a cluster."""
    with pytest.raises(SettingsError):
        read(text, tmp_path)
