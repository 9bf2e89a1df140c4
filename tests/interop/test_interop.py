"""`make interop` itself: libraries that the tests have anyway, and faults that it must find."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from tests.fixtures_broker import start_broker
from tests.interop.__main__ import main
from tests.interop.kits import KITS, MissingError, curl, python_program
from tests.interop.libraries import LIBRARIES, STEPS, Library
from tests.interop.trial import Outcome, read, try_library

BY_NAME = {library.name: library for library in LIBRARIES}
INSTALLED = ("websockets", "aiohttp", "picows")
WEBSOCKETS = BY_NAME["websockets"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compressed"])
def broker(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """The URL of a broker, and whether it compresses."""
    compression: bool = request.param
    with start_broker(environ={"WSBROKER_SERVER__COMPRESSION": str(compression).lower()}) as running:
        yield running.url, compression


@pytest.mark.parametrize("name", INSTALLED)
def test_installed_library_passes(name: str, broker: tuple[str, bool]) -> None:
    library, (url, compression) = BY_NAME[name], broker
    outcome = try_library(library, python_program(library), url, compression=compression)
    assert outcome.failed == {}
    assert set(outcome.passed) == set(STEPS) - library.cannot
    assert outcome.passed["close"] == "1000"
    assert outcome.version


# A broker that answers wrongly


@contextmanager
def faulty_broker(fault: str) -> Iterator[str]:
    """A server that answers the steps as the broker does, but for one fault; gives its URL."""

    def handle(connection: ServerConnection) -> None:
        if fault == "close":
            answer_close_wrongly(connection)
        connection.send(json.dumps({"op": "welcome", "version": 2 if fault == "welcome" else 1, "max_size": 2**20}))
        # The program closes as soon as its last event is there; the receipt behind it may find nobody.
        with suppress(ConnectionClosed):
            for text in connection:
                for answer in answers(json.loads(text), fault):
                    connection.send(json.dumps(answer, separators=(",", ":")))

    protocols = None if fault == "subprotocol" else [Subprotocol("wsbroker.v1")]
    compression = "deflate" if fault == "compression" else None
    with serve(handle, "127.0.0.1", 0, subprotocols=protocols, compression=compression) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/"
        finally:
            server.shutdown()
            thread.join()


def answer_close_wrongly(connection: ServerConnection) -> None:
    """Have a connection answer each close frame with code 1001, whatever the frame says."""
    send_frame = connection.protocol.send_frame

    def send(frame: Frame) -> None:
        send_frame(Frame(Opcode.CLOSE, Close(1001, "").serialize()) if frame.opcode is Opcode.CLOSE else frame)

    connection.protocol.send_frame = send  # type: ignore[method-assign]


def answers(command: dict[str, Any], fault: str) -> list[dict[str, Any]]:
    """What the server sends for a command."""
    number, topic = command["id"], command["topic"]
    if command["op"] == "subscribe":
        return [{"op": "ok", "id": number, "topic": topic + "." * (fault == "subscribe")}]
    data = command["data"]
    if fault == "event" and number == 2:
        data = {**data, "bid": 1.0844}
    if fault == "large" and number == 3:
        data = data[:-1]
    if fault == "fragments" and number == 4:
        data = data[:10_000]
    event = {"op": "event", "topic": topic, "data": data}
    receipt = {"op": "ok", "id": number, "receivers": 0 if fault == "receipt" else 1, "queued": 0, "dropped": 0}
    return [event, receipt]


def try_faulty(fault: str, *, compression: bool = False) -> Outcome:
    """Try websockets on a broker with a fault."""
    with faulty_broker(fault) as url:
        return try_library(WEBSOCKETS, python_program(WEBSOCKETS), url, compression=compression)


def test_broker_without_a_fault_passes() -> None:
    outcome = try_faulty("none")
    assert outcome.failed == {}
    assert list(outcome.passed) == list(STEPS)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("welcome", "connect"),
        ("subprotocol", "connect"),
        ("compression", "connect"),
        ("subscribe", "subscribe"),
        ("receipt", "publish"),
        ("event", "receive"),
        ("large", "large"),
        ("fragments", "fragments"),
        ("close", "close"),
    ],
)
def test_fault_of_the_broker_fails_its_step(fault: str, step: str) -> None:
    outcome = try_faulty(fault)
    assert next(iter(outcome.failed)) == step
    assert step not in outcome.passed
    assert outcome.request.startswith("GET / HTTP/1.1\r\n")


def test_compression_that_was_not_agreed_fails() -> None:
    assert "compression was not agreed" in try_faulty("none", compression=True).failed["connect"]


# A program that reports what is not so


def program(code: str) -> list[str]:
    """A command that runs Python code."""
    return [sys.executable, "-c", code]


def test_program_that_does_nothing_fails() -> None:
    claims = program(f"print(*('ok ' + step for step in {STEPS}), sep='\\n')")
    outcome = try_library(WEBSOCKETS, claims, "ws://127.0.0.1:1/", compression=False)
    assert outcome.failed["connect"] == "0 connections in place of one"


def test_fragments_that_were_not_sent_fail() -> None:
    whole = program(
        "from tests.interop.python.with_websockets import *\n"
        "Client.send_fragments = lambda self, parts: self.send(''.join(parts))\n"
        "asyncio.run(run(Client()))"
    )
    with faulty_broker("none") as url:
        outcome = try_library(WEBSOCKETS, whole, url, compression=False)
    assert outcome.failed == {"fragments": "no fragments were sent"}


def test_program_that_raises_fails() -> None:
    outcome = try_library(WEBSOCKETS, program("raise OSError('none')"), "ws://127.0.0.1:1/", compression=False)
    assert outcome.failed["program"] == "exit status 1: OSError: none"


def test_step_without_a_report_fails() -> None:
    outcome = read(WEBSOCKETS, ["version 1.2 beta", "ok connect", "failed subscribe: a reason"])
    assert outcome.version == "1.2 beta"
    assert outcome.passed == {"connect": ""}
    assert outcome.failed == {"subscribe": "a reason"} | dict.fromkeys(STEPS[2:], "not reached")


@pytest.mark.parametrize("note", ["", " 1006"])
def test_close_code_other_than_1000_fails(note: str) -> None:
    assert "close" in read(WEBSOCKETS, [f"ok close{note}"]).failed


# The command


def test_failed_library_fails_the_run_and_shows_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = program(
        "import sys, urllib.request, urllib.error\n"
        "try: urllib.request.urlopen(sys.argv[1].replace('ws:', 'http:'))\n"
        "except urllib.error.HTTPError as error: print('failed connect:', error.code)"
    )
    monkeypatch.setitem(KITS, "node", lambda library: refused)
    result = CliRunner().invoke(main, ["ws"])
    assert result.exit_code == 1
    assert "failed: ws, compression on: connect: 426" in result.output
    assert r"'GET / HTTP/1.1\r\n'" in result.output
    assert result.output.endswith("interop: 0 passed, 2 failed\n")


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--strict",), 1), (("--require", "ws"), 1)])
def test_missing_library_is_named_and_fails_if_required(
    options: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(library: Library) -> list[str]:
        raise MissingError("install npm")

    monkeypatch.setitem(KITS, "node", missing)
    result = CliRunner().invoke(main, ["ws", *options])
    assert result.exit_code == status
    assert "missing: ws: install npm\n" in result.output


def test_curl_without_websocket_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "curl"
    old.write_text("#!/bin/sh\necho 'curl 7.88.1 (x)'\necho 'Protocols: http https'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CURL", str(old))
    with pytest.raises(MissingError, match=r"curl 7\.88\.1 has no ws among its protocols: install 8\.11 or later"):
        curl(BY_NAME["curl"])


def test_every_library_has_a_kit_and_a_program() -> None:
    folder = Path(__file__).parent
    for library in LIBRARIES:
        assert library.kit in KITS
        named = [path for path in (folder / library.kit).iterdir() if path.stem == library.program.partition(".")[0]]
        assert named, library.name
        assert ("==" in library.package) == (library.kit == "python"), library.name
