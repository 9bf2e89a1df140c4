"""The log: whom it may hold up (nobody), what it holds back, and that the docs know each of its entries."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from structlog.testing import capture_logs
from websockets.asyncio.client import connect, unix_connect
from websockets.exceptions import InvalidMessage

from broker.health import MEMORY_EVENTS
from broker.log import (
    PRIORITIES,
    LoggingHandler,
    LogRateLimiter,
    StandardError,
    add_priority,
    is_journal,
    log_unhandled,
    render_json,
)
from tests.fixtures_daemon import TIMEOUT, is_served, launched
from tests.net.harness import until

ROOT = Path(__file__).parent.parent


# Where it goes


async def test_broker_without_standard_error_serves_and_sends_no_log_to_clients(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    command = f'exec "{sys.executable}" -m broker serve --listen unix:{path} --log-level debug 0<&- 1>&- 2>&-'
    process = await asyncio.create_subprocess_shell(command)
    try:
        await until(lambda: is_served(path))
        async with unix_connect(str(path)) as client:
            assert json.loads(await client.recv())["op"] == "welcome"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_closed_log_pipe_does_not_stop_the_broker() -> None:
    async with launched("--listen", "127.0.0.1:0", "--log-level", "debug") as daemon:
        await daemon.started()
        pipe = daemon.process._transport.get_pipe_transport(2)  # type: ignore[attr-defined]
        pipe.close()
        async with connect(daemon.url) as client:
            assert json.loads(await client.recv())["op"] == "welcome"
        daemon.signal(signal.SIGTERM)
        assert await asyncio.wait_for(daemon.process.wait(), TIMEOUT) == 0


UNREAD = """
import sys
from broker.config import Log
from broker.log import log, set_up_log

set_up_log(Log(format=FORMAT, level="error"))
for step in sys.stdin:
    for number in range(int(step)):
        log.error("x" * SIZE + str(number), number=number)
    print("done", flush=True)
"""


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("size", [50, 100_000])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_blocked_log_drops_lines_and_reports_the_count(form: str, size: int, kind: str) -> None:
    program = UNREAD.replace("FORMAT", repr(form)).replace("SIZE", str(size))
    # Both ends stay open here, and nobody reads.
    ours, its = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=its
    )

    async def write(count: int) -> None:
        """Have it log so many lines, which must not block."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"%d\n" % count)
        assert await asyncio.wait_for(process.stdout.readline(), TIMEOUT) == b"done\n"

    def read() -> str:
        """All that is there."""
        found = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(ours, 1 << 20):
                found += piece
        return found.decode()

    try:
        os.set_blocking(ours, False)
        await write(10_000)
        assert os.get_blocking(its)
        first = read()
        await write(2)
        second = read()
    finally:
        process.kill()
        await process.communicate()
        os.close(ours)
        os.close(its)

    whole = [line for line in first.splitlines(keepends=True) if "number" in line and line.endswith("\n")]
    partial_line = first[len("".join(whole)) :]
    assert "number" not in partial_line
    dropped = 10_000 - len(whole)
    assert dropped > 0
    # What was cut off is ended before anything else comes.
    assert second.startswith("\n") == bool(partial_line)
    note, *rest = second.strip().splitlines()
    assert "log lines dropped" in note
    assert re.search(rf"lines['\"]?[=:]{dropped}\b", note), note
    # As many of the new ones as there is room for, without a wait in between.
    assert len(rest) == 2 if size == 50 else 1 <= len(rest) <= 2
    assert rest[0].count("x") == size or size > 50


async def test_blocked_log_does_not_stop_the_broker(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    source, sink = os.pipe()
    try:
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(sink, False)
            while os.write(sink, b"x" * 4096):
                pass
        os.set_blocking(sink, True)
        command = [sys.executable, "-m", "broker", "serve", "--listen", f"unix:{path}"]
        process = await asyncio.create_subprocess_exec(*command, stderr=sink)
        try:
            await until(lambda: is_served(path))
            async with unix_connect(str(path)) as client:
                assert json.loads(await client.recv())["op"] == "welcome"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), TIMEOUT) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    finally:
        os.close(source)
        os.close(sink)


def test_partially_written_line_is_continued(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    StandardError().msg("one line of more than seven bytes")
    monkeypatch.undo()
    assert capfd.readouterr().err == "one line of more than seven bytes\n"


FAULT = """
import asyncio, logging, uvloop
from broker.config import Log
from broker.log import log_unhandled, set_up_log

def handle(payload):
    raise RuntimeError("a fault")

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_unhandled)
    loop.call_soon(handle, b"the-payload")
    await asyncio.sleep(0)
    logging.getLogger("a.library").warning("it is %s", "late")

set_up_log(Log(format=FORMAT))
with asyncio.Runner(loop_factory=FACTORY) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("factory", ["uvloop.new_event_loop", "asyncio.new_event_loop"])
@pytest.mark.parametrize("form", ["text", "json"])
async def test_exception_is_logged_with_its_traceback_and_without_payloads(form: str, factory: str) -> None:
    program = FAULT.replace("FORMAT", repr(form)).replace("FACTORY", factory)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE)
    said = (await process.communicate())[1].decode()
    assert process.returncode == 0
    assert "RuntimeError: a fault" in said
    assert "in handle" in said
    assert "the-payload" not in said
    assert "it is late" in said
    if form == "json":
        fault, library = map(json.loads, said.splitlines())
        assert fault["level"] == "error"
        assert library["level"] == "warning"
        assert library["logger"] == "a.library"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        (2**70, 2**70),
        ("\udcff", "\udcff"),
        (Path("/a"), "/a"),
        ({1: {2}}, {"1": "{2}"}),
        (b"x", "b'x'"),
    ],
)
def test_any_value_can_be_written_as_json(value: object, written: object) -> None:
    line = render_json(None, "info", {"event": "e", "timestamp": "t", "level": "info", "value": value})
    assert json.loads(line) == {"timestamp": "t", "level": "info", "event": "e", "value": written}


# What is held back


class Clock:
    """Goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def passed(few: LogRateLimiter, event: str, method: str = "warning", **more: Any) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = few(None, method, {"event": event, **more})
    except structlog.DropEvent:
        return None
    return entry


def test_frequent_entries_are_suppressed_and_counted() -> None:
    clock = Clock()
    few = LogRateLimiter(clock)
    assert sum(passed(few, "a") is not None for _ in range(1000)) == LogRateLimiter.LIMIT
    assert passed(few, "b") == {"event": "b"}
    clock.now += LogRateLimiter.PERIOD
    assert passed(few, "a") == {"event": "a", "suppressed": 1000 - LogRateLimiter.LIMIT}
    assert passed(few, "a") == {"event": "a"}
    clock.now += LogRateLimiter.PERIOD
    assert passed(few, "a") == {"event": "a"}


def test_debug_entries_are_not_suppressed() -> None:
    few = LogRateLimiter(Clock())
    assert all(passed(few, "a", "debug") for _ in range(1000))


def test_entries_of_libraries_are_limited_by_logger() -> None:
    few = LogRateLimiter(Clock())
    assert sum(passed(few, f"line {n}", logger="asyncio") is not None for n in range(1000)) == LogRateLimiter.LIMIT


def test_number_of_remembered_kinds_is_bounded() -> None:
    few = LogRateLimiter(Clock())
    for n in range(10 * LogRateLimiter.MAX_KINDS):
        assert passed(few, f"event {n}")
        assert len(few._seen) <= LogRateLimiter.MAX_KINDS


# The journal


def test_each_line_has_its_priority() -> None:
    assert add_priority(None, "error", "a\n  b") == "<3>a\n<3>  b"
    assert add_priority(None, "info", b"{}") == b"<6>{}"
    assert PRIORITIES["debug"] > PRIORITIES["info"] > PRIORITIES["warning"] > PRIORITIES["error"]


def test_journal_stream_variable_must_match_standard_error() -> None:
    assert not is_journal("")
    assert not is_journal("8:1")
    found = os.fstat(2)
    assert is_journal(f"{found.st_dev}:{found.st_ino}")


@pytest.mark.parametrize("form", ["text", "json"])
async def test_under_systemd_lines_have_a_priority(form: str) -> None:
    # The broker's standard error is what the variable says: 2 is a copy of it.
    program = 'exec env JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) "$0" -m broker serve "$@"'
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", program, sys.executable, "--listen", "127.0.0.1:0", "--log-format", form),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    line = (await asyncio.wait_for(process.stderr.readline(), TIMEOUT)).decode()
    process.send_signal(signal.SIGTERM)
    said = line + (await process.communicate())[1].decode()
    assert process.returncode == 0
    for text in said.splitlines():
        assert text.startswith("<6>")
        if form == "json":
            assert "timestamp" in json.loads(text[3:])
        else:
            assert text.startswith("<6>[info")


# The docs


def entries() -> dict[str, str]:
    """The name of each entry that the broker writes, with its level."""
    found = dict.fromkeys(MEMORY_EVENTS, "warning")
    found[MEMORY_EVENTS[0]] = "info"
    for path in (ROOT / "broker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "log" and node.func.attr != "log":
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    found[str(name.value)] = node.func.attr.replace("exception", "error")
                elif isinstance(name, ast.JoinedStr):
                    found[ast.unparse(name)[2:-1].replace("{address}", "…")] = node.func.attr
    return found


@pytest.mark.parametrize("form", ["text", "json"])
def test_each_mistake_is_written_to_a_small_pipe_that_is_read_late(form: str, tmp_path: Path) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text("[limits]\n" + "".join(f"wrong{number} = 1\n" for number in range(100)))
    ours, its = os.pipe()
    fcntl.fcntl(its, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
    command = [sys.executable, "-m", "broker", "serve", "--log-format", form, "--config", str(file)]
    with os.fdopen(ours) as reader, subprocess.Popen(command, stderr=its) as process:
        os.close(its)
        # Once there is no room, it sleeps until somebody reads, or has ended.
        while process.poll() is None and not (waiting_bytes(ours) and is_sleeping(process.pid)):
            time.sleep(0.01)
        assert reader.read().count("there is no such key") == 100
    assert process.returncode == 78


def waiting_bytes(pipe: int) -> int:
    """How many bytes are in a pipe."""
    answer = bytearray(4)
    fcntl.ioctl(pipe, termios.FIONREAD, answer)
    return int.from_bytes(answer, sys.byteorder)


def is_sleeping(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_each_entry_is_documented() -> None:
    text = (ROOT / "docs" / "logs.md").read_text()
    assert dict(re.findall(r"^\| `([^`]+)` \| (debug|info|warning|error) \|", text, re.MULTILINE)) == entries()


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("argument", "status", "problems"),
    [
        ("--listen=127.0.0.1:TAKEN", 1, 1),
        ("--config=FILE", 78, 2),  # mistakes of the file, which also says how the log is written
        ("--listen=systemd", 1, 1),
    ],
)
async def test_startup_failure_under_systemd_has_priority_error(
    form: str, argument: str, status: int, problems: int, tmp_path: Path
) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text(f'[log]\nformat = "{form}"\n[limits]\nmax_sise = 1\nmax_size = 1\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = argument.replace("TAKEN", str(taken.getsockname()[1])).replace("FILE", str(file))
        program = 'exec env JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) "$0" -m broker serve "$@"'
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", program, sys.executable, given),
            env={**os.environ, **({} if "FILE" in argument else {"WSBROKER_LOG__FORMAT": form})},
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(process.communicate(), TIMEOUT)
    lines = said.decode().splitlines()
    assert process.returncode == status
    assert len(lines) == problems
    assert all(line.startswith("<3>") for line in lines)
    for line in lines:
        if form == "json":
            entry = json.loads(line[3:])
            assert list(entry)[:4] == ["timestamp", "level", "event", "problem"]
            assert (entry["level"], entry["event"]) == ("error", "cannot start")
        else:
            assert line.startswith("<3>wsbroker: ")


class Refused(InvalidMessage):
    """What a library raises for a client, in a subclass."""


@pytest.mark.parametrize(
    "error", [BadHttpMessage("SECRET"), LineTooLong(b"SECRET"), Refused("SECRET"), ssl.SSLError(1, "SECRET")]
)
@pytest.mark.parametrize("name", ["aiohttp.server", "asyncio", "websockets.server", "some.library"])
def test_client_error_of_a_library_is_at_debug_and_without_its_text(error: Exception, name: str) -> None:
    with capture_logs() as logs:
        handler = LoggingHandler()
        record = logging.LogRecord(name, logging.ERROR, "", 0, "from %s", ("SECRET",), (type(error), error, None))
        handler.emit(record)
        log_unhandled(cast(asyncio.AbstractEventLoop, None), {"message": "SECRET", "exception": error})
    assert [entry["log_level"] for entry in logs] == ["debug", "debug"]
    assert [entry["event"] for entry in logs] == ["client error", "client error"]
    assert "SECRET" not in str(logs)


@pytest.mark.parametrize("error", [ValueError("a"), ConnectionResetError("a"), KeyError("a")])
def test_other_errors_of_a_library_stay_errors(error: Exception) -> None:
    with capture_logs() as logs:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "b", (), (type(error), error, None))
        LoggingHandler().emit(record)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [("error", "b")]
