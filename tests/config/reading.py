"""What the tests of the configuration read it with, and its documentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from broker.config import Config, load
from broker.config.describe import schema
from broker.config.keys import SECTIONS, TABLES
from broker.config.schema import Reload
from broker.errors import ConfigError

DOCUMENTATION = (Path(__file__).parent.parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")

KEYS = [f"{section}.{name}" for section, struct in SECTIONS.items() for name in struct.__struct_fields__]


def problems(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(file, environ or {}, flags or {})
    return [str(problem) for problem in raised.value.problems]


def setting(loaded: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(loaded, section), name)


def reload_of(section: str, name: str) -> Reload:
    """What the JSON Schema says about a reload."""
    struct = {**SECTIONS, **TABLES}[section]
    found: Reload = schema()["$defs"][struct.__name__]["properties"][name]["x-reload"]
    return found


def shown_reload(section: str, name: str) -> str:
    return reload_of(section, name).replace("_", " ")
