"""The snippets of the clients' pages run, against the model broker, on which prices and orders are published."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.client.model import Broker, running
from wsbroker_client import Client, ClientError, errors

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / "docs" / "clients-python.md"
JS = ROOT / "docs" / "clients-js.md"
PACKAGE = ROOT / "clients" / "js"
ADDRESS = "wss://broker.example/ws"


def snippets(document: Path, fence: str) -> list[str]:
    return re.findall(rf"^```{fence}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


@contextlib.asynccontextmanager
async def market() -> AsyncIterator[Broker]:
    """The model broker, and somebody who publishes."""
    async with running() as broker, Client(broker.url) as client:
        for number in range(3):
            await client.publish("h.orders", {"id": number})

        async def trade() -> None:
            while True:
                await client.publish("prices.eurusd", {"bid": 1.0843}, key="eurusd")
                await client.publish("orders.created", {"id": 1})
                await asyncio.sleep(0.01)

        trading = asyncio.ensure_future(trade())
        try:
            yield broker
        finally:
            trading.cancel()
            await asyncio.gather(trading, return_exceptions=True)


class API(BaseHTTPRequestHandler):
    """The HTTP API, as far as the page shows it."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        receipt = {"receivers": 0, "queued": 0, "dropped": 0}
        answer = {"results": [receipt for _ in body["events"]]} if self.path.endswith("/batch") else receipt
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), API) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("snippet", snippets(PYTHON, "python"), ids=lambda text: text.splitlines()[-1][:40])
async def test_python_snippet_runs(snippet: str, api: str) -> None:
    """It ends by itself, or is ended when it has printed something."""
    async with market() as broker:
        source = snippet.replace(ADDRESS, broker.url).replace("http://127.0.0.1:8766", api)
        output = io.StringIO()
        names: dict[str, object] = {"print": lambda *words: output.write(" ".join(map(str, words)) + "\n")}
        exec(compile(f"async def main():\n{textwrap.indent(source, '    ')}", "snippet", "exec"), names)
        main = names["main"]
        assert callable(main)
        if "sync import" in source or ".http import" in source:
            await asyncio.to_thread(asyncio.run, main())
        else:
            task = asyncio.ensure_future(main())
            while not task.done() and output.getvalue().count("\n") < 3:  # noqa: ASYNC110 -- a snippet says nothing else
                await asyncio.sleep(0.01)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert output.getvalue()


@pytest.mark.parametrize("snippet", snippets(PYTHON, "python no-run"))
def test_snippet_for_a_framework_is_python(snippet: str) -> None:
    ast.parse(snippet)


@pytest.mark.parametrize("snippet", snippets(JS, "js"), ids=lambda text: text.splitlines()[-1][:40])
async def test_js_snippet_runs(snippet: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node is not None
    # Inside of the package its own name is found (Node, self-referencing).
    file = PACKAGE / "test" / f"snippet-{os.getpid()}-{abs(hash(snippet))}.mjs"
    async with market() as broker:
        source = snippet.replace(ADDRESS, broker.url)
        file.write_text(
            f'import WebSocket from "ws";\nglobalThis.WebSocket ??= WebSocket;\n{source}\nprocess.exitCode = 0;\n'
        )
        # Before any import is evaluated: a module of its own.
        try:
            process = await asyncio.create_subprocess_exec(
                node, str(file), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), 30)
            process.kill()
            _, complaint = await process.communicate()
        finally:
            file.unlink()
    assert line, complaint.decode()
    assert complaint == b""


def test_live_prices_take_at_most_25_lines() -> None:
    (program,) = [text for text in snippets(JS, "js") if "draws at its own pace" in text]
    assert len([line for line in program.splitlines() if line.strip()]) <= 25


def test_every_error_is_in_the_docs() -> None:
    found = {
        kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ClientError)
    }
    text = PYTHON.read_text()
    assert {name for name in found if re.search(rf"^\| `{name}` \|", text, re.MULTILINE)} == found - {"ClientError"}
    source = (PACKAGE / "wsbroker.js").read_text()
    kinds = set(re.findall(r"^export class (\w+) extends WsbrokerError", source, re.MULTILINE))
    assert kinds == set(re.findall(r"^\| `(\w+)` \| (?:`\w+`|the broker's) \|", JS.read_text(), re.MULTILINE))


def test_every_state_of_the_js_client_is_in_the_docs() -> None:
    source = (PACKAGE / "wsbroker.js").read_text()
    states = set(re.findall(r"^  (\w+): \[", source, re.MULTILINE))
    assert states == set(re.findall(r"^\| `([a-z]+)` \| ", JS.read_text(), re.MULTILINE)) - {"credit"}
