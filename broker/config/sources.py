"""From where values come: the file, the environment and files that it names, the command line.

Flags go before the environment, the environment before the file, the file before the defaults. Whatever is wrong is
reported, not only the first mistake, also where a later layer would have put another value in its place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from broker.config import toml
from broker.config.checks import Setting, check, check_table, contradictions, converted
from broker.config.files import read_file
from broker.config.keys import KEYS, SECTIONS, TABLE_KEYS, TABLES, Key
from broker.config.schema import ApiKey, Config, Role, TopicRule
from broker.errors import ConfigError, Place, Problem

DEFAULT_FILE: Final = Path("/etc/wsbroker/wsbroker.toml")
"""Read where it exists and no other file is named."""

PREFIX: Final = "WSBROKER_"
"""What the environment variables begin with: WSBROKER_LIMITS__MAX_SIZE is limits.max_size."""


MAX_SUGGESTIONS: Final = 100
"""Mistakes of which the first ones name the nearest key."""


class Reading:
    """What was read: the configuration, and what is wrong with it.

    With mistakes, `config` has the values that are right, and defaults for the others: good enough to find more
    mistakes, not to run with.
    """

    def __init__(
        self, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object], *, wait: bool = True
    ) -> None:
        """`wait`: whether to wait for the writer of a pipe, as a program may that serves nobody yet."""
        self.problems: list[Problem] = []
        self.rules: dict[int, TopicRule] = {}
        """The rules without mistakes, by their number in the file."""
        self.other_patterns: dict[int, str] = {}
        """The patterns of the rules in which another key is wrong, by their number in the file."""
        self.keys: dict[int, ApiKey] = {}
        self.roles: dict[int, Role] = {}
        self._file = str(file or DEFAULT_FILE)
        self._lines: dict[toml.Path, int] = {}
        self._wrong: dict[str, Setting | None] = {}
        """Keys of which some value is wrong, and that value, if it could be read."""
        self._settings: dict[str, Setting] = {}
        self._wait = wait
        self._tables: set[str] = set()
        """The kinds of tables that there are, also with mistakes."""
        self._read_file(file)
        for layer in (self._of_environment(environ), self._of_flags(flags)):
            self._take(layer)
        self.problems += contradictions(self._settings, self._wrong, self._tables)
        sections: dict[str, Any] = {}
        for key, setting in self._settings.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = converted(setting)
        tables = {name: list(getattr(self, attribute).values()) for name, attribute in _ATTRIBUTES.items()}
        self.config = msgspec.structs.replace(msgspec.convert(sections, Config), **tables)

    def locate(self, problem: Problem | str) -> Problem:
        """Say where the value comes from that a problem is about."""
        if isinstance(problem, str):
            return Problem(problem)
        if problem.place is not None or not problem.key:
            return problem
        if "[" in problem.key:
            return msgspec.structs.replace(problem, place=self._line(*_table_path(problem.key)))
        setting = self._settings.get(problem.key)
        return problem if setting is None else msgspec.structs.replace(problem, place=setting.place)

    def raise_problems(self, more: Iterable[Problem | str] = ()) -> None:
        """Raise ConfigError with every mistake, these among them, if there is one."""
        if problems := [*self.problems, *map(self.locate, more)]:
            raise ConfigError(problems)

    def _take(self, layer: Iterable[Setting]) -> None:
        for setting in layer:
            if problems := check(setting):
                self._wrong[setting.key] = setting
                self.problems += problems
            else:
                self._settings[setting.key] = setting

    # The file

    def _read_file(self, file: Path | None) -> None:
        try:
            found = toml.parse(read_file(file or DEFAULT_FILE, wait=self._wait), self._file)
            if isinstance(found, Problem):
                self.problems.append(found)
                return
            document, self._lines = found
            for section, table in document.items():
                if section in TABLES:
                    self._tables.add(section)
                    self._read_tables(section, table)
                else:
                    self._take(self._of_section(section, table))
        except OSError as error:
            if file is not None or not isinstance(error, FileNotFoundError | NotADirectoryError):
                self.problems.append(Problem(f"cannot be read: {error.strerror}", place=Place(file=self._file)))
        except RecursionError:  # only a file may hold values within values
            self.problems.append(Problem("is nested too deeply", place=Place(file=self._file)))

    def _line(self, *path: str | int) -> Place:
        """Give the place of a value, or of the innermost table around it that has a line."""
        line = next((self._lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self._lines), None)
        return Place(file=self._file, line=line)

    def _of_section(self, section: str, table: object) -> Iterator[Setting]:
        if section not in SECTIONS:
            what = "section" if isinstance(table, dict) else "key"
            message = f"there is no such {what}{self._suggest(section, [*SECTIONS, *TABLES, *KEYS])}"
            self.problems.append(Problem(message, section, self._line(section)))
        elif not isinstance(table, dict):
            self.problems.append(Problem(f"must be a table, [{section}]", section, self._line(section)))
        else:
            for name, value in table.items():
                key = f"{section}.{name}"
                place = self._line(section, name)
                if key in KEYS:
                    count = len(value) if isinstance(value, list) else 0
                    elements = [self._line(section, name, number) for number in range(1, count + 1)]
                    yield Setting(key, value, place, elements=elements)
                else:
                    self.problems.append(Problem(f"there is no such key{self._suggest(key, KEYS)}", key, place))

    def _read_tables(self, section: str, tables: object) -> None:
        """Read tables like [[topics]]."""
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.problems.append(Problem(f"must be tables, each [[{section}]]", section, self._line(section)))
            return
        keys = TABLE_KEYS[section]
        for number, table in enumerate(tables, 1):
            problems = [
                Problem(f"is missing: {_describe(key)}", f"{section}[{number}].{key.name}", self._line(section, number))
                for key in keys.values()
                if key.is_required and key.name not in table
            ]
            problems += [
                Problem(mistake, f"{section}[{number}].{name}", self._line(section, number, name))
                for name, value in table.items()
                for mistake in _check_table_key(section, name, value)
            ]
            self.problems += problems
            if not problems:
                getattr(self, _ATTRIBUTES[section])[number] = msgspec.convert(table, TABLES[section])
            elif section == "topics" and isinstance(match := table.get("match"), str):
                self.other_patterns[number] = match

    def _suggest(self, wrong: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
        # It takes a millisecond, and a file for another program may have a hundred thousand keys.
        return suggest(wrong, known, written) if len(self.problems) < MAX_SUGGESTIONS else ""

    # The environment and the command line

    def _of_environment(self, environ: Mapping[str, str]) -> Iterator[Setting]:
        for name, value in sorted(environ.items()):
            if not name.startswith(PREFIX):
                continue
            place = Place(variable=name)
            if name in _VARIABLES:
                yield Setting(_VARIABLES[name], value, place, is_text=True)
            elif name.removesuffix("_FILE") in _VARIABLES:
                yield from self._of_value_file(name, value, environ)
            elif name not in CLIENT_VARIABLES and not _of_kubernetes(name, value):
                end = "_FILE" if name.endswith("_FILE") else ""
                key = name.removeprefix(PREFIX).removesuffix(end).lower().replace("__", ".")
                hint = self._suggest(key, KEYS, lambda key, end=end: variable_of(key) + end)  # type: ignore[misc]
                hint = hint or "; `wsbroker config default` shows the settings"
                if key.partition(".")[0] == "topics":
                    hint = "; rules for topics are set in the file"
                self.problems.append(Problem(f"there is no such key{hint}", place=place))

    def _of_value_file(self, name: str, path: str, environ: Mapping[str, str]) -> Iterator[Setting]:
        """Read the file that a variable with `_FILE` names."""
        variable, place = name.removesuffix("_FILE"), Place(variable=name)
        key = _VARIABLES[variable]
        if not path:
            self.problems.append(Problem("is empty; it must be the path of a file", key, place))
            return
        if variable in environ:
            self.problems.append(Problem(f"{variable} is set too, only one of the two may be", key, place))
            return
        try:
            # Editors on Windows put a byte order mark before a text.
            text = read_file(path, wait=self._wait).decode("utf-8-sig")
            content = text.replace("\r\n", "\n").removesuffix("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self._wrong[key] = None
            self.problems.append(Problem(f"{path} cannot be read: {reason}", key, place))
        else:
            yield Setting(key, content, place, is_text=True)

    def _of_flags(self, flags: Mapping[str, object]) -> Iterator[Setting]:
        for key, value in flags.items():
            if value is not None and value != ():
                yield Setting(key, value, Place(flag=flag_of(key)))


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """Build the configuration from all layers.

    `file` is the one that was asked for; with None it is `DEFAULT_FILE`, if that exists. `flags` maps dotted keys to
    values; None and the empty tuple (an option of click that may be repeated, and was not given) say nothing.
    Raises ConfigError with every mistake.
    """
    reading = Reading(file, environ, flags)
    reading.raise_problems()
    return reading.config


def _check_table_key(section: str, name: str, value: object) -> list[str]:
    key = TABLE_KEYS[section].get(name)
    return [f"there is no such key{suggest(name, TABLE_KEYS[section])}"] if key is None else check_table(key, value)


def _describe(key: Key) -> str:
    """Say what a key is for, with an example, behind a colon."""
    about = key.description.partition(". ")[0].removesuffix(".")
    return f"{about[:1].lower()}{about[1:]}, like {key.name} = {toml.dump(key.example)}"


def _table_path(key: str) -> toml.Path:
    """Split `topics[2].match` as the lines of the file are named."""
    section, _, rest = key.partition("[")
    number, _, name = rest.partition("]")
    return (section, int(number), *([name[1:]] if name else []))


def _of_kubernetes(name: str, value: str) -> bool:
    """Whether a variable is one that Kubernetes sets for a service of this name, like WSBROKER_PORT=tcp://10.0.0.1:80."""
    return bool(_SERVICE.fullmatch(name)) or (name.endswith("_PORT") and "://" in value)


def suggest(wrong: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """Name the nearest of the known words, to be put behind a message: the same key elsewhere, or one spelt like it."""

    def likeness(word: str) -> float:
        whole = difflib.SequenceMatcher(None, wrong, word).ratio()
        last = difflib.SequenceMatcher(None, name, word.rpartition(".")[2]).ratio()
        return max(whole, last) + whole / 100

    name = wrong.rpartition(".")[2]
    nearest = max(known, key=likeness)
    return f"; did you mean {written(nearest)}?" if likeness(nearest) >= _ALIKE else ""


def variable_of(key: str) -> str:
    """Give the environment variable of a key."""
    return PREFIX + key.upper().replace(".", "__")


def flag_of(key: str) -> str:
    """Give the flag of a key: `--listen` of server.listen, `--log-level` of log.level."""
    return "--" + key.removeprefix("server.").replace(".", "-").replace("_", "-")


_ATTRIBUTES: Final = {"keys": "keys", "roles": "roles", "topics": "rules"}
"""Where a Reading keeps the tables of each kind."""
_ALIKE: Final = 0.65
_VARIABLES: Final = {variable_of(key): key for key in KEYS}
CLIENT_VARIABLES: Final = frozenset({"WSBROKER_URL", "WSBROKER_TOKEN", "WSBROKER_CA"})
"""What `pub`, `sub` and `bench` read."""
_SERVICE: Final = re.compile(
    r"WSBROKER_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
