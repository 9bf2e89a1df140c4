"""Tokens of both clients against the real broker: how they are shown, renewed, refused, and what their expiry ends."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

import pytest

from tests.auth.test_tokens import SECRET
from tests.fixtures_node import Harness, serving
from tests.net.harness import until
from tests.test_identities import ROLES, authenticator, config, token
from wsbroker_client import Changed, Client, Closed, CommandRefused, Refused, State, TokenFailed

PACKAGE = Path(__file__).parents[2] / "clients" / "js"


def states(seen: list[Changed]) -> list[State]:
    return [change.state for change in seen]


async def test_token_is_shown_in_the_handshake() -> None:
    async with serving(authenticator=authenticator()) as there, Client(there.url, token=token()) as client:
        await client.connect()
        assert client.welcome["identity"] == "alice"
        subscription = client.subscribe("user.alice.>")
        await subscription.ready()
        assert (await client.publish("user.alice.a", 1)).receivers == 1


async def test_right_that_is_missing_ends_a_subscription_and_refuses_a_publish() -> None:
    async with serving(authenticator=authenticator()) as there, Client(there.url, token=token()) as client:
        with pytest.raises(CommandRefused, match="forbidden"):
            await client.subscribe("secret").ready()
        with pytest.raises(CommandRefused, match="forbidden"):
            await client.publish("secret", 1)


async def test_token_that_does_not_verify_closes_the_client() -> None:
    async with serving(authenticator=authenticator()) as there, Client(there.url, token="wrong") as client:
        with pytest.raises(Refused) as refused:
            await client.connect()
        assert refused.value.status == 401
        assert client.state is State.CLOSED


async def test_refused_token_is_fetched_again() -> None:
    tokens = iter([token(ttl=-10), token()])
    async with (
        serving(authenticator=authenticator()) as there,
        Client(there.url, token=lambda: next(tokens)) as client,
    ):
        await client.connect()
        assert client.welcome["identity"] == "alice"


async def test_client_without_a_token_is_closed_where_the_broker_wants_one() -> None:
    async with (
        serving(authenticator=authenticator(), auth_timeout=0.1) as there,
        Client(there.url) as client,
    ):
        with pytest.raises(CommandRefused, match="unauthorized"):
            await client.subscribe("prices.a").ready()
        await until(lambda: client.state is State.CLOSED)
        assert isinstance(client.failure, Closed)
        assert client.failure.close_code == 4500


async def test_token_is_renewed_before_it_expires() -> None:
    seen: list[Changed] = []
    expiries: list[float] = []

    def fetch() -> str:
        expiries.append(time.time() + 2)
        return token(ttl=2)

    async with (
        serving(authenticator=authenticator()) as there,
        Client(there.url, token=fetch, on_state=seen.append) as client,
    ):
        await until(lambda: len(expiries) == 3)
        while time.time() < expiries[0] + 0.5:  # noqa: ASYNC110 -- the broker's clock is no event
            await asyncio.sleep(0.05)
        await client.publish("chat.a", 1)
        assert states(seen) == [State.CONNECTING, State.CONNECTED]


async def test_token_that_was_not_renewed_ends_the_connection_and_the_next_has_a_new_one() -> None:
    seen: list[Changed] = []
    errors: list[BaseException] = []
    fetched = 0

    def fetch() -> str:
        nonlocal fetched
        fetched += 1
        if fetched > 1 and not any(change.state is State.WAITING for change in seen):
            raise RuntimeError("the login service is away")
        return token(ttl=1.5 if fetched == 1 else 3600)

    async with (
        serving(authenticator=authenticator()) as there,
        Client(there.url, token=fetch, on_state=seen.append, on_error=errors.append) as client,
    ):
        await until(lambda: states(seen).count(State.CONNECTED) == 2)
        (waiting,) = [change for change in seen if change.state is State.WAITING]
        assert isinstance(waiting.failure, Closed)
        assert waiting.failure.close_code == 4501
        assert waiting.delay == 0.0
        assert errors
        assert all(isinstance(error, TokenFailed) for error in errors)
        await client.publish("chat.a", 1)


async def test_expired_token_that_cannot_be_renewed_closes_the_client() -> None:
    async with serving(authenticator=authenticator()) as there, Client(there.url, token=token(ttl=0.3)) as client:
        await until(lambda: client.state is State.CLOSED)
        assert isinstance(client.failure, Closed)
        assert client.failure.close_code == 4501


async def test_renewed_token_with_fewer_rights_ends_subscriptions() -> None:
    tokens = iter([token("alice", "admin", ttl=1.5), token("alice", "user"), token("alice", "user")])
    async with (
        serving(authenticator=authenticator()) as there,
        Client(there.url, token=lambda: next(tokens)) as client,
    ):
        allowed, forbidden = client.subscribe("prices.a"), client.subscribe("secret")
        await allowed.ready()
        await forbidden.ready()
        with pytest.raises(CommandRefused, match="forbidden"):
            await forbidden.__anext__()
        assert client.state is State.CONNECTED
        assert (await client.publish("chat.a", 1)).receivers == 0
        assert allowed.error is None


async def test_renewal_for_another_identity_is_reported_and_tried_again() -> None:
    errors: list[BaseException] = []
    tokens = [token("alice"), token("bob"), token("alice", ttl=1.5)]
    async with (
        serving(authenticator=authenticator()) as there,
        Client(there.url, token=tokens.pop, on_error=errors.append) as client,
    ):
        await until(lambda: not tokens)
        await client.ping()
        assert client.state is State.CONNECTED
        assert [getattr(error, "code", "") for error in errors] == ["forbidden"]


async def test_reload_with_fewer_rights_ends_a_subscription() -> None:
    async with serving(authenticator=authenticator()) as there, Client(there.url, token=token()) as client:
        subscription = client.subscribe("prices.a")
        await subscription.ready()
        there.node.reconfigure(config(), authenticator(roles=ROLES[1:]))
        with pytest.raises(CommandRefused, match="forbidden"):
            await subscription.__anext__()


async def run_node(there: Harness) -> None:
    process = await asyncio.create_subprocess_exec(
        "node",
        "test/tokens.test.js",
        cwd=PACKAGE,
        env={**os.environ, "BROKER": there.url, "SECRET": SECRET.decode()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert re.search(r"^# pass [1-9]", output, re.MULTILINE), output
    assert re.search(r"^# skipped 0$", output, re.MULTILINE), output


@pytest.mark.needs("node")
async def test_tokens_of_the_javascript_client() -> None:
    async with serving(authenticator=authenticator(), auth_timeout=1.0) as there:
        await run_node(there)
