"""The backends of examples/tokens, and the broker that takes their tokens; the page in a browser."""

from __future__ import annotations

import asyncio
import http.cookiejar
import json
import re
import secrets
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jwt
import pytest
from websockets.sync.client import connect

from tests.fixtures_broker import Program, start_broker, start_program
from tests.fixtures_chromium import Window
from wsbroker_client import Client

ROOT = Path(__file__).parents[2]
SECRET, PASSWORD = secrets.token_hex(32), secrets.token_hex(16)
CONFIG = """
[auth]
required = true
algorithms = ["HS256"]
secret_file = "{secret}"

[[roles]]
name = "user"
subscribe = ["public.>", "user.{{identity}}.>"]

[[roles]]
name = "backend"
publish = ["user.>"]
"""
OPEN = re.compile(r"open (?P<address>http://\S+/)")


@pytest.fixture
def broker_url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "wsbroker.toml").write_text(CONFIG.format(secret=tmp_path / "secret"))
    with start_broker("--config", str(tmp_path / "wsbroker.toml"), "--admin", "") as broker:
        yield broker.url


@contextmanager
def backend(name: str) -> Iterator[tuple[Program, str]]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environ = {"TOKEN_SECRET": SECRET, "PASSWORD": PASSWORD, "PYTHONWARNINGS": "default"}
    with start_program("-m", f"examples.tokens.{name}", "--port", str(port), environ=environ) as program:
        address = program.wait_for(OPEN)["address"]
        yield program, address
        program.terminate()


def fetch(opener: urllib.request.OpenerDirector, url: str, data: dict[str, str] | None = None) -> str:
    body = None if data is None else urllib.parse.urlencode(data).encode()
    for _ in range(300):  # until it listens
        try:
            with opener.open(url, body, timeout=30) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


def check_token(text: str, url: str) -> None:
    token = json.loads(text)["token"]
    with connect(url, subprotocols=["wsbroker.v1", f"bearer.{token}"], proxy=None) as client:  # type: ignore[list-item]
        welcome = json.loads(client.recv())
        assert (welcome["identity"], 890 <= welcome["expires_in"] <= 900) == ("alice", True)
        for topic, code in (("user.alice.>", None), ("user.bob.>", "forbidden")):
            client.send(json.dumps({"op": "subscribe", "id": 1, "topic": topic}))
            assert json.loads(client.recv()).get("code") == code


def test_fastapi_hands_a_token_to_whoever_is_logged_in(broker_url: str) -> None:
    with backend("fastapi_app") as (_, address):
        opener = urllib.request.build_opener()
        for wrong in (None, "Basic " + b64encode(b"alice:wrong").decode()):
            opener.addheaders = [] if wrong is None else [("Authorization", wrong)]
            with pytest.raises(urllib.error.HTTPError, match="401"):
                fetch(opener, f"{address}token")
        opener.addheaders = [("Authorization", "Basic " + b64encode(f"alice:{PASSWORD}".encode()).decode())]
        assert "new Client(" in fetch(opener, address)
        check_token(fetch(opener, f"{address}token"), broker_url)


def test_django_hands_a_token_to_whoever_is_logged_in(broker_url: str) -> None:
    with backend("django_app") as (_, address):
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        form = fetch(opener, f"{address}token")
        found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form)
        assert found, "it asks for a login"
        data = {"csrfmiddlewaretoken": found[1], "username": "alice", "password": PASSWORD}
        assert "new Client(" in fetch(opener, f"{address}login", data)
        check_token(fetch(opener, f"{address}token"), broker_url)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("name", ["fastapi_app", "django_app"])
async def test_page_shows_its_token_and_gets_events(window: Window, broker_url: str, name: str) -> None:
    with backend(name) as (_, address):
        with pytest.raises(urllib.error.HTTPError):  # it has said its address before it listens
            await asyncio.to_thread(fetch, urllib.request.build_opener(), f"{address}none")
        page = await window.open(f"about:blank#{name}")
        await window.context.set_extra_http_headers(
            {"Authorization": "Basic " + b64encode(f"alice:{PASSWORD}".encode()).decode()}
        )
        await page.goto(f"{address}?broker={broker_url}")
        if name == "django_app":
            await page.fill("input[name=username]", "alice")
            await page.fill("input[name=password]", PASSWORD)
            await page.click("button")
            await page.goto(f"{address}?broker={broker_url}")
        log = page.locator("#log")
        await log.get_by_text("subscribed to user.alice.>").wait_for()
        token = jwt.encode({"sub": "backend", "roles": ["backend"], "exp": time.time() + 60}, SECRET, "HS256")
        async with Client(broker_url, token=token) as client:
            await client.publish("user.alice.greeting", {"text": "hello"})
        await log.get_by_text("hello").wait_for()


def test_five_lines_of_the_readme_are_those_of_the_example() -> None:
    source = (ROOT / "examples" / "tokens" / "fastapi_app.py").read_text()
    (shown,) = re.findall(r"```python\n(@app\.get.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown in source
