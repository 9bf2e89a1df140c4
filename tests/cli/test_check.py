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
    assert done.stderr.startswith("wsbroker: limits.max_connections: 1000 do not fit into the limit of 256 open files")
    assert done.stderr.count("\n") == 1


async def test_check_reports_in_json() -> None:
    result = await wsbroker("check", "--json", environ={"WSBROKER_LIMITS__MAX_SIZE": "x", "WSBROKER_LOG__LEVEL": "y"})
    errors = [json.loads(line) for line in result.err.splitlines()]
    assert [error["error"] for error in errors] == ["config", "config"]
    assert "limits.max_size" in errors[0]["message"]


async def test_missing_configuration_file_is_a_mistake(tmp_path: Path) -> None:
    result = await wsbroker("check", "--config", str(tmp_path / "none.toml"))
    assert result.status == 78
    assert "none.toml" in result.err
