"""Clients that connect too often, or send too much, beside one that does neither."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.frames import Close

from broker.config import Role, Server
from broker.config.schema import Config, Limits
from broker.errors import CloseCode
from broker.net.addresses import Peer, parse_ip
from tests.fixtures_certificates import make_pair
from tests.fixtures_node import Harness, masked, serving
from tests.net.harness import harness, request, until
from tests.test_identities import authenticator, refusal, token


async def status(there: Harness, **options: Any) -> int:
    try:
        await there.connect(**options)
    except InvalidStatus as refused:
        return refused.response.status_code
    return 101


# Commands and bytes


async def test_commands_beyond_the_rate_are_refused_on_both_paths() -> None:
    async with serving(command_rate=0.001, command_burst=5) as there:
        client, other = await there.connect(), await there.subscriber("a")
        answers = [await client.ask("publish", topic="a", data=number) for number in range(8)]
        assert [answer["op"] for answer in answers] == ["ok"] * 5 + ["error"] * 3
        assert answers[-1]["code"] == "rate_limited"
        assert 900_000 < answers[-1]["retry_after_ms"] <= 1_000_000
        assert await other.data(5) == [0, 1, 2, 3, 4]


async def test_any_command_counts_and_its_answer_has_the_id() -> None:
    async with serving(command_rate=0.001, command_burst=2) as there:
        client = await there.connect()
        assert [(await client.ask(op, topic="a"))["op"] for op in ("subscribe", "unsubscribe")] == ["ok", "ok"]
        for op in ("ping", "subscribe", "auth"):
            assert (await client.ask(op, topic="a"))["code"] == "rate_limited"
        await client.send("nonsense")
        refused = await client.next()
        assert (refused["code"], "id" in refused) == ("rate_limited", False)


async def test_client_that_goes_on_is_closed() -> None:
    async with serving(command_rate=0.001, command_burst=5) as there:
        client, other = await there.connect(), await there.connect()
        for _ in range(5 + 20):
            await client.tell("ping")
        assert (await client.ask("ping"))["op"] == "error"
        assert await client.closed() == Close(CloseCode.RATE_LIMITED, "rate_limited")
        assert await other.ask("ping") == {"op": "pong"}


async def test_client_that_waits_as_it_is_told_is_served() -> None:
    async with serving(command_rate=100, command_burst=1) as there:
        client = await there.connect()
        served = 0
        async with asyncio.timeout(30):
            while served < 20:
                answer = await client.ask("publish", topic="a", data=1)
                if answer["op"] == "ok":
                    served += 1
                else:
                    await asyncio.sleep(answer["retry_after_ms"] / 1000)


async def test_bytes_beyond_the_rate_are_refused() -> None:
    async with serving(byte_rate=0.1, byte_burst=10_000) as there:
        client = await there.connect()
        big = "x" * 4000
        answers = [await client.ask("publish", topic="a", data=big) for _ in range(5)]
        assert [answer["op"] for answer in answers] == ["ok", "ok", "ok", "error", "error"]
        assert answers[-1]["code"] == "rate_limited"


async def test_limits_of_rate_and_rights_hold_together() -> None:
    made = authenticator(roles=(Role(name="user", publish=("chat.*",), publish_rate=0.001, publish_burst=3),))
    async with serving(authenticator=made, command_rate=0.001, command_burst=6) as there:
        client = await there.connect(token())
        answers = [await client.ask("publish", topic=topic, data=1) for topic in ("chat.a", "chat.a", "x", "chat.a")]
        assert [answer.get("code") for answer in answers] == [None, None, "forbidden", None]
        for expected in ("more than 0.001 events a second", "more than", "too many commands"):
            answer = await client.ask("publish", topic="chat.a", data=1)
            assert answer["code"] == "rate_limited"
            assert expected in answer["message"]


async def test_reload_starts_changes_and_ends_the_limit() -> None:
    async with serving() as there:
        client = await there.connect()

        def reload(**limits: Any) -> None:
            there.node.reconfigure(Config(server=Server(listen=["127.0.0.1:0"]), limits=Limits(**limits)))

        async def served(count: int) -> list[str]:
            return [(await client.ask("publish", topic="a", data=1))["op"] for _ in range(count)]

        assert await served(5) == ["ok"] * 5
        reload(command_rate=0.001, command_burst=2)
        assert await served(3) == ["ok", "ok", "error"]
        reload(command_rate=0.001, command_burst=2, publish_rate=0.001, publish_burst=1)
        assert await served(1) == ["error"]
        reload(publish_rate=0.001, publish_burst=1)
        assert await served(2) == ["ok", "error"]
        reload()
        assert await served(5) == ["ok"] * 5
        slow = there.node.metrics.commands["publish"]
        assert await served(5) == ["ok"] * 5
        assert there.node.metrics.commands["publish"] == slow, "by the fast path"


# Before an identity


async def test_client_without_identity_may_send_small_messages_only() -> None:
    async with serving(authenticator=authenticator()) as there:
        for _ in range(2):
            client = await there.connect()
            await client.tell("auth", token="x" * 20_000)
            closed = await client.closed()
            assert closed is not None
            assert closed.code == CloseCode.TOO_BIG
        client = await there.connect()
        assert client.welcome["max_size"] == 1024 * 1024
        assert (await client.ask("auth", token=token("root", "admin")))["op"] == "ok"
        assert (await client.ask("publish", topic="a", data="x" * 100_000))["op"] == "ok"


# Handshakes


async def test_address_that_connects_too_often_is_refused() -> None:
    async with serving(handshake_rate=0.001, handshake_burst=3) as there:
        first = await there.connect()
        assert [await status(there) for _ in range(4)] == [101, 101, 429, 429]
        assert there.handshakes.limiter.reasons == {"handshake_rate": 2}
        assert await first.ask("ping") == {"op": "pong"}


async def test_forwarded_address_counts_where_a_proxy_is_believed() -> None:
    async with harness(trusted_proxies=["127.0.0.0/8"]) as there:
        there.limiter.reconfigure(Limits(handshake_rate=0.001, handshake_burst=1), there.limiter.capacity)
        for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
            await there.upgrade(request("GET / HTTP/1.1", f"X-Forwarded-For: {address}"))
        for address in ("192.0.2.1", "2001:db8::2"):
            reply = await there.ask(request("GET / HTTP/1.1", f"X-Forwarded-For: {address}"))
            assert (reply.status, int(reply.headers["retry-after"]) >= 1) == (429, True)


async def test_unix_sockets_without_an_address_are_not_counted(tmp_path: Any) -> None:
    path = f"unix:{tmp_path}/ws"
    async with harness(path) as there:
        there.limiter.reconfigure(Limits(handshake_rate=0.001, handshake_burst=1), there.limiter.capacity)
        for _ in range(3):
            await there.upgrade(request())


@pytest.mark.needs("openssl")
async def test_too_many_handshakes_end_before_tls(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    async with serving(pair=pair, handshake_rate=0.001, handshake_burst=2) as there:
        for _ in range(2):
            await there.connect()
        host, _, port = there.address.rpartition(":")
        with pytest.raises((OSError, EOFError, ssl.SSLError)):
            await asyncio.open_connection(host, int(port), ssl=there.context, server_hostname="localhost")
        await until(lambda: there.handshakes.limiter.reasons == {"handshake_rate": 1})


async def test_identity_that_connects_too_often_is_refused() -> None:
    roles = (Role(name="user", connect_rate=0.2),)
    async with serving(authenticator=authenticator(roles=roles)) as there:
        await there.connect(token())
        await there.connect(token())
        assert await refusal(there, token()) == (429, "this identity connects too often")
        await there.connect(token("bob"))


# A bystander


async def test_flood_costs_a_bystander_nothing() -> None:
    async with serving(command_rate=50, command_burst=50) as there:
        bystander, publisher = await there.subscriber("a"), await there.connect()
        flooder = await there.deaf()
        await flooder.send_raw(masked(b'{"op":"ping"}') * 500)
        for number in range(10):
            assert (await publisher.ask("publish", topic="a", data=number))["op"] == "ok"
            assert await bystander.data(1) == [number]
        said = await flooder.rest()
        assert said.count(b'"op":"pong"') >= 50
        assert said.count(b'"code":"rate_limited"') > 50
        assert said.endswith(b"rate_limited"), "the close"
        assert await bystander.ask("ping") == {"op": "pong"}


def test_addresses_of_one_network_count_together() -> None:
    peers = [Peer(parse_ip(text)) for text in ("2001:db8::1", "2001:db8::ffff:2", "192.0.2.1", "::ffff:192.0.2.1")]
    assert peers[0].network == peers[1].network
    assert peers[2].network == peers[3].network
