"""`wsbroker config`."""

from __future__ import annotations

import json
from pathlib import Path

from broker.config import load
from broker.config.describe import default_toml, schema
from tests.fixtures_command import Result, wsbroker

ROOT = Path(__file__).parent.parent.parent


async def test_default_configuration_file_is_valid(tmp_path: Path) -> None:
    result = await wsbroker("config", "default")
    assert result == Result(0, default_toml(), "")
    file = tmp_path / "wsbroker.toml"
    file.write_text(result.out)
    assert load(file, {}, {}) == load(None, {}, {})


async def test_the_schema_is_one_json_document() -> None:
    result = await wsbroker("config", "schema")
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out) == json.loads(json.dumps(schema()))
