"""The configuration described: a commented file with every default, and the JSON Schema of the file."""

from __future__ import annotations

import textwrap
from typing import Any

import msgspec

from broker.config.keys import KEYS, RULE_KEYS, SECTIONS, Key
from broker.config.schema import RELOADS, Config, TopicRule


def default_toml() -> str:
    """Give a file with every key, its default and what it is for. Read back, it is the default configuration."""
    lines = ["# Configuration of wsbroker. Every value here is the default.", ""]
    for section, struct in SECTIONS.items():
        lines += [f"# {struct.__doc__}", f"[{section}]", ""]
        for key in KEYS.values():
            if key.section != section:
                continue
            lines += _comment(key)
            example = f"# {key.name} = {_toml(key.example)}"
            lines += [example if key.default is None else f"{key.name} = {_toml(key.default)}", ""]
    lines += [f"# {TopicRule.__doc__}", "# [[topics]]", ""]
    for key in RULE_KEYS.values():
        lines += [*_comment(key), f"# {key.name} = {_toml('prices.>' if key.name == 'match' else key.example)}", ""]
    return "\n".join(lines)


def _comment(key: Key) -> list[str]:
    about = f"{key.description} Allowed: {key.allowed}. {RELOADS[key.reload]}"
    return textwrap.wrap(about, 100, initial_indent="# ", subsequent_indent="# ")


def schema() -> dict[str, Any]:
    """Give the JSON Schema (2020-12) of the file, for editors and tests."""
    result = msgspec.json.schema(Config)
    for key in KEYS.values():
        if key.default is not None:  # msgspec leaves out defaults that are lists
            result["$defs"][SECTIONS[key.section].__name__]["properties"][key.name]["default"] = key.default
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _toml(value: object) -> str:
    """Write a default in TOML; JSON is TOML for numbers, booleans, and the strings and lists that occur."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()
