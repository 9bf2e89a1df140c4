"""Identities of clients over real sockets: how they come in, what they may do, how long, and what a reload ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from websockets.exceptions import InvalidStatus
from websockets.frames import Close

from broker.auth.api_keys import hash_key, make_key
from broker.auth.authenticator import Authenticator
from broker.auth.tokens import TokenPolicy, TokenVerifier
from broker.auth.verification_keys import PublicKeys, Secret
from broker.config import ApiKey, Config, Limits, Role, Server, TopicRule
from broker.errors import CloseCode
from tests.auth.test_tokens import PRIVATE, SECRET
from tests.fixtures_node import Harness, serving
from tests.net.harness import until

ROLES = (
    Role(
        name="user",
        subscribe=("prices.>", "user.{identity}.>"),
        publish=("chat.*", "user.{identity}.>"),
        max_subscriptions=3,
    ),
    Role(name="admin", subscribe=(">",), publish=(">",), block=(">",)),
    Role(name="anonymous", subscribe=("public.>",)),
    Role(name="single", subscribe=(">",), publish=(">",), max_connections=1),
    Role(name="slow", publish=(">",), publish_rate=0.001, publish_burst=3),
)


def token(name: str = "alice", *roles: str, ttl: float = 3600, **claims: Any) -> str:
    return jwt.encode({"sub": name, "roles": list(roles or ("user",)), "exp": time.time() + ttl, **claims}, SECRET)


def authenticator(
    *, required: bool = True, keys: tuple[ApiKey, ...] = (), roles: tuple[Role, ...] = ROLES, leeway: float = 0
) -> Authenticator:
    verifier = TokenVerifier(TokenPolicy(algorithms=("HS256",), leeway=leeway), Secret(SECRET, ("HS256",)))
    return Authenticator(required=required, verifier=verifier, keys=keys, roles=roles)


def config(**limits: Any) -> Config:
    return Config(server=Server(listen=["127.0.0.1:0"]), limits=Limits(**limits))


def error(answer: Mapping[str, Any]) -> tuple[str, str]:
    assert answer["op"] == "error", answer
    return answer["code"], answer["message"]


async def refusal(there: Harness, token: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as raised:
        await there.connect(token)
    body = raised.value.response.body
    assert body is not None
    return raised.value.response.status_code, bytes(body).decode().strip()


# How an identity comes in


async def test_header_identifies_and_welcome_says_so() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token())
        assert client.welcome["identity"] == "alice"
        assert 3590 <= client.welcome["expires_in"] <= 3600
        assert (await client.ask("subscribe", topic="prices.>"))["op"] == "ok"


async def test_subprotocol_entry_identifies() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(subprotocols=["wsbroker.v1", f"bearer.{token()}"])
        assert client.socket.subprotocol == "wsbroker.v1"
        assert client.welcome["identity"] == "alice"


async def test_auth_identifies_and_nothing_else_is_possible_before() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect()
        assert "identity" not in client.welcome
        assert await client.ask("ping") == {"op": "pong"}
        for op in ("subscribe", "publish", "unsubscribe", "credit", "history", "presence"):
            fields = {"publish": {"data": 1}, "credit": {"add": 1}}.get(op, {})
            assert error(await client.ask(op, topic="prices.a", **fields))[0] == "unauthorized"
        answer = await client.ask("auth", token=token())
        assert 3590 <= answer.pop("expires_in") <= 3600
        assert answer == {"op": "ok", "identity": "alice"}
        assert (await client.ask("subscribe", topic="prices.a"))["op"] == "ok"


async def test_commands_behind_auth_in_one_packet_have_the_identity() -> None:
    key = PRIVATE["ES256"]
    verifier = TokenVerifier(TokenPolicy(algorithms=("ES256",)), PublicKeys([(None, key.public_key())]))
    made = jwt.encode({"sub": "alice", "roles": ["user"], "exp": time.time() + 60}, key, "ES256")
    async with serving(authenticator=Authenticator(required=True, verifier=verifier, roles=ROLES)) as there:
        # So many clients that their verifications do not fit into one turn of the loop.
        clients = [await there.connect() for _ in range(50)]
        for client in clients:
            await client.tell("auth", token=made, id=1)
            await client.tell("subscribe", topic="prices.a", id=2)
            await client.tell("publish", topic="chat.a", data=1, id=3)
        for client in clients:
            assert [(await client.answer(each))["op"] for each in (1, 2, 3)] == ["ok", "ok", "ok"]


async def test_client_that_is_closed_while_its_token_is_verified_leaves_nothing_behind() -> None:
    key = PRIVATE["ES256"]
    verifier = TokenVerifier(TokenPolicy(algorithms=("ES256",)), PublicKeys([(None, key.public_key())]))
    made = jwt.encode({"sub": "alice", "exp": time.time() + 60}, key, "ES256")
    async with serving(authenticator=Authenticator(required=True, verifier=verifier)) as there:
        clients = [await there.connect() for _ in range(50)]
        for client in clients:
            await client.tell("auth", token=made)
        await until(lambda: there.node.identities.verifying > 0)
        for client in clients:
            there.session(client).connection.abort()
        await until(lambda: not there.node.sessions)
        last = await there.connect()
        assert (await last.ask("auth", token=made))["op"] == "ok"  # behind all the others
        assert len(there.node.identities) == 1


async def test_api_key_identifies_like_a_token() -> None:
    key = make_key()
    keys = (ApiKey("shop", hash_key(key), ("admin",)),)
    async with serving(authenticator=authenticator(keys=keys)) as there:
        client = await there.connect(key)
        assert client.welcome["identity"] == "shop"
        assert "expires_in" not in client.welcome
        assert (await client.ask("publish", topic="orders.created", data=1))["op"] == "ok"
        assert await refusal(there, make_key()) == (401, "the API key is not known")


async def test_invalid_token_is_refused_in_the_handshake() -> None:
    async with serving(authenticator=authenticator()) as there:
        assert await refusal(there, token(ttl=-60)) == (401, "the token has expired")
        assert await refusal(there, token()[:-3] + "abc") == (401, "the signature of the token is wrong")


async def test_invalid_token_is_refused_by_auth_and_the_tenth_closes() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect()
        for _ in range(9):
            assert error(await client.ask("auth", token="nonsense")) == ("unauthorized", "the token is malformed")
        assert (await client.ask("auth", token=token()))["op"] == "ok"
        for _ in range(10):
            await client.tell("auth", token="nonsense")
        assert await client.closed() == Close(CloseCode.BAD_COMMANDS, "bad_commands")


async def test_client_without_identity_is_closed_in_time() -> None:
    async with serving(authenticator=authenticator(), auth_timeout=0.1) as there:
        client = await there.connect()
        identified = await there.connect()
        assert (await identified.ask("auth", token=token()))["op"] == "ok"
        assert await client.closed() == Close(CloseCode.UNAUTHORIZED, "unauthorized")
        assert await identified.ask("ping") == {"op": "pong"}


async def test_anonymous_clients_have_their_role_where_they_are_let_in() -> None:
    async with serving(authenticator=authenticator(required=False)) as there:
        client = await there.connect()
        assert "identity" not in client.welcome
        assert (await client.ask("subscribe", topic="public.a"))["op"] == "ok"
        assert error(await client.ask("subscribe", topic="prices.a"))[0] == "forbidden"
        assert (await client.ask("auth", token=token()))["identity"] == "alice"
        assert (await client.ask("subscribe", topic="prices.a"))["op"] == "ok"


# What it may do


async def test_missing_right_is_named() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token())
        for op, topic in (("subscribe", "orders.>"), ("subscribe", ">"), ("subscribe", "user.bob.inbox")):
            expected = ("forbidden", f"the right `{op}` is missing for `{topic}`")
            assert error(await client.ask(op, topic=topic)) == expected
        expected = ("forbidden", "the right `publish` is missing for `prices.eurusd`")
        assert error(await client.ask("publish", topic="prices.eurusd", data=1)) == expected
        assert (await client.ask("publish", topic="user.alice.x", data=1))["op"] == "ok"


async def test_right_is_checked_on_the_fast_path_too() -> None:
    async with serving(authenticator=authenticator()) as there:
        admin, user = await there.connect(token("root", "admin")), await there.connect(token())
        for _ in range(3):  # from the second one on there is a route
            assert (await admin.ask("publish", topic="orders.a", data=1))["op"] == "ok"
            assert error(await user.ask("publish", topic="orders.a", data=1))[0] == "forbidden"
        for _ in range(3):
            assert (await user.ask("publish", topic="chat.a", data=1))["op"] == "ok"


async def test_permitted_publish_takes_the_fast_path() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token())
        assert (await client.ask("publish", topic="chat.a", data=1))["op"] == "ok"
        slow = there.node.metrics.commands["publish"]
        for _ in range(5):
            assert (await client.ask("publish", topic="chat.a", data=1))["op"] == "ok"
        assert there.node.metrics.commands["publish"] == slow


async def test_block_needs_a_right_where_there_are_roles() -> None:
    async with serving(authenticator=authenticator()) as there:
        user, admin = await there.connect(token()), await there.connect(token("root", "admin"))
        assert error(await user.ask("subscribe", topic="prices.a", overflow="block"))[0] == "forbidden"
        assert (await admin.ask("subscribe", topic="prices.a", overflow="block"))["op"] == "ok"


async def test_missing_right_to_block_is_named_and_ends_what_has_it() -> None:
    async with serving(authenticator=authenticator()) as there:
        user, client = await there.connect(token()), await there.connect(token("alice", "admin", "user"))
        answer = await user.ask("subscribe", topic="prices.a", overflow="block")
        assert error(answer) == ("forbidden", "the right `block` is missing for `prices.a`")
        for topic, overflow in (("prices.a", "block"), ("prices.b", "drop_oldest")):
            assert (await client.ask("subscribe", topic=topic, overflow=overflow))["op"] == "ok"
        assert (await client.ask("auth", token=token("alice", "user")))["op"] == "ok"
        ended = await client.next()
        assert error(ended) == ("forbidden", "the right `block` is missing for `prices.a`")
        assert ended["topic"] == "prices.a"
        assert list(there.session(client).subscriptions or ()) == ["prices.b"]


async def test_reload_without_the_right_to_block_ends_what_has_it() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token("root", "admin"))
        assert (await client.ask("subscribe", topic="prices.a", overflow="block"))["op"] == "ok"
        roles = (Role(name="admin", subscribe=(">",)),)
        there.node.reconfigure(config(), authenticator(roles=roles))
        assert (await client.next())["topic"] == "prices.a"
        # A rule that has `block` as its default is for everybody.
        rules = [TopicRule(match="prices.>", overflow="block")]
        there.node.reconfigure(Config(topics=rules), authenticator())
        assert (await client.ask("subscribe", topic="prices.a"))["op"] == "ok"
        there.node.reconfigure(Config(topics=rules), authenticator(roles=roles))
        assert await client.ask("ping") == {"op": "pong"}
        assert list(there.session(client).subscriptions or ()) == ["prices.a"]


async def test_subscriptions_are_limited_by_the_role() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token())
        for number in range(3):
            assert (await client.ask("subscribe", topic=f"prices.{number}"))["op"] == "ok"
        assert error(await client.ask("subscribe", topic="prices.4"))[0] == "limit"


async def test_connections_of_an_identity_are_limited() -> None:
    async with serving(authenticator=authenticator()) as there:
        first = await there.connect(token("alice", "single"))
        assert await refusal(there, token("alice", "single")) == (429, "this identity may have 1 connections")
        other = await there.connect()
        answer = await other.ask("auth", token=token("alice", "single"))
        assert error(answer) == ("limit", "this identity may have 1 connections")
        assert (await other.ask("auth", token=token("bob", "single")))["op"] == "ok"
        assert (await first.ask("auth", token=token("alice", "single")))["op"] == "ok", "its own renewal"
        await first.close()
        await until(lambda: len(there.node.sessions) == 1)
        await there.connect(token("alice", "single"))


async def test_connections_of_an_identity_share_a_publish_rate() -> None:
    async with serving(authenticator=authenticator()) as there:
        one, two = await there.connect(token("alice", "slow")), await there.connect(token("alice", "slow"))
        other = await there.connect(token("bob", "slow"))
        answers = [await client.ask("publish", topic="a", data=1) for client in (one, two, one, two, one)]
        assert [answer["op"] for answer in answers] == ["ok", "ok", "ok", "error", "error"]
        assert error(answers[-1])[0] == "rate_limited"
        assert (await other.ask("publish", topic="a", data=1))["op"] == "ok"
        await two.close()
        two = await there.connect(token("alice", "slow"))
        assert error(await two.ask("publish", topic="a", data=1))[0] == "rate_limited", "a new connection is no way out"


# How long


async def test_connection_is_closed_when_its_identity_expires() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token(ttl=1))
        assert client.welcome["expires_in"] <= 1
        assert await client.closed() == Close(CloseCode.EXPIRED, "expired")


async def test_leeway_holds_for_the_expiry_too() -> None:
    async with serving(authenticator=authenticator(leeway=300)) as there:
        client = await there.connect(token(ttl=-10))
        assert client.welcome["expires_in"] == 0
        assert await client.ask("ping") == {"op": "pong"}


async def test_renewal_moves_the_expiry() -> None:
    async with serving(authenticator=authenticator()) as there:
        client, late = await there.connect(token(ttl=1)), await there.connect(token("bob", ttl=1))
        assert (await client.ask("auth", token=token(ttl=3600)))["expires_in"] >= 3590
        assert await late.closed() == Close(CloseCode.EXPIRED, "expired")
        assert await client.ask("ping") == {"op": "pong"}


async def test_expiry_in_the_far_future_is_accepted() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token(exp=10**18))
        assert client.welcome["expires_in"] > 10**15
        client = await there.connect(token(exp=1e300))
        assert client.welcome["expires_in"] == 2**53 - 1


async def test_connection_does_not_change_its_identity() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token("alice"))
        answer = await client.ask("auth", token=token("bob"))
        assert error(answer) == ("forbidden", "a connection cannot change its identity")
        assert (await client.ask("publish", topic="user.alice.x", data=1))["op"] == "ok"


async def test_renewal_with_fewer_rights_ends_subscriptions_and_publishing() -> None:
    async with serving(authenticator=authenticator()) as there:
        client, other = await there.connect(token("alice", "admin")), await there.connect(token("root", "admin"))
        for topic in ("orders.>", "prices.a"):
            assert (await client.ask("subscribe", topic=topic))["op"] == "ok"
        for _ in range(3):
            assert (await client.ask("publish", topic="other.a", data=1))["op"] == "ok"
        assert (await client.ask("auth", token=token("alice", "user")))["op"] == "ok"
        assert await client.next() == {
            "op": "error",
            "code": "forbidden",
            "message": "the right `subscribe` is missing for `orders.>`",
            "retry": False,
            "topic": "orders.>",
        }
        assert error(await client.ask("publish", topic="other.a", data=1))[0] == "forbidden"
        for topic in ("orders.a", "prices.a"):
            await other.ask("publish", topic=topic, data=topic)
        assert await client.data(1) == ["prices.a"]


# Reload


async def test_reload_with_fewer_rights_ends_what_is_no_longer_allowed() -> None:
    async with serving(authenticator=authenticator()) as there:
        client, other = await there.connect(token()), await there.connect(token("root", "admin"))
        for topic in ("prices.>", "user.alice.x"):
            assert (await client.ask("subscribe", topic=topic))["op"] == "ok"
        for _ in range(3):
            assert (await client.ask("publish", topic="chat.a", data=1))["op"] == "ok"
        roles = (Role(name="user", subscribe=("prices.>",)), ROLES[1])
        there.node.reconfigure(config(), authenticator(roles=roles))
        ended = await client.next()
        assert (ended["op"], ended["code"], ended["topic"]) == ("error", "forbidden", "user.alice.x")
        assert error(await client.ask("publish", topic="chat.a", data=1))[0] == "forbidden"
        for topic in ("user.alice.x", "prices.a"):
            await other.ask("publish", topic=topic, data=topic)
        assert await client.data(1) == ["prices.a"]


async def test_reload_with_more_rights_holds_at_once() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token())
        assert error(await client.ask("subscribe", topic="orders.>"))[0] == "forbidden"
        there.node.reconfigure(config(), authenticator(roles=(Role(name="user", subscribe=(">",)),)))
        assert (await client.ask("subscribe", topic="orders.>"))["op"] == "ok"


async def test_reload_without_an_api_key_disconnects_its_users() -> None:
    keys = [make_key(), make_key()]
    configured = [ApiKey(name, hash_key(key), ("admin",)) for name, key in zip("ab", keys, strict=True)]
    async with serving(authenticator=authenticator(keys=(*configured,))) as there:
        gone, stays = await there.connect(keys[0]), await there.connect(keys[1])
        changed = ApiKey("b", configured[1].hash, ("user",))
        there.node.reconfigure(config(), authenticator(keys=(changed,)))
        assert await gone.closed() == Close(CloseCode.UNAUTHORIZED, "unauthorized")
        assert error(await stays.ask("publish", topic="orders.a", data=1))[0] == "forbidden"


async def test_reload_that_requires_tokens_disconnects_anonymous_clients() -> None:
    async with serving(authenticator=authenticator(required=False)) as there:
        client, known = await there.connect(), await there.connect(token())
        there.node.reconfigure(config(), authenticator())
        assert await client.closed() == Close(CloseCode.UNAUTHORIZED, "unauthorized")
        assert await known.ask("ping") == {"op": "pong"}


async def test_reload_reaches_every_client_over_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.identities.WALK_SLICE", 0.0)
    async with serving(authenticator=authenticator()) as there:
        clients = [await there.connect(token(f"user{number}")) for number in range(20)]
        for client in clients:
            assert (await client.ask("subscribe", topic="prices.a"))["op"] == "ok"
        for roles in (ROLES, (Role(name="user"),)):  # the second begins while the first is under way
            there.node.reconfigure(config(), authenticator(roles=roles))
        for client in clients:
            assert (await client.next())["topic"] == "prices.a"


async def test_reload_changes_the_publish_rate_of_a_role() -> None:
    async with serving(authenticator=authenticator()) as there:
        client = await there.connect(token("alice", "slow"))
        for _ in range(3):
            assert (await client.ask("publish", topic="a", data=1))["op"] == "ok"
        assert error(await client.ask("publish", topic="a", data=1))[0] == "rate_limited"
        there.node.reconfigure(config(), authenticator(roles=(Role(name="slow", publish=(">",)),)))
        for _ in range(10):
            assert (await client.ask("publish", topic="a", data=1))["op"] == "ok"
        there.node.reconfigure(config(publish_rate=0.001, publish_burst=2))
        answers = [(await client.ask("publish", topic="a", data=1))["op"] for _ in range(3)]
        assert answers == ["ok", "ok", "error"]


# Kept events


async def test_kept_events_need_the_right_history() -> None:
    roles = (
        Role(name="anonymous", subscribe=(">",), publish=(">",)),
        Role(name="reader", subscribe=(">",), history=("log.*",)),
    )
    rules = [TopicRule("log.*", history=10)]
    async with serving(authenticator=authenticator(required=False, roles=roles), topics=rules) as there:
        guest = await there.connect()
        position = await guest.ask("publish", topic="log.a", data=1)
        since = {"epoch": position["epoch"], "offset": 0}
        for op, field in (("history", {"last": 1}), ("subscribe", {"last": "all"}), ("subscribe", {"since": since})):
            answer = await guest.ask(op, topic="log.a", **field)
            assert error(answer) == ("forbidden", "the right `history` is missing for `log.a`")
        assert (await guest.ask("subscribe", topic="log.a"))["offset"] == 1
        reader = await there.connect(token("bob", "reader"))
        assert (await reader.ask("history", topic="log.a", last=1))["events"] == [{"offset": 1, "data": 1}]
        assert (await reader.ask("subscribe", topic="log.a", since=since))["recovered"] is True
        assert await reader.data(1) == [1]
