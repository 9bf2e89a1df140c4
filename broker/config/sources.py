"""From where values come: the file, the environment and files that it names, the command line.

Flags go before the environment, the environment before the file, the file before the defaults. Whatever is wrong is
reported, not only the first mistake, also where a later layer would have put another value in its place.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from broker.config.checks import Setting, check, check_value, contradictions, converted
from broker.config.keys import KEYS, RULE_KEYS, SECTIONS
from broker.config.schema import Config, Log
from broker.errors import ConfigError

DEFAULT_FILE: Final = Path("/etc/wsbroker/wsbroker.toml")
"""Read where it exists and no other file is named."""

PREFIX: Final = "WSBROKER_"
"""What the environment variables begin with: WSBROKER_LIMITS__MAX_SIZE is limits.max_size."""


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """Build the configuration from all layers.

    `file` is the one that was asked for; with None it is `DEFAULT_FILE`, if that exists. `flags` maps dotted keys to
    values; None and the empty tuple (an option of click that may be repeated, and was not given) say nothing.
    Raises ConfigError with every mistake.
    """
    problems: list[str] = []
    settings: dict[str, Setting] = {}
    rules: list[dict[str, object]] = []
    for layer in (_of_file(file, problems, rules), _of_environment(environ, problems), _of_flags(flags)):
        try:
            for setting in layer:
                if mistakes := check(setting):
                    problems += [f"{setting.key} ({setting.origin}): {mistake}" for mistake in mistakes]
                else:
                    settings[setting.key] = setting
        except RecursionError:  # only a file may hold values within values
            problems.append(f"{file or DEFAULT_FILE}: is nested too deeply")
    if not problems:
        problems = contradictions(settings)
    if problems:
        raise ConfigError(problems)
    sections: dict[str, Any] = {"topics": rules}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = converted(setting)
    return msgspec.convert(sections, Config)


def log_of(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Log:
    """Give what there is to be known of the log in a configuration that has mistakes: they are to be said in it."""
    found: dict[str, Any] = {}
    for layer in (_of_file(file, [], []), _of_environment(environ, []), _of_flags(flags)):
        try:
            for setting in layer:
                section, _, name = setting.key.partition(".")
                if section == "log" and not check(setting):
                    found[name] = converted(setting)
        except RecursionError:
            continue
    return Log(**found)


def _of_file(file: Path | None, problems: list[str], rules: list[dict[str, object]]) -> Iterator[Setting]:
    asked, file = file, file or DEFAULT_FILE
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        if asked is None and isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        problems.append(f"{file}: cannot be read: {error.strerror}")
        return
    except ValueError as error:  # tomllib.TOMLDecodeError, or UnicodeDecodeError
        problems.append(f"{file}: is not TOML: {error}")
        return
    for section, table in document.items():
        if section == "topics":
            _read_rules(table, str(file), problems, rules)
        elif section not in SECTIONS:
            what = "section" if isinstance(table, dict) else "key"
            problems.append(f"{section} ({file}): there is no such {what}{_suggest(section, [*SECTIONS, *KEYS])}")
        elif not isinstance(table, dict):
            problems.append(f"{section} ({file}): must be a table, [{section}]")
        else:
            for name, value in table.items():
                key = f"{section}.{name}"
                if key in KEYS:
                    yield Setting(key, value, str(file))
                else:
                    problems.append(f"{key} ({file}): there is no such key{_suggest(key, KEYS)}")


def _read_rules(tables: object, origin: str, problems: list[str], rules: list[dict[str, object]]) -> None:
    """Read the [[topics]] tables."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        problems.append(f"topics ({origin}): must be tables, each [[topics]]")
        return
    for number, table in enumerate(tables, 1):
        where = f"topics[{number}]"
        if "match" not in table:
            problems.append(f"{where}.match ({origin}): is missing: the topic or pattern that the rule is for")
        for name, value in table.items():
            key = RULE_KEYS.get(name)
            if key is None:
                wrong = f"{where}.{name} ({origin}): there is no such key"
                problems.append(wrong + _suggest(name, RULE_KEYS))
            else:
                problems += [f"{where}.{name} ({origin}): {mistake}" for mistake in check_value(key, value)]
        rules.append(table)


def _of_environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[Setting]:
    for name, value in sorted(environ.items()):
        if not name.startswith(PREFIX):
            continue
        if name in _VARIABLES:
            yield Setting(_VARIABLES[name], value, name, is_text=True)
        elif name.removesuffix("_FILE") in _VARIABLES:
            variable = name.removesuffix("_FILE")
            if variable in environ:
                problems.append(f"{_VARIABLES[variable]} ({name}): {variable} is set too, only one of the two may be")
                continue
            try:
                content = Path(value).read_text(encoding="utf-8").removesuffix("\n")
            except (OSError, ValueError) as error:
                problems.append(f"{_VARIABLES[variable]} ({name}): {value} cannot be read: {error}")
                continue
            yield Setting(_VARIABLES[variable], content, name, is_text=True)
        elif "__" in name.removeprefix(PREFIX) or name in _LIKELY_TYPOS:
            # A variable with no key in it, like WSBROKER_URL, is none of the broker's.
            key = name.removeprefix(PREFIX).lower().replace("__", ".")
            problems.append(f"{name} (environment): there is no such key{_suggest(key, KEYS, _variable)}")


def _of_flags(flags: Mapping[str, object]) -> Iterator[Setting]:
    for key, value in flags.items():
        if value is not None and value != ():
            yield Setting(key, value, "command line")


def _suggest(wrong: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """Name the nearest of the known words, to be put behind a message: the same key elsewhere, or one spelt like it."""
    known = list(known)
    name = wrong.rpartition(".")[2]
    nearest = [word for word in known if word.endswith(f".{name}")] or difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {written(nearest[0])}?" if nearest else ""


def _variable(key: str) -> str:
    """Give the environment variable of a key."""
    return PREFIX + key.upper().replace(".", "__")


_VARIABLES: Final = {_variable(key): key for key in KEYS}
_LIKELY_TYPOS: Final = {PREFIX + key.upper().replace(".", "_") for key in KEYS} | {
    PREFIX + key.rpartition(".")[2].upper() for key in KEYS
}
"""One underscore, or no section. Anything looser would meet what Kubernetes sets for a service of this name."""
