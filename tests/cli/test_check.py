"""`wsbroker check`."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures_command import Result, wsbroker

ROOT = Path(__file__).parent.parent.parent


async def test_check_accepts_a_valid_configuration() -> None:
    result = await wsbroker("check", environ={"WSBROKER_SERVER__LISTEN": "127.0.0.1:1,unix:/run/x"})
    assert result == Result(0, "The configuration is good: serve listens on 127.0.0.1:1, unix:/run/x.\n", "")


def few_files() -> None:
    """So many open files may a process have, and no more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


@pytest.mark.parametrize("command", [["check"], ["serve", "--listen", "127.0.0.1:0"]])
def test_check_reports_too_many_connections_like_serve(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "broker", *command],
        cwd=ROOT,
        env={**os.environ, "WSBROKER_LIMITS__MAX_CONNECTIONS": "1000"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=few_files,
    )
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(
        "wsbroker: limits.max_connections (WSBROKER_LIMITS__MAX_CONNECTIONS): "
        "1000 do not fit into the limit of 256 open files"
    )
    assert done.stderr.count("\n") == 1


async def test_check_reports_in_json() -> None:
    result = await wsbroker("check", "--json", environ={"WSBROKER_LIMITS__MAX_SIZE": "x", "WSBROKER_LOG__LEVEL": "y"})
    errors = [json.loads(line) for line in result.err.splitlines()]
    assert [error["error"] for error in errors] == ["config", "config"]
    assert (errors[0]["key"], errors[0]["variable"]) == ("limits.max_size", "WSBROKER_LIMITS__MAX_SIZE")
    assert errors[1] == {
        "error": "config",
        "message": 'must be one of "debug", "info", "warning", "error", not "y"',
        "key": "log.level",
        "variable": "WSBROKER_LOG__LEVEL",
    }


async def test_missing_configuration_file_is_a_mistake(tmp_path: Path) -> None:
    result = await wsbroker("check", "--config", str(tmp_path / "none.toml"))
    assert result.status == 78
    assert "none.toml" in result.err


async def test_every_mistake_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text(
        "[limits]\nmax_queue = 100000\nmax_sise = 1\n[[topics]]\nmatch = 'a'\n[[topics]]\nmatch = 'b..c'\n"
        "[[topics]]\nmatch = 'a'\n[server]\n\ncertificate = 'none.pem'\nkey = 'none.key'\n"
    )
    result = await wsbroker(
        "check", "--config", str(file), "--json", environ={"WSBROKER_LIMITS__MAX_CONNECTIONS": "9999999"}
    )
    errors = [json.loads(line) for line in result.err.splitlines()]
    assert (result.status, {error.get("file") for error in errors}) == (78, {str(file), None})
    assert {error["key"]: error.get("line", error.get("variable")) for error in errors} == {
        "limits.max_queue": 2,
        "limits.max_sise": 3,
        "topics[2].match": 7,
        "topics[3].match": 9,
        "server.certificate": 12,
        "server.key": 13,
        "limits.max_connections": "WSBROKER_LIMITS__MAX_CONNECTIONS",
    }
