"""TOML files: their values, and the line that each stands in, which the standard library does not say."""

from __future__ import annotations

import ast
import re
import tomllib
from typing import Any, Final

import msgspec

from broker.errors import Place, Problem

Path = tuple[str | int, ...]
"""The names that lead to a value; the elements of a list are counted from 1."""


def parse(data: bytes, file: str) -> tuple[dict[str, Any], dict[Path, int]] | Problem:
    """Read a file: its values, and the line of each table, key and element. A byte order mark is ignored.

    Raises RecursionError.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line, column = _position(data[: error.start].decode(), error.start)
        message = f"is not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8"
        return Problem(message, place=Place(file=file, line=line, column=column))
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, where = str(error).rpartition(" (at ")
        message = _explain(message)
        found = re.match(r"line (\d+), column (\d+)", where)
        # The parser says "end of document" where a string or a table is not closed.
        line, column = (int(found[1]), int(found[2])) if found else _position(text, len(text))
        message = f"is not valid TOML: {message[:1].lower()}{message[1:]}"
        return Problem(message, place=Place(file=file, line=line, column=column))
    return values, _Scanner(text.replace("\r\n", "\n")).lines  # as the parser does


def _explain(message: str) -> str:
    """Give a message of the parser in words of the file; those of the parser name keys as tuples of Python."""
    if message == "Cannot overwrite a value":
        return "this key has a value already"
    return re.sub(r"\(['\"].*\)", lambda found: f"[{'.'.join(ast.literal_eval(found[0]))}]", message)


def dump(value: object) -> str:
    """Write a default in TOML; JSON is TOML for numbers, booleans, and the strings and lists that occur."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def _position(text: str, index: int) -> tuple[int, int]:
    """Give the line and the column, both from 1, of a place in a text."""
    index = min(index, len(text))
    return text.count("\n", 0, index) + 1, index - (text.rfind("\n", 0, index) + 1) + 1


class _Scanner:
    """Finds the lines of keys in a text that is valid TOML."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._text = text
        self._at = 0
        self._line = 1
        self._line_at = 0
        """Where in the text `_line` was counted: once for the whole text, however many keys it has."""
        self._counts: dict[Path, int] = {}
        table: Path = ()
        while self._skip(_BLANK):
            if self._text.startswith("[[", self._at):
                self._at += 2
                table = self._resolve(self._keys())
                self._counts[table] = self._counts.get(table, 0) + 1
                table = (*table, self._counts[table])
                self._note(table)
                self._at += 2
            elif self._text[self._at] == "[":
                self._at += 1
                table = self._resolve(self._keys())
                self._note(table)
                self._at += 1
            else:
                self._pair(table)

    def _skip(self, pattern: re.Pattern[str]) -> bool:
        """Pass over what matches; whether there is something left."""
        found = pattern.match(self._text, self._at)
        assert found  # the patterns match nothing, too
        self._at = found.end()
        return self._at < len(self._text)

    def _note(self, path: Path) -> None:
        self._line += self._text.count("\n", self._line_at, self._at)
        self._line_at = self._at
        for end in range(1, min(len(path), _DEEPEST) + 1):
            self.lines.setdefault(path[:end], self._line)

    def _resolve(self, keys: Path) -> Path:
        """Put in the numbers of the tables that were opened last by [[…]]."""
        path: Path = ()
        for number, key in enumerate(keys, 1):
            path = (*path, key)
            if path in self._counts and number < len(keys):
                path = (*path, self._counts[path])
        return path

    def _keys(self) -> Path:
        """Read a dotted key."""
        found = _KEYS.match(self._text, self._at)
        assert found
        self._at = found.end()
        if '"' not in found[0] and "'" not in found[0]:
            return tuple(name.strip() for name in found[0].split("."))
        path: list[str | int] = []
        value: object = tomllib.loads(f"{found[0]} = 0")
        while isinstance(value, dict):
            ((name, value),) = value.items()
            path.append(name)
        return tuple(path)

    def _pair(self, table: Path) -> None:
        path = (*table, *self._keys())
        self._note(path)
        self._at += 1  # the equals sign
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip(_BLANK)
        opening = self._text[self._at]
        if opening not in "[{":
            self._skip(_SCALAR)
            return
        self._at += 1
        number = 0
        while self._skip(_SEPARATORS) and self._text[self._at] not in "]}":
            if opening == "{":
                self._pair(path)
            else:
                number += 1
                self._note((*path, number))
                self._value((*path, number))
        self._at += 1


_DEEPEST: Final = 8
"""Names of a path whose lines are kept. No setting lies deeper, and a key may have thousands of names."""
_BLANK: Final = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SEPARATORS: Final = re.compile(r"(?:[ \t\n,]|#[^\n]*)*")
_KEYS: Final = re.compile(r"""(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_.\- \t])+""")
_SCALAR: Final = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*"{3,5}|'''
    r"'''(?:(?!''').)*'{3,5}|"
    r"""\"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^,\]}\n#]+""",
    re.DOTALL,
)
