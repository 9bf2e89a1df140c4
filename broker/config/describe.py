"""The configuration described: a commented file with every default, and the JSON Schema of the file."""

from __future__ import annotations

import textwrap
from typing import Any

import msgspec

from broker.config import toml
from broker.config.keys import KEYS, SECTIONS, TABLE_KEYS, TABLES, Key
from broker.config.schema import RELOADS, Config


def default_toml() -> str:
    """Give a file with every key, its default and what it is for. Read back, it is the default configuration."""
    lines = ["# Configuration of wsbroker. Every value here is the default.", ""]
    for section, struct in SECTIONS.items():
        lines += [f"# {struct.__doc__}", f"[{section}]", ""]
        for key in KEYS.values():
            if key.section != section:
                continue
            lines += _comment(key)
            example = f"# {key.name} = {toml.dump(key.example)}"
            lines += [example if key.default is None else f"{key.name} = {toml.dump(key.default)}", ""]
    for table, struct in TABLES.items():
        lines += [f"# {struct.__doc__}", f"# [[{table}]]", ""]
        for key in TABLE_KEYS[table].values():
            lines += [*_comment(key), f"# {key.name} = {toml.dump(key.example)}", ""]
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
