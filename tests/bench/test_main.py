"""`python -m bench` as it is called."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import record
from bench.scenarios import SCENARIOS

pytestmark = pytest.mark.needs("peers")

ROOT = Path(__file__).parent.parent.parent


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs it."""
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_run_measures_prints_and_saves(tmp_path: Path) -> None:
    file = tmp_path / "pipelined.json"
    short = ["--repeat", "2", "--seconds", "0.05", "--retries", "0"]
    done = bench("pipelined", "--peer", "wsbroker", "--peer", "nats", *short, "--json", file)
    assert (done.returncode, done.stderr.count("pipelined: ")) == (0, 4)
    assert "One to one, pipelined" in done.stdout
    assert "wsbroker ÷ it" in done.stdout
    assert "one to one, one topic, pipelined: ratio to nats-server" in done.stdout
    saved = record.load(file)
    assert [run.peer for run in saved.runs] == ["wsbroker", "nats", "wsbroker", "nats"]
    assert saved.command.startswith("python -m bench pipelined --peer wsbroker")
    assert saved.versions["nats"]


def test_several_scenarios_are_saved_in_a_folder(tmp_path: Path) -> None:
    done = bench("pipelined", "onetoone", "--peer", "redis", "--repeat", "1", "--seconds", "0.05", "--json", tmp_path)
    assert done.returncode == 0
    assert {file.name for file in tmp_path.iterdir()} == {"pipelined.json", "onetoone.json"}


def test_failed_run_is_reported_and_sets_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho no luck\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    done = bench("pipelined", "--peer", "nats", "--repeat", "1", "--json", tmp_path / "out.json")
    assert done.returncode == 1
    assert "failed: nats, 1 subscriber, window 256, 128 B: the server ended with status 3" in done.stderr
    (failed,) = record.load(tmp_path / "out.json").failed
    assert "no luck" in failed.error


def test_missing_peer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = bench("--list")
    assert done.returncode == 0
    assert "missing: nats (there is no nats-server; apt install nats-server)" in done.stdout
    assert "missing: nchan (there is no nginx; apt install nginx-light libnginx-mod-nchan)" in done.stdout


def test_list_shows_scenarios_and_peers() -> None:
    listed = bench("--list").stdout
    assert all(f"\n{name} " in listed for name in SCENARIOS)


@pytest.mark.parametrize("arguments", [["no-such-scenario"], ["--peer", "nobody"], ["fanout", "--repeat", "0"]])
def test_unknown_scenario_or_peer_is_refused(arguments: list[str]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert "error" in done.stderr


def test_interrupt_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A server that says its process id, and then does not listen.
    said = tmp_path / "said"
    os.mkfifo(said)
    program = tmp_path / "nats-server"
    program.write_text(f"#!/bin/sh\necho $$ > {said}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command = [sys.executable, "-m", "bench", "pipelined", "--peer", "nats", "--repeat", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    server = int(said.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    # It is killed with its parent, which may have gone a moment earlier; then somebody has to take note of its end.
    stat = Path(f"/proc/{server}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.01)
