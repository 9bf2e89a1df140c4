"""`wsbroker bench` against the real broker: what it measures and shows, and what it says where it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest

from broker.cli.measure import Broker, Latency, Measured, Outcome, Plan, _fail, arguments, explore, find_broker
from broker.cli.measure_view import duration, rate, rows, table, warnings
from tests.fixtures_broker import ROOT, RunningBroker, start_broker
from tests.fixtures_certificates import make_pair
from wsbroker_client.errors import ClientError, Closed, LoadFailed, Refused, Unreachable

pytestmark = pytest.mark.needs("openssl")

PATIENCE = 60.0
PLAN = Plan("ws://127.0.0.1:1", subscribers=10, topics=2, window=16, rate=None, payload=128, seconds=0.2)


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    with start_broker() as running:
        yield running


def bench(*arguments: str, url: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "broker", "bench", "--url", url, "--seconds", "0.2", *arguments]
    environ = {**environment(), **variables}
    ended = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WSBROKER_")}
    return {**ours, "PYTHONWARNINGS": "default"}


def figures(ended: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert isinstance(found, dict)
    return found


def measured(**changed: object) -> Outcome:
    """The outcome of a run that was not made."""
    latency = Latency(p50=100.0, p90=200.0, p99=1500.0, p999=1600.0, max=2_000_000.0)
    values: dict[str, object] = {
        "seconds": 2.0,
        "connect_seconds": 0.0123,
        "publishes": 1000,
        "deliveries": 5000,
        "deliveries_per_second": 2500.0,
        "unsent": 0,
        "load_cpu": 0.5,
        "server_cpu": 0.75,
        "server_rss": 42_000_000,
        "delivery_us": latency,
    }
    return Outcome(PLAN, "wsbroker/1", Broker(pid=7, name="wsbroker"), Measured(**{**values, **changed}))  # type: ignore[arg-type]


# A run


def test_measures_a_running_broker(broker: RunningBroker) -> None:
    found = figures(bench("--json", "--subscribers", "10", "--topics", "5", "--window", "20", url=broker.url))
    assert (found["subscribers"], found["topics"], found["window"], found["rate"]) == (10, 5, 20, None)
    assert found["broker_pid"] == broker.program.pid
    deliveries, publishes = found["deliveries_per_second"], found["publishes_per_second"]
    assert isinstance(deliveries, float)
    assert isinstance(publishes, float)
    # Two subscribers of each topic. Of the last publishes, only some of the deliveries came in time.
    assert deliveries == pytest.approx(2 * publishes, rel=0.2)
    latency = found["latency_us"]
    assert isinstance(latency, dict)
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert found["broker_rss"] > 10_000_000  # type: ignore[operator]


def test_publishes_at_a_rate(broker: RunningBroker) -> None:
    found = figures(bench("--json", "--subscribers", "4", "--rate", "200", "--seconds", "1", url=broker.url))
    assert (found["window"], found["rate"]) == (None, 200.0)
    # At most what is due; how much of it, is a matter of how busy this machine is.
    assert 0 < found["publishes_per_second"] < 250  # type: ignore[operator]


def test_shows_a_table_and_plain_lines_where_there_is_no_terminal(broker: RunningBroker) -> None:
    ended = bench("--subscribers", "3", "--payload", "16", "--seconds", "1", url=broker.url)
    assert ended.returncode == 0
    assert "\x1b" not in ended.stdout + ended.stderr
    assert re.search(r"^ +1 s  (warmup|measuring): \S+( [kM])? deliveries/s, p50 ", ended.stderr, re.MULTILINE)
    title, *lines = ended.stdout.splitlines()
    name = Path(f"/proc/{broker.program.pid}/comm").read_text().strip()
    assert re.fullmatch(r"wsbroker/\S+: 3 subscribers, 1 topic, window 16, 16 bytes, 1\.\d s", title)
    assert [line.split("  ")[0].rstrip() for line in lines if not line.startswith("The load")] == [
        "deliveries/s",
        "publishes/s",
        *(f"latency {name}" for name in ("p50", "p90", "p99", "p99.9", "max")),
        "connecting 4",
        "CPU of this load, of one core",
        # Its process is called after the interpreter here; an installed one is called wsbroker.
        *(f"{what} of the broker ({name}, process {broker.program.pid})" for what in ("CPU", "memory")),
    ]


def test_shows_a_bar_on_a_terminal(broker: RunningBroker) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "broker", "bench", "--url", broker.url, "--subscribers", "3", "--seconds", "0.6"]
    environ = {**environment(), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = read_all(ours)
        assert process.wait(PATIENCE) == 0
    assert "connecting" in shown
    assert "━" in shown
    assert re.search(r"deliveries/s, p50 \S+ .s", shown)
    assert "latency p99.9" in shown


def read_all(descriptor: int) -> str:
    """Everything that is written to a terminal until nobody has it open any more."""
    found = b""
    try:
        while data := os.read(descriptor, 65536):
            found += data
    except OSError:  # how Linux says so
        pass
    os.close(descriptor)
    return found.decode()


def test_runs_through_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    with start_broker("--listen", f"unix:{path}") as running:
        found = figures(bench("--json", "--subscribers", "5", url=f"unix:{path}"))
        assert found["broker_pid"] == running.program.pid


def test_runs_over_tls(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    environ = {"WSBROKER_SERVER__CERTIFICATE": str(pair.certificate), "WSBROKER_SERVER__KEY": str(pair.key)}
    with start_broker(environ=environ) as running:
        url = f"wss://127.0.0.1:{running.port}"
        figures(bench("--json", "--subscribers", "5", "--ca", str(pair.certificate), url=url))
        # The load program would not mind; the client that goes ahead of it does.
        refused = bench("--subscribers", "5", url=url)
    assert refused.returncode == 69
    assert "its certificate is not trusted" in refused.stderr


def test_uses_topics_of_its_own(broker: RunningBroker) -> None:
    command = [sys.executable, "-m", "broker", "sub", ">", "--url", broker.url]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = threading.Event()
        topics: set[str] = set()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if message["op"] == "event":
                    topics.add(message["topic"])
                    seen.set()

        reader = threading.Thread(target=read)
        reader.start()
        # It is subscribed once it has seen something: the first runs may come too early.
        for _ in range(10):
            assert bench("--subscribers", "2", "--rate", "50", url=broker.url).returncode == 0
            if seen.is_set():
                break
        process.send_signal(signal.SIGINT)
        reader.join()
    assert topics
    assert all(re.fullmatch(r"bench\.[0-9a-f]{8}\.t00000", topic) for topic in topics)


def test_ends_by_ctrl_c_and_leaves_no_connection(broker: RunningBroker) -> None:
    command = [sys.executable, "-m", "broker", "bench", "--url", broker.url, "--subscribers", "20", "--seconds", "60"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert "deliveries/s" in first
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert "Warning" not in err
    # Their sockets have gone with them.
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()


# What goes wrong


def test_unreachable_broker_is_reported() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        ended = bench(url=f"ws://127.0.0.1:{bound.getsockname()[1]}")
    assert ended.returncode == 69
    assert re.fullmatch(r"wsbroker: cannot connect to \S+: Connection refused\n", ended.stderr)


@pytest.mark.parametrize(("status", "code"), [(401, 77), (403, 77), (503, 75)])
def test_refused_handshake_is_reported(status: int, code: int) -> None:
    class Refuse(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.handle_request).start()
        ended = bench("--json", url=f"ws://127.0.0.1:{server.server_port}")
    assert ended.returncode == code
    assert json.loads(ended.stderr)["status"] == status


def test_connection_limit_of_the_broker_is_reported() -> None:
    with start_broker(environ={"WSBROKER_LIMITS__MAX_CONNECTIONS": "8"}) as running:
        ended = bench("--subscribers", "50", url=running.url)
    assert ended.returncode == 75
    assert re.search(r"wsbroker: with \d+ of 51 connections open the broker refused one: HTTP 503: ", ended.stderr)


def test_publish_over_max_size_is_reported() -> None:
    with start_broker(environ={"WSBROKER_LIMITS__MAX_SIZE": "1000"}) as running:
        ended = bench("--payload", "1000", url=running.url)
    assert ended.returncode == 65
    assert "the broker takes at most 1,000" in ended.stderr


def test_broker_shutdown_under_load_is_reported() -> None:
    with start_broker() as running:
        command = [sys.executable, "-m", "broker", "bench", "--url", running.url, "--seconds", "60"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stderr is not None
            assert "deliveries/s" in process.stderr.readline()
            running.program.kill()
            _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 69
    assert re.search(r"wsbroker: with 101 of 101 connections open: .* was (lost|ended)", err)


def test_limit_of_open_files_is_checked_first() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    command = [sys.executable, "-m", "broker", "bench", "--subscribers", "1000"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert ended.returncode == 2
    assert "1000 subscribers need 1017 open files, and the limit is 256 (ulimit -Hn)" in ended.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--window", "4", "--rate", "5"], "--window and --rate exclude each other"),
        (["--subscribers", "10", "--topics", "3"], "10 is not a multiple of the 3 topics"),
        (["--payload", "1"], "1 is not in the range 2<=x<=65000"),
        (["--rate", "0"], "0.0 is not in the range"),
    ],
)
def test_invalid_command_line_is_reported(wrong: list[str], said: str) -> None:
    ended = bench(*wrong, url="ws://127.0.0.1:1")
    assert ended.returncode == 2
    assert said in re.sub(r"\s+", " ", ended.stderr)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ("the server refused the handshake: HTTP/1.1 503 Service Unavailable", Refused, "HTTP 503: the broker is full"),
        ("connection 4 of 3: Connection refused", Unreachable, "with 0 of 11 connections open: connection 4 of 3"),
        ("connect: Cannot assign requested address", Unreachable, "Cannot assign requested address"),
        ("connection 4 was ended by the server", Closed, "connection 4 was ended by the server"),
        ("connection 4 was closed by the server: 4000 slow_consumer", Closed, "4000 slow_consumer"),
        ('connection 4 got something that is not an event: {"op":"gap","topic":"t"}', LoadFailed, "a lower --rate"),
        ("no delivery for 5.0 s, with 1 of 2 publishes done", LoadFailed, "no delivery for 5.0 s"),
        ("", LoadFailed, "without a word"),
    ],
)
def test_error_output_of_the_load_program_is_reported(words: str, kind: type[ClientError], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        _fail(f"load: {words}\n" if words else "", PLAN, None)


def test_a_proxy_is_refused() -> None:
    ended = bench(url="ws://broker.example", HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    assert ended.returncode == 69
    assert "a proxy for broker.example" in ended.stderr


# Details


async def test_a_token_is_not_on_any_command_line(broker: RunningBroker) -> None:
    target = await explore(Plan(broker.url, 2, 1, 1, None, 16, 0.1))
    plan = Plan(broker.url, 2, 1, 1, None, 16, 0.1, token="secret")
    assert "--header=Authorization: Bearer secret" in arguments(plan, target)
    from broker.cli.load import command_by_input

    assert not any("secret" in word for word in command_by_input())


async def test_whole_url_is_used(broker: RunningBroker) -> None:
    target = await explore(Plan(f"ws://localhost:{broker.port}/?a=b", 2, 1, 1, None, 16, 0.1))
    assert (target.host, target.path, target.tls) == (f"localhost:{broker.port}", "/?a=b", False)
    assert target.address in (f"127.0.0.1:{broker.port}", f"[::1]:{broker.port}")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_finds_the_server_process(family: socket.AddressFamily) -> None:
    with connected(family, "::1" if family == socket.AF_INET6 else "127.0.0.1") as client:
        assert find_broker(client).pid == os.getpid()


def test_reports_why_the_server_process_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text("  sl  local_address rem_address\n")
    with connected(socket.AF_INET, "127.0.0.1") as client:
        assert find_broker(client, tmp_path).why_not == "it is on another machine"
        ours, theirs = (hexadecimal(name) for name in (client.getsockname(), client.getpeername()))
        line = f"   0: {theirs} {ours} 01 00000000:00000000 00:00000000 00000000     0        0 4711 1\n"
        (tmp_path / "net" / "tcp").write_text("head\n" + line)
        assert find_broker(client, tmp_path).why_not == "its process belongs to another user"


@contextlib.contextmanager
def connected(family: socket.AddressFamily, host: str) -> Iterator[socket.socket]:
    """A client whose other end is in this process."""
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as client,
        listener.accept()[0],
    ):
        yield client


def hexadecimal(name: tuple[str, int]) -> str:
    word = int.from_bytes(socket.inet_aton(name[0]), sys.byteorder)
    return f"{word:08X}:{name[1]:04X}"


def test_warns_about_unreliable_results() -> None:
    assert warnings(measured()) == []
    (busy,) = warnings(measured(load_cpu=0.95))
    assert "The load program was busy all the time" in busy
    late_one = msgspec.structs.replace(measured(unsent=12), plan=msgspec.structs.replace(PLAN, rate=500.0))
    (late,) = warnings(late_one)
    assert "12 publishes were not sent in time" in late
    unknown = Outcome(PLAN, "wsbroker/1", Broker(why_not="it is on another machine"), measured().measured)
    assert warnings(unknown) == ["CPU and memory of the broker are not known: it is on another machine."]
    assert dict(rows(unknown))["CPU of the broker"] == "-"
    assert "it is on another machine" in table(unknown)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (rate, 950.0, "950"),
        (rate, 216_400.0, "216 k"),
        (rate, 3_050_000.0, "3.05 M"),
        (duration, 12.0, "12 µs"),
        (duration, 1_234.0, "1.2 ms"),
        (duration, 2_340_000.0, "2.34 s"),
    ],
)
def test_figures_have_their_unit(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text
