"""A backend that says who clients are, a real HTTP server, and the clients of a real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from websockets.exceptions import InvalidStatus
from websockets.frames import Close

from broker.auth import breaker, webhook
from broker.auth.authenticator import Authenticator
from broker.auth.breaker import TRANSITIONS, Breaker, State
from broker.auth.webhook import Webhook, WebhookError, read_answer
from broker.config import Auth, Config, Role, Server
from broker.errors import CloseCode
from tests.auth.test_key_set import token
from tests.fixtures_node import Harness, serving
from tests.net.harness import until
from tests.test_identities import authenticator as with_secret
from tests.test_identities import token as secret_token

ROLES = (Role(name="default", subscribe=("prices.>",)), Role(name="editor", publish=(">",)), Role(name="anonymous"))


class Backend:
    """An HTTP server that knows sessions by their cookie."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[web.Request] = []
        self.answer: Any = {"identity": "alice"}
        """What it answers: an object, a status or a whole response."""
        self.hold: asyncio.Event | None = None
        self.under_way = 0
        self.most = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self.under_way -= 1
        if isinstance(self.answer, web.Response):
            return self.answer
        if isinstance(self.answer, int):
            return web.Response(status=self.answer)
        return web.json_response(self.answer, headers={"Set-Cookie": "own=1"})


@asynccontextmanager
async def backend() -> AsyncIterator[Backend]:
    made = Backend()
    app = web.Application()
    app.router.add_get("/who", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/who"
    try:
        yield made
    finally:
        if made.hold is not None:
            made.hold.set()
        await runner.cleanup()


@asynccontextmanager
async def asking(
    there: Backend,
    *,
    timeout: float = 10.0,
    concurrency: int = 64,
    required: bool = True,
    headers: tuple[str, ...] = (),
) -> AsyncIterator[Harness]:
    auth = Auth(url=there.url, url_headers=list(headers or ("Cookie",)))
    authenticator = Authenticator(required=required, webhook=Webhook(there.url, timeout, concurrency), roles=ROLES)
    async with serving(authenticator=authenticator) as harness:
        harness.handshakes.reconfigure(Config(server=Server(listen=["127.0.0.1:0"]), auth=auth))
        yield harness


async def enter(there: Harness, cookie: str | None = "session=1", **headers: str) -> int | dict[str, Any]:
    """The welcome, or the status of the refusal."""
    given = {**({} if cookie is None else {"Cookie": cookie}), **headers}
    try:
        return (await there.connect(additional_headers=given)).welcome
    except InvalidStatus as refused:
        return refused.response.status_code


async def test_backend_names_identity_roles_and_expiry() -> None:
    async with backend() as there, asking(there) as broker:
        there.answer = {"identity": "alice", "roles": ["editor"], "expires_in": 60}
        client = await broker.connect(additional_headers={"Cookie": "session=4711; other=2"})
        assert client.welcome["identity"] == "alice"
        assert 50 <= client.welcome["expires_in"] <= 60
        assert (await client.ask("publish", topic="a", data=1))["op"] == "ok"
        assert (await client.ask("subscribe", topic="prices.a"))["code"] == "forbidden"
        (request,) = there.requests
        assert request.headers["Cookie"] == "session=4711; other=2"
        assert request.headers["X-Forwarded-For"] == "127.0.0.1"
        assert {name.lower() for name in request.headers} == {
            "host",
            "cookie",
            "accept",
            "x-forwarded-for",
            "accept-encoding",
            "user-agent",
        }


async def test_cookies_of_one_client_are_never_sent_for_another() -> None:
    async with backend() as there, asking(there) as broker:
        for number in range(5):
            await enter(broker, f"session={number}")
        assert [request.headers["Cookie"] for request in there.requests] == [f"session={n}" for n in range(5)]


async def test_chosen_headers_are_passed_on() -> None:
    async with backend() as there, asking(there, headers=("X-User", "Authorization")) as broker:
        await enter(broker, "session=1", **{"X-User": "ü", "Authorization": "Basic YTpi"})
        (request,) = there.requests
        assert (request.headers["X-User"], request.headers["Authorization"]) == ("ü", "Basic YTpi")
        assert "Cookie" not in request.headers


async def test_client_without_these_headers_is_not_asked_about() -> None:
    async with backend() as there, asking(there) as broker:
        welcome = await enter(broker, None)
        assert isinstance(welcome, dict)
        assert "identity" not in welcome
        assert there.requests == []
        client = broker.clients[0]
        assert (await client.ask("subscribe", topic="prices.a"))["code"] == "unauthorized"  # type: ignore[union-attr]


async def test_page_of_another_origin_is_refused_before_the_backend_is_asked() -> None:
    async with backend() as there, asking(there) as broker:
        assert await enter(broker, Origin="https://evil.example") == 403
        assert there.requests == []


@pytest.mark.parametrize(
    ("answer", "status"), [(401, 401), (403, 403), (302, 401), (404, 503), (500, 503), (204, 503), (418, 503)]
)
async def test_refusals_of_the_backend(answer: int, status: int) -> None:
    async with backend() as there, asking(there) as broker:
        there.answer = web.Response(status=answer, headers={"Location": "/login"})
        assert await enter(broker) == status


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"identity":null}',
        b'{"identity":""}',
        b'{"identity":["a"]}',
        b'{"identity":true}',
        b'{"identity":"a","roles":1}',
        b'{"identity":"a","roles":[1]}',
        b'{"identity":"a","expires_in":0}',
        b'{"identity":"a","expires_in":-1}',
        b'{"identity":"a","expires_in":"60"}',
        b'{"identity":"a","expires_in":1e999}',
        b'{"identity":"a","expires_in":true}',
        b"[" * 100_000,
        b"\xff",
        b'{"identity":"a\\nb"}',
        b'{"identity":"a","expires_in":NaN}',
        b'"' + b"x" * webhook.MAX_BYTES + b'"',
    ],
    ids=lambda answer: str(answer[:40]),
)
async def test_invalid_answer_lets_nobody_in(answer: bytes) -> None:
    async with backend() as there, asking(there) as broker:
        there.answer = web.Response(body=answer)
        assert await enter(broker) == 503


@given(
    st.binary()
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
        lambda value: json.dumps({"identity": value, "roles": value, "expires_in": value}).encode()
    )
)
def test_any_answer_is_read_or_refused(answer: bytes) -> None:
    try:
        found = read_answer(answer)
    except WebhookError:
        return
    assert found.name


async def test_slow_backend_costs_its_clients_a_refusal_and_others_nothing() -> None:
    async with backend() as there, asking(there, timeout=0.2, required=False) as broker:
        other = await broker.connect()
        there.hold = asyncio.Event()
        asked = asyncio.create_task(enter(broker))
        await until(lambda: there.under_way == 1)
        assert await other.ask("ping") == {"op": "pong"}
        with capture_logs() as logs:
            assert await asked == 503
        assert [entry["reason"] for entry in logs if entry["event"] == "auth.url failed"] == [
            "no answer within 0.2 seconds"
        ]


async def test_backend_that_is_down_is_left_alone_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with backend() as there, asking(there) as broker:
        there.answer = 500
        for _ in range(breaker.FAILURES):
            assert await enter(broker) == 503
        assert [await enter(broker) for _ in range(5)] == [503] * 5
        assert len(there.requests) == breaker.FAILURES, "it was asked no more"
        there.answer = {"identity": "alice"}
        clock = asyncio.get_running_loop().time
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock() + breaker.OPEN_SECONDS, raising=False)
        welcome = await enter(broker)
        assert isinstance(welcome, dict)
        assert isinstance(await enter(broker), dict)


async def test_requests_are_bounded_and_the_others_wait() -> None:
    async with backend() as there, asking(there, concurrency=3) as broker:
        there.hold = asyncio.Event()
        clients = [asyncio.create_task(enter(broker)) for _ in range(20)]
        await until(lambda: there.under_way == 3)
        there.hold.set()
        assert all(isinstance(found, dict) for found in [await client for client in clients])
        assert there.most == 3
        assert len(there.requests) == 20


async def test_those_beyond_the_bound_of_waiting_clients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "MAX_WAITING", 2)
    async with backend() as there, asking(there, concurrency=1) as broker:
        there.hold = asyncio.Event()
        clients = [asyncio.create_task(enter(broker)) for _ in range(6)]
        await until(lambda: sum(client.done() for client in clients) == 3)
        there.hold.set()
        found = [await client for client in clients]
        assert [isinstance(each, dict) for each in found].count(True) == 3
        assert found.count(503) == 3


async def test_client_that_does_not_wait_for_the_answer_leaves_nothing_behind() -> None:
    async with backend() as there, asking(there) as broker:
        there.hold = asyncio.Event()
        task = asyncio.create_task(enter(broker))
        await until(lambda: there.under_way == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        there.hold.set()
        assert isinstance(await enter(broker), dict)


async def test_token_goes_before_the_backend() -> None:
    async with backend() as there:
        made = with_secret()
        made.webhook = Webhook(there.url, 10, 10)
        async with serving(authenticator=made) as broker:
            auth = Auth(url=there.url)
            broker.handshakes.reconfigure(Config(server=Server(listen=["127.0.0.1:0"]), auth=auth))
            shown = {"Cookie": "session=1", "Authorization": f"Bearer {secret_token('bob')}"}
            assert (await broker.connect(additional_headers=shown)).welcome["identity"] == "bob"
            assert there.requests == []
            assert await enter(broker, Authorization=f"Bearer {token()}") == 401
            assert there.requests == []
            assert (await broker.connect(additional_headers={"Cookie": "session=1"})).welcome["identity"] == "alice"


async def test_identity_of_the_backend_expires() -> None:
    async with backend() as there, asking(there) as broker:
        there.answer = {"identity": "alice", "expires_in": 0.3}
        client = await broker.connect(additional_headers={"Cookie": "session=1"})
        assert await client.closed() == Close(CloseCode.EXPIRED, "expired")


async def test_reload_answers_those_who_have_asked() -> None:
    async with backend() as there, asking(there, concurrency=1) as broker:
        there.hold = asyncio.Event()
        clients = [asyncio.create_task(enter(broker)) for _ in range(3)]
        await until(lambda: there.under_way == 1)
        broker.node.reconfigure(Config(), Authenticator(required=True, roles=ROLES))
        there.hold.set()
        assert all(isinstance(found, dict) for found in [await client for client in clients])


def test_breaker_opens_tries_and_closes() -> None:
    circuit = Breaker()
    for _ in range(breaker.FAILURES - 1):
        assert circuit.allow(0)
        assert not circuit.fail(0)
    circuit.succeed()
    for number in range(breaker.FAILURES):
        assert circuit.allow(0)
        assert circuit.fail(0) is (number == breaker.FAILURES - 1)
    assert not circuit.allow(breaker.OPEN_SECONDS - 0.1)
    assert circuit.allow(breaker.OPEN_SECONDS)
    assert not circuit.allow(breaker.OPEN_SECONDS), "one alone tries"
    assert circuit.fail(10)
    assert circuit.allow(20)
    circuit.give_up(20)
    assert circuit.allow(20)
    circuit.succeed()
    assert circuit.state is State.CLOSED
    assert all(circuit.allow(20) for _ in range(10))


@given(st.lists(st.sampled_from(["allow", "succeed", "fail", "give_up"])))
def test_breaker_follows_its_table(steps: list[str]) -> None:
    circuit, now = Breaker(), 0.0
    for step in steps:
        before, now = circuit.state, now + 1
        if step == "succeed":
            circuit.succeed()
        else:
            getattr(circuit, step)(now)
        assert circuit.state is before or circuit.state in TRANSITIONS[before]
