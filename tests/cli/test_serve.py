"""`wsbroker serve`: its options and its mistakes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_command import Result, finish, start, wsbroker

ROOT = Path(__file__).parent.parent.parent


async def test_serve_accepts_addresses_and_log_format(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"]
    listen = [word for address in addresses for word in ("--listen", address)]
    async with start("serve", *listen, "--log-format", "json", "--log-level", "debug") as process:
        assert process.stderr is not None
        entries: list[dict[str, Any]] = []
        while not entries or entries[-1]["event"] != "ready":
            entries.append(json.loads(await process.stderr.readline()))
        assert [entry["address"] for entry in entries if entry["event"] == "listening"] == addresses
        for address in addresses:
            assert await wsbroker("pub", "t", "1", "--url", address) == Result(0, "", "")
        process.send_signal(signal.SIGINT)
        assert (await finish(process)).status == 0


@pytest.mark.parametrize("command", ["serve", "check"])
async def test_every_mistake_in_the_configuration_is_reported(command: str, tmp_path: Path) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text("[limits]\nmax_sise = 1\nmax_queue = 0\n")
    environ = {"WSBROKER_LOG__LEVEL": "loud"}
    result = await wsbroker(command, "--config", str(file), environ=environ)
    assert (result.status, result.out) == (78, "")
    lines = result.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("wsbroker: ") for line in lines)
    for key in ("limits.max_sise", "limits.max_queue", "log.level"):
        assert key in result.err


async def test_serve_reports_mistakes_in_its_log_format() -> None:
    result = await wsbroker("serve", "--listen", "nowhere", "--log-format", "json")
    assert result.status == 78
    error = json.loads(result.err)
    assert error["event"] == "cannot start"
    assert "server.listen" in error["problem"]


async def test_serve_does_not_start_where_it_cannot_listen(tmp_path: Path) -> None:
    result = await wsbroker("serve", "--listen", f"unix:{tmp_path}/no/such/folder")
    assert result.status == 1
    assert len(result.err.splitlines()) == 1
