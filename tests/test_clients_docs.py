"""The snippets of the clients' pages run, against the model broker, on which prices and orders are published."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.client.model import Broker, running
from tests.fixtures_broker import start_broker, start_program
from wsbroker_client import Client, ClientError, errors
from wsbroker_client.http import Publisher
from wsbroker_client.sync import Client as SyncClient

pytestmark = pytest.mark.needs("node")

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
    """The HTTP API, as far as the page shows it. What is published is kept in `server.published`."""

    server: APIServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        receipt = {"receivers": 0, "queued": 0, "dropped": 0}
        answer = {"results": [receipt for _ in body["events"]]} if self.path.endswith("/batch") else receipt
        self.server.published.append({**body, "key": self.headers["Authorization"]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


class APIServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), API)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.published: list[dict[str, Any]] = []


@pytest.fixture
def api() -> Iterator[APIServer]:
    with APIServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def snippet_with(text: str) -> str:
    (found,) = [each for each in snippets(PYTHON, "python") if text in each]
    return found


FRAMEWORKS = ("django", "fastapi", "celery")


@pytest.mark.parametrize(
    "snippet",
    [each for each in snippets(PYTHON, "python") if not any(f"from {name}" in each for name in FRAMEWORKS)],
    ids=lambda text: text.splitlines()[-1][:40],
)
async def test_python_snippet_runs(snippet: str, api: APIServer) -> None:
    """It ends by itself, or is ended when it has printed something. Like a notebook's, it runs inside of a loop."""
    async with market() as broker:
        source = snippet.replace(ADDRESS, broker.url).replace("http://127.0.0.1:8766", api.url)
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


def run_program(tmp_path: Path, *parts: str) -> str:
    """Run the parts of a program as one, in a process of its own; its output."""
    file = tmp_path / "program.py"
    file.write_text("\n".join(textwrap.dedent(part) for part in parts))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_django_snippet_publishes_after_the_commit(api: APIServer, tmp_path: Path) -> None:
    before = f"""
        import django
        from django.conf import settings
        from django.db import connection, models

        settings.configure(
            DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": {str(tmp_path / "db")!r}}}}},
            BROKER_URL={api.url!r}, BROKER_KEY="k", ALLOWED_HOSTS=["testserver"],
        )
        django.setup()

        class Order(models.Model):
            id = models.BigAutoField(primary_key=True)
            customer = models.TextField()

            class Meta:
                app_label = "shop"

        with connection.schema_editor() as editor:
            editor.create_model(Order)
        """
    after = """
        from django.test import RequestFactory

        print(create_order(RequestFactory().post("/", {"customer": "alice"})).content)
        try:
            with transaction.atomic():
                create_order(RequestFactory().post("/", {"customer": "bob"}))
                raise KeyError("rolled back")
        except KeyError:
            print(Order.objects.count())
        """
    output = run_program(tmp_path, before, snippet_with("from django"), after)
    assert output.splitlines() == ["""b'{"id": 1}'""", "1"]
    (event,) = api.published
    assert (event["topic"], event["data"], event["key"]) == ("orders.created", {"id": 1}, "Bearer k")
    assert event["dedup"]


def test_celery_snippet_repeats_a_publish_as_the_same_event(api: APIServer, tmp_path: Path) -> None:
    after = """
        from celery.contrib.testing.worker import start_worker

        ids = []
        publish = Publisher.publish

        def fail_once(self, *arguments, dedup):
            ids.append(dedup)
            if len(ids) == 1:
                raise ClientError("nobody is there")
            return publish(self, *arguments, dedup=dedup)

        Publisher.publish = fail_once
        with start_worker(app, perform_ping_check=False, pool="solo"):
            result = notify.delay(7)
            result.get(timeout=60)
        assert ids == [result.id] * 2, ids
        """
    run_program(tmp_path, snippet_with("from celery").replace("http://127.0.0.1:8766", api.url), after)
    (event,) = api.published
    assert (event["topic"], event["data"]) == ("orders.created", {"id": 7})


def test_fastapi_snippet_publishes_to_the_real_broker(tmp_path: Path) -> None:
    with start_broker() as broker:
        (tmp_path / "shop.py").write_text(snippet_with("from fastapi").replace(ADDRESS, broker.url))
        serve = ("-m", "uvicorn", "--app-dir", str(tmp_path), "--port", "0", "shop:app")
        with start_program(*serve) as program, SyncClient(broker.url) as client:
            address = program.wait_for(re.compile(r"running on (http://\S+)"))[1]
            orders = client.subscribe("orders.*")
            orders.ready()
            request = urllib.request.Request(
                f"{address}/orders", json.dumps({"id": 7}).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert json.load(answer) == {"receivers": 1}
            assert next(orders).data == {"id": 7}
            program.terminate()


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
    assert kinds == set(re.findall(r"^\| `([A-Z]\w+)` \| (?:`\w+`|the broker's) \|", JS.read_text(), re.MULTILINE))


def test_every_state_of_the_js_client_is_in_the_docs() -> None:
    source = (PACKAGE / "wsbroker.js").read_text()
    states = set(re.findall(r"^  (\w+): \[", source, re.MULTILINE))
    assert states == options_in(JS, "State of a client") | options_in(JS, "State of a subscription")


def options_in(page: Path, title: str) -> set[str]:
    """The names in the first column of the table with this title."""
    (table,) = re.findall(rf"^\| {re.escape(title)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    first = " ".join(row.split("|")[1] for row in table.splitlines())
    return set(re.findall(r"`(\w+)`", first))


def test_every_option_of_the_python_client_is_in_the_docs() -> None:
    def options(function: Callable[..., Any]) -> set[str]:
        return set(inspect.signature(function).parameters) - {"self"}

    assert options_in(PYTHON, "Option of `Client`") == options(Client.__init__) == options(SyncClient.__init__)
    assert options_in(PYTHON, "Option of `publish`") == options(Client.publish) - {"topic", "data"}
    assert options_in(PYTHON, "Option of `subscribe`") == options(Client.subscribe) - {"topic"}
    assert options_in(PYTHON, "Option of `Publisher`") == options(Publisher.__init__)


def test_every_option_of_the_js_client_is_in_the_docs() -> None:
    types = (PACKAGE / "wsbroker.d.ts").read_text()

    def options(interface: str) -> set[str]:
        (body,) = re.findall(rf"interface {interface} \{{\n(.*?)^\}}", types, re.MULTILINE | re.DOTALL)
        return set(re.findall(r"^  (\w+)\??:", body, re.MULTILINE))

    assert options_in(JS, "Option") == options("ClientOptions")
    assert options_in(JS, "Option of `publish`") == options("PublishOptions")
    assert options_in(JS, "Option of `subscribe`") == options("SubscribeOptions")


def test_reasons_of_gaps_that_the_clients_make_are_in_the_docs() -> None:
    made = set(re.findall(r'gap\([\w.]+, "(\w+)"\)', (PACKAGE / "wsbroker.js").read_text()))
    source = (ROOT / "clients/python/wsbroker_client/subscriptions.py").read_text()
    assert (
        made == set(re.findall(r'Gap\([\w.]+, None, "(\w+)"\)', source)) == {"disconnected", "unsubscribed", "overlap"}
    )
    for page in (JS, PYTHON):
        assert made <= options_in(page, "`reason`")


def test_compared_programs_have_the_lines_that_the_table_says() -> None:
    names = ("wsbroker", "centrifuge", "socketio", "nats", "ably")
    lines = [
        len([line for line in (PACKAGE / "comparison" / f"{name}.js").read_text().splitlines() if line.strip()])
        for name in names
    ]
    (row,) = re.findall(r"^\| lines \|(.*)\|$", JS.read_text(), re.MULTILINE)
    assert [int(number) for number in re.findall(r"\[(\d+)\]", row)] == lines
