"""The blocking client, against the real broker; the publisher by HTTP, against a server that does as the test says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.fixtures_broker import ROOT, RunningBroker, start_broker
from wsbroker_client import ClientClosed, CommandRefused, ConnectionLost, State, Unreachable
from wsbroker_client.http import Publisher
from wsbroker_client.sync import Client


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    with start_broker() as broker:
        yield broker


def test_for_loop_gets_what_was_published(broker: RunningBroker) -> None:
    with Client(broker.url) as client:
        subscription = client.subscribe("sync.*")
        subscription.ready()
        for number in range(300):
            client.publish("sync.a", number)
        assert [next(subscription).data for _ in range(300)] == list(range(300))
        with pytest.raises(CommandRefused, match="bad_topic"):
            client.publish("$mine", 1)
    assert client.state is State.CLOSED
    assert list(subscription) == []
    with pytest.raises(ClientClosed):
        client.publish("sync.a", 1)


def test_many_threads_share_a_client(broker: RunningBroker) -> None:
    with Client(broker.url) as client:
        subscription = client.subscribe("threads")
        subscription.ready()
        threads = [
            threading.Thread(target=lambda n=n: [client.publish("threads", n) for _ in range(20)]) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        assert sorted(next(subscription).data for _ in range(160)) == sorted(list(range(8)) * 20)
        for thread in threads:
            thread.join()


def test_ctrl_c_interrupts_a_loop(broker: RunningBroker) -> None:
    program = f"""
from wsbroker_client.sync import Client
with Client({broker.url!r}) as client:
    subscription = client.subscribe("nothing")
    subscription.ready()
    print("waiting", flush=True)
    for event in subscription: ...
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert complaint.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


# HTTP


class Api(ThreadingHTTPServer):
    """Gives the next of `answers` to each request: a status and JSON, or None to hang up."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, Any]] | None] = []
        self.requests: list[tuple[str, str | None, Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Api

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        answer = self.server.answers.pop(0)
        if answer is None:
            self.close_connection = True
            return
        text = json.dumps(answer[1]).encode()
        self.send_response(answer[0])
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def publisher(api: Api) -> Iterator[Publisher]:
    publisher = Publisher(f"http://127.0.0.1:{api.server_port}", key="secret", timeout=5.0)
    yield publisher
    publisher.close()


OK = (200, {"receivers": 2, "queued": 0, "dropped": 0, "offset": 7})
BUSY = (503, {"code": "unavailable", "message": "later", "retry": True})


def test_event_is_published_with_the_key(api: Api, publisher: Publisher) -> None:
    api.answers += [OK]
    assert publisher.publish("t", {"x": 1}, key="k").offset == 7
    assert api.requests == [("/v1/publish", "Bearer secret", {"topic": "t", "key": "k", "data": {"x": 1}})]


def test_batch_has_a_result_for_each_event(api: Api, publisher: Publisher) -> None:
    refusal = {"code": "bad_topic", "message": "no", "retry": False}
    api.answers += [(200, {"results": [OK[1], refusal]})]
    first, second = publisher.publish_batch([{"topic": "t", "data": 1}, {"topic": "$t", "data": 2}])
    assert not isinstance(first, CommandRefused)
    assert first.receivers == 2
    assert isinstance(second, CommandRefused)
    with pytest.raises(ValueError, match="at most 1,000"):
        publisher.publish_batch([{"topic": "t", "data": 1}] * 1001)


def test_only_what_is_reliable_is_repeated(api: Api, publisher: Publisher) -> None:
    api.answers += [BUSY, None, OK]
    assert publisher.publish("t", 1, reliable=True).receivers == 2
    dedups = {body["dedup"] for _, _, body in api.requests}
    assert len(api.requests) == 3
    assert len(dedups) == 1
    api.answers += [BUSY, None]
    with pytest.raises(CommandRefused, match="unavailable: later"):
        publisher.publish("t", 1)
    with pytest.raises(ConnectionLost, match="not known"):
        publisher.publish("t", 1)


def test_nobody_there_is_unreachable() -> None:
    with pytest.raises(Unreachable):
        Publisher("http://127.0.0.1:9").publish("t", 1)
