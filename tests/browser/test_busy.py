"""A page whose main thread is blocked: with `latest` and credit it sees the newest value, without them the backlog."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.fixtures_broker import PATIENCE, RunningBroker
from tests.fixtures_chromium import Window
from wsbroker_client.connection import connect

pytestmark = pytest.mark.asyncio(loop_scope="session")

LAST = 300

WATCH = """
async ({ url, policy, last }) => {
    const socket = new WebSocket(url, "wsbroker.v1");
    const seen = [];
    let subscribed, done;
    window.complete = new Promise((resolve) => { done = resolve; });
    const ready = new Promise((resolve) => { subscribed = resolve; });
    socket.onopen = () => socket.send(JSON.stringify({ op: "subscribe", id: 1, topic: "busy", ...policy }));
    socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        if (message.op === "ok" && message.id === 1) subscribed();
        if (message.op === "gap") seen.push([message.reason, message.missed]);
        if (message.op !== "event") return;
        seen.push(message.data);
        if (message.data === 0) {
            // Nothing else runs in this page until the test's server answers.
            const request = new XMLHttpRequest();
            request.open("GET", "/busy", false);
            request.send();
        }
        if (policy.credit) socket.send('{"op":"credit","topic":"busy","add":1}');
        if (message.data === last) done(seen);
    };
    await ready;
}
"""


class Site:
    """Serves an empty page, and a second one that keeps who asks for it waiting until `free` is set."""

    def __init__(self) -> None:
        self.busy = threading.Event()
        self.free = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/busy":
                    site.busy.set()
                    site.free.wait(PATIENCE)
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def busy_site() -> Iterator[Site]:
    site = Site()
    with site.server, contextlib.ExitStack() as end:
        thread = threading.Thread(target=site.server.serve_forever)
        thread.start()
        end.callback(thread.join)
        end.callback(site.server.shutdown)
        end.callback(site.free.set)
        yield site


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"overflow": "latest", "credit": 1}, [0, ["conflated", LAST - 1], LAST]),
        ({"max_queue": 1000}, list(range(LAST + 1))),
    ],
    ids=["latest", "plain"],
)
async def test_busy_page_gets_events_and_gaps_when_it_reads_again(
    window: Window, broker: RunningBroker, busy_site: Site, policy: dict[str, Any], expected: list[Any]
) -> None:
    page = await window.open(busy_site.address)
    await page.evaluate(WATCH, {"url": broker.url, "policy": policy, "last": LAST})
    async with connect(broker.url) as publisher:
        await publisher.publish("busy", 0, key="k")
        assert await asyncio.to_thread(busy_site.busy.wait, PATIENCE)
        for number in range(1, LAST + 1):
            await publisher.publish("busy", number, key="k")
    busy_site.free.set()
    assert await page.evaluate("() => complete") == expected
