"""Node's `ws`, its most used WebSocket client, as a client of the broker. The tests themselves are in JavaScript."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fixtures_broker import PATIENCE, RunningBroker, start_broker

pytestmark = pytest.mark.needs("node")

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def node() -> str:
    """Path of node, with `ws` installed. Where there is none, the tests are skipped; but in CI it must be there."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        if os.environ.get("CI"):
            pytest.fail("node and npm are not installed")
        pytest.skip("node and npm are not installed")
    if not (HERE / "node_modules" / "ws").is_dir():
        subprocess.run([npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=HERE, check=True)
    return found


def test_ws_client_works_with_the_broker(node: str) -> None:
    # Long enough for a busy machine to answer in, short enough to wait for.
    limits = {"WSBROKER_LIMITS__PING_INTERVAL": "0.5", "WSBROKER_LIMITS__PING_TIMEOUT": "1"}
    with start_broker(environ=limits) as broker:
        run(node, "serving.mjs", broker)


def test_ws_client_works_with_compression(node: str) -> None:
    with start_broker(environ={"WSBROKER_SERVER__COMPRESSION": "true"}) as broker:
        run(node, "compression.mjs", broker)


def test_ws_client_gets_bye_at_a_shutdown(node: str) -> None:
    with start_broker() as broker:
        run(node, "shutdown.mjs", broker)
        assert broker.program.wait() == 0


def run(node: str, script: str, broker: RunningBroker) -> None:
    """Run the tests of a script; all must pass."""
    done = subprocess.run(
        [node, script],
        cwd=HERE,
        env={**os.environ, "BROKER_URL": broker.url, "BROKER_PID": str(broker.program.pid)},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass [1-9]", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^# skipped 0$", done.stdout, re.MULTILINE), done.stdout
