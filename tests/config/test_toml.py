"""TOML with the line of each value, beside the parser of the standard library."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from broker.config import toml
from broker.errors import Problem

# Pieces of TOML, whole and broken, that are put together at random.
PIECES = [
    *"abc_-.019=[]{},#\"'\\ \t\n\r",
    *('"""', "'''", "[[", "]]", " = ", "a = ", "true", "inf", "1979-05-27 07:32:00", "é", '\\"', "\\n", '""', "''"),
    *("# x\n", "\r\n", "{a = 1, b = [1, 2]}", "[a.b]\n", "[[t]]\n", "[[t.u]]\n", "key = 'v'\n", 'a."b c".d'),
]


def paths(value: object, path: toml.Path = ()) -> list[toml.Path]:
    """The paths of all values, at any depth."""
    found: list[toml.Path] = []
    parts: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value, 1))
    for name, part in parts:
        found += [(*path, name), *paths(part, (*path, name))]
    return found


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("\r\r\n")
@example('a = """x""""\nb = 1')
@example("[[t]]\n[[t.u]]\nx = [1,\n 2]\n[[t]]\n")
def test_each_value_of_any_valid_text_has_a_line(text: str) -> None:
    try:
        expected = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert isinstance(toml.parse(text.encode(), "f"), Problem)
        return
    found = toml.parse(text.encode(), "f")
    assert not isinstance(found, Problem)
    values, lines = found
    assert repr(values) == repr(expected)  # NaN is not equal to itself
    for path in paths(values):
        if len(path) <= 8:
            assert 1 <= lines[path] <= text.count("\n") + 1


values = st.sampled_from(["1", '"x"', "[1, 2]", "{a = 1}", '"""\n\n"""', "[\n 1,\n 2,\n]", "true # t"])


@given(st.lists(st.tuples(st.integers(0, 3), values), min_size=1, max_size=8))
def test_lines_are_those_of_the_keys(keys: list[tuple[int, str]]) -> None:
    text = ""
    expected: dict[toml.Path, int] = {}
    for number, (blank, value) in enumerate(keys):
        text += "# c\n" * blank
        expected[(f"k{number}",)] = text.count("\n") + 1
        text += f"k{number} = {value}\n"
    for newline in ("\n", "\r\n"):
        found = toml.parse(text.replace("\n", newline).encode(), "f")
        assert not isinstance(found, Problem)
        assert {path: line for path, line in found[1].items() if len(path) == 1} == expected
