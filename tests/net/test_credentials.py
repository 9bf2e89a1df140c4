"""Tokens in the handshake: where they may stand, and the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.identity import Denied, Identity
from tests.net.harness import Harness, harness, request, until
from tests.net.test_handshake import FRAMES, check

ALICE = Identity("alice", ("user",))


@asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[Harness]:
    """A harness whose node leaves the answers about tokens to the test."""
    async with harness(**options) as there:
        there.node.answers_later = True
        yield there


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer a.b-c_d",
        "authorization: bearer  a.b-c_d",
        "Authorization: BEARER a.b-c_d",
        "Sec-WebSocket-Protocol: wsbroker.v1, bearer.a.b-c_d",
        "Sec-WebSocket-Protocol: bearer.a.b-c_d",
        "Sec-WebSocket-Protocol: bearer.a.b-c_d,wsbroker.v1",
        "Sec-WebSocket-Protocol: wsbroker.v1\r\nSec-WebSocket-Protocol: bearer.a.b-c_d",
    ],
)
async def test_token_is_found_and_never_echoed(header: str) -> None:
    async with asking() as there:
        client = await there.connect()
        client.send(request("GET / HTTP/1.1", header))
        await until(lambda: bool(there.node.answers))
        assert there.node.tokens == ["a.b-c_d"]
        there.node.answers[0](ALICE)
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"a.b-c_d" not in head
        assert b"bearer" not in head
        assert there.node.identities == [ALICE]


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Basic YTpi",
        "Authorization: Negotiate x",
        "Authorization: Bearer",
        "Sec-WebSocket-Protocol: wsbroker.v1",
        "X-Token: Bearer a",
    ],
)
async def test_nothing_else_is_a_token(header: str) -> None:
    async with asking() as there:
        await there.upgrade(request("GET / HTTP/1.1", header))
        assert there.node.tokens == []
        assert there.node.identities == [None]


async def test_token_in_the_query_string_is_not_read() -> None:
    async with asking() as there:
        await there.upgrade(request("GET /?token=a.b.c&access_token=a.b.c HTTP/1.1"))
        assert there.node.tokens == []


@pytest.mark.parametrize(
    "headers",
    [
        ("Authorization: Bearer a", "Authorization: Bearer a"),
        ("Authorization: Bearer a", "Authorization: Basic b"),
        ("Authorization: Bearer a b",),
        ("Authorization: Bearer a,b",),
        ("Authorization: Bearer é",),
        ("Authorization: Bearer a", "Sec-WebSocket-Protocol: wsbroker.v1, bearer.a"),
        ("Sec-WebSocket-Protocol: bearer.a, bearer.b",),
    ],
)
async def test_ambiguous_or_malformed_tokens_are_refused(headers: tuple[str, ...]) -> None:
    async with asking() as there:
        check(await there.ask(request("GET / HTTP/1.1", *headers)), 400)
        assert there.node.tokens == []


async def test_invalid_token_is_answered_with_401_and_logged_without_it() -> None:
    async with asking() as there:
        with capture_logs() as logs:
            client = await there.connect()
            client.send(request("GET / HTTP/1.1", "Authorization: Bearer secret.secret"))
            await until(lambda: bool(there.node.answers))
            there.node.answers[0](Denied(401, "the token has expired"))
            reply = await client.reply()
        check(reply, 401)
        assert reply.headers["www-authenticate"] == 'Bearer realm="wsbroker", error="invalid_token"'
        assert reply.body == "the token has expired\n"
        assert there.limiter.reasons == {"unauthorized": 1}
        assert [entry["reason"] for entry in logs if entry["event"] == "identity refused"] == ["the token has expired"]
        assert "secret" not in str(logs)


@pytest.mark.parametrize(("status", "label"), [(429, "identity_limit"), (503, "auth_unavailable")])
async def test_denied_client_is_told_when_to_come_back(status: int, label: str) -> None:
    async with asking() as there:
        client = await there.connect()
        client.send(request("GET / HTTP/1.1", "Authorization: Bearer a"))
        await until(lambda: bool(there.node.answers))
        there.node.answers[0](Denied(status, "not now"))
        reply = await client.reply()
        check(reply, status)
        assert int(reply.headers["retry-after"]) >= 1
        assert there.limiter.reasons == {label: 1}


async def test_what_comes_behind_the_request_is_kept_until_the_answer() -> None:
    async with asking() as there:
        client = await there.connect()
        client.send(request("GET / HTTP/1.1", "Authorization: Bearer a") + FRAMES[:5])
        await until(lambda: bool(there.node.answers))
        client.send(FRAMES[5:])
        there.node.answers[0](ALICE)
        await client.head()
        connection = there.node.established[0]
        async with asyncio.timeout(10):
            while len(there.node.taken[0].rest + connection.received) < len(FRAMES):
                there.node.heard.clear()
                await there.node.heard.wait()
        assert there.node.taken[0].rest + connection.received == FRAMES


async def test_answer_for_a_client_that_has_gone_is_ignored() -> None:
    async with asking(open_timeout=0.1) as there:
        client = await there.connect()
        client.send(request("GET / HTTP/1.1", "Authorization: Bearer a"))
        await until(lambda: bool(there.node.answers))
        await until(lambda: there.limiter.connections == 0)
        assert there.limiter.reasons == {"timeout": 1}
        there.node.answers[0](ALICE)
        assert there.node.taken == []


async def test_shutdown_refuses_a_client_whose_token_is_being_verified() -> None:
    async with asking() as there:
        client = await there.connect()
        client.send(request("GET / HTTP/1.1", "Authorization: Bearer a"))
        await until(lambda: bool(there.node.answers))
        there.handshakes.close()
        there.node.answers[0](ALICE)
        check(await client.reply(), 503)
        assert there.node.taken == []
