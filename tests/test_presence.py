"""Presence over real sockets: members, join and leave, rights, pages, and a storm of reconnections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from broker import presence
from broker.config import Config, Role, Server, TopicRule
from broker.engines.base import Member
from broker.engines.memory import MemoryPresence, Roll
from tests.engines.late import LateServer
from tests.fixtures_node import Client, Harness, serving
from tests.net.harness import until
from tests.test_identities import authenticator, token

RULES = (TopicRule("room.*", presence=True), TopicRule("kept.*", presence=True, history=100))
Serve = Callable[..., AbstractAsyncContextManager[Harness]]


@asynccontextmanager
async def with_memory(**options: Any) -> AsyncIterator[Harness]:
    async with serving(topics=RULES, **options) as harness:
        yield harness
        assert harness.node.members.count == sum(len(each.memberships or ()) for each in harness.node.sessions.values())


@asynccontextmanager
async def with_late(**options: Any) -> AsyncIterator[Harness]:
    async with serving(LateServer(bound=1_000_000).engine(), topics=RULES, **options) as harness:
        yield harness


@pytest.fixture(params=[with_memory, with_late], ids=["memory", "late"])
def serve(request: pytest.FixtureRequest) -> Serve:
    found: Serve = request.param
    return found


async def enter(harness: Harness, topic: str = "room.a", **fields: Any) -> Client:
    """A new member of a topic."""
    client = await harness.connect()
    assert (await client.ask("subscribe", topic=topic, **fields))["op"] == "ok"
    return client


async def listed(client: Client, topic: str = "room.a", **fields: Any) -> list[dict[str, Any]]:
    answer = await client.ask("presence", topic=topic, **fields)
    assert answer["op"] == "ok", answer
    members: list[dict[str, Any]] = answer["members"]
    return members


def change(op: str, client: Client, topic: str = "room.a", **fields: Any) -> dict[str, Any]:
    return {"op": op, "topic": topic, "session": client.session, **fields}


async def test_members_are_listed_with_their_info(serve: Serve) -> None:
    async with serve() as harness:
        first = await enter(harness, info={"name": "Ann", "n": [1, None]})
        second = await enter(harness, info=None)
        third = await enter(harness)
        answer = await third.ask("presence", topic="room.a")
        members = sorted(answer.pop("members"), key=lambda member: str(member["session"]))
        assert answer == {"op": "ok", "topic": "room.a", "count": 3}
        expected: list[dict[str, Any]] = [
            {"session": first.session, "info": {"name": "Ann", "n": [1, None]}},
            {"session": second.session, "info": None},
            {"session": third.session},
        ]
        assert members == sorted(expected, key=lambda member: str(member["session"]))
        assert await listed(third, "room.b") == []
        assert (await third.ask("unsubscribe", topic="room.a"))["op"] == "ok"
        await first.close()
        await until(lambda: len(harness.node.sessions) == 2)
        assert [member["session"] for member in await listed(third)] == [second.session]


async def test_observers_are_told_who_comes_changes_and_goes(serve: Serve) -> None:
    async with serve() as harness:
        observer = await enter(harness, presence=True, info=1)
        member = await enter(harness, info=2)
        assert await observer.next() == change("join", member, info=2)
        await member.ask("subscribe", topic="room.a", info=3)
        assert await observer.next() == change("join", member, info=3)
        await member.ask("subscribe", topic="room.a", max_queue=9)  # nothing that others see
        await observer.ask("subscribe", topic="room.a", info=4)  # its own change is not for it
        await member.ask("unsubscribe", topic="room.a")
        assert await observer.next() == change("leave", member, info=3)
        other = await enter(harness, "room.b")
        last = await enter(harness)
        assert await observer.next() == change("join", last)
        await last.close()
        assert await observer.next() == change("leave", last)
        await observer.nothing()
        await other.nothing()


async def test_observer_can_stop_and_begin_again() -> None:
    async with with_memory() as harness:
        observer = await enter(harness, presence=True)
        assert (await observer.ask("subscribe", topic="room.a", presence=False))["op"] == "ok"
        unseen = await enter(harness)
        assert (await observer.ask("subscribe", topic="room.a", presence=True))["op"] == "ok"
        seen = await enter(harness)
        assert await observer.next() == change("join", seen)
        await unseen.close()
        assert await observer.next() == change("leave", unseen)
        assert harness.node.members._watched["room.a"].changes == {}
        await observer.ask("unsubscribe", topic="room.a")
        assert harness.node.members._watched == {}


async def test_presence_and_history_go_together(serve: Serve) -> None:
    async with serve() as harness:
        publisher = await harness.connect()
        await publisher.ask("publish", topic="kept.a", data=1)
        observer = await harness.connect()
        answer = await observer.ask("subscribe", topic="kept.a", last="all", presence=True)
        assert answer["offset"] == 1
        assert await observer.data(1) == [1]
        assert (await observer.next())["op"] == "live"
        member = await enter(harness, "kept.a")
        assert await observer.next() == change("join", member, "kept.a")


async def test_identity_is_shown_and_a_later_one_replaces_it() -> None:
    roles = (Role(name="anonymous", subscribe=("room.*",), presence=("room.*",)), Role(name="user", subscribe=(">",)))
    async with with_memory(authenticator=authenticator(required=False, roles=roles)) as harness:
        observer = await enter(harness, presence=True)
        member = await enter(harness, info=1)
        assert await observer.next() == change("join", member, info=1)
        assert (await member.ask("auth", token=token("alice", "user")))["identity"] == "alice"
        assert await observer.next() == change("join", member, identity="alice", info=1)
        assert {"session": member.session, "identity": "alice", "info": 1} in await listed(observer)


async def test_presence_needs_a_right_of_its_own() -> None:
    roles = (Role(name="anonymous", subscribe=(">",)), Role(name="guard", subscribe=(">",), presence=("room.*",)))
    async with with_memory(authenticator=authenticator(required=False, roles=roles)) as harness:
        member = await enter(harness, info="seen")
        for command in ({"op": "presence"}, {"op": "subscribe", "presence": True}):
            answer = await member.ask(topic="room.a", **command)
            assert (answer["code"], answer["message"]) == ("forbidden", "the right `presence` is missing for `room.a`")
        guard = await harness.connect(token("bob", "guard"))
        assert (await guard.ask("subscribe", topic="room.a", presence=True))["op"] == "ok"
        assert len(await listed(guard)) == 2
        # A reload that takes the right away ends what is told.
        harness.node.reconfigure(
            Config(server=Server(listen=["127.0.0.1:0"]), topics=list(RULES)),
            authenticator(required=False, roles=(roles[0], Role(name="guard", subscribe=(">",)))),
        )
        ended = await guard.next()
        assert (ended["code"], ended["topic"]) == ("forbidden", "room.a")
        assert harness.node.members._watched == {}
        await until(lambda: harness.node.members.count == 1)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ({"op": "presence", "topic": "room.*"}, "bad_topic", "`room.*`"),
        ({"op": "presence", "topic": "other"}, "no_presence", "`other` has no presence"),
        ({"op": "presence", "topic": "room.a", "limit": 1001}, "limit", "`limit` may be at most 1000"),
        ({"op": "presence", "topic": "room.a", "limit": 0}, "bad_command", "`limit` must be"),
        ({"op": "presence", "topic": "room.a", "after": 1}, "bad_command", "`after` must be a string"),
        ({"op": "subscribe", "topic": "other", "presence": True}, "no_presence", "`other` has no presence"),
        ({"op": "subscribe", "topic": "room.*", "presence": True}, "bad_command", "`presence` needs a topic"),
        ({"op": "subscribe", "topic": "room.*", "info": 1}, "bad_command", "`info` needs a topic"),
        ({"op": "subscribe", "topic": "room.a", "info": "x" * 1023}, "limit", "`info` may have at most 1024 bytes"),
    ],
)
async def test_refusals(command: dict[str, Any], code: str, message: str) -> None:
    async with with_memory() as harness:
        client = await harness.connect()
        answer = await client.ask(**command)
        assert (answer["op"], answer["code"]) == ("error", code)
        assert message in answer["message"]
        assert harness.node.members.count == 0


async def test_info_of_the_largest_size_is_taken() -> None:
    async with with_memory() as harness:
        client = await enter(harness, info="x" * 1022)
        assert (await listed(client))[0]["info"] == "x" * 1022


async def test_pages_hold_every_member_once_and_fit_the_largest_message(serve: Serve) -> None:
    async with serve(max_size=8192) as harness:
        client = await enter(harness, info="x" * 900)
        staying = {client.session} | {(await enter(harness, info="x" * 900)).session for _ in range(30)}
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            answer = await client.ask("presence", topic="room.a", limit=1000, **cursor)
            assert len(answer["members"]) < 10
            assert answer["count"] >= len(staying)
            seen += [member["session"] for member in answer["members"]]
            if "more" not in answer:
                break
            cursor = {"after": answer["more"]}
            passing = await enter(harness)
            await passing.close()
        assert len(seen) == len(set(seen))
        assert staying <= set(seen)


def test_roll_agrees_with_a_model() -> None:
    """Members come, are replaced and go at random; every page is what a plain list in order of joining gives."""
    chance = random.Random(7)
    roll, model = Roll(), dict[str, Member]()
    for step in range(20_000):
        session = f"s{chance.randrange(60)}"
        if chance.random() < 0.5:
            member = Member(session, None, str(step).encode())
            roll.add(member)
            model[session] = member
        else:
            assert roll.remove(session) == model.pop(session, None)
        if step % 100 == 0:
            limit = chance.randrange(1, 20)
            found: list[Member] = []
            cursor: int | None = 0
            while cursor is not None:
                page, cursor = roll.page(cursor, limit)
                assert len(page) <= limit
                found += page
            assert found == list(model.values())
            assert len(roll._places) <= 2 * len(model) + 17


def test_cursor_that_was_never_given_is_the_beginning() -> None:
    members = MemoryPresence()
    pages: list[Any] = []
    members.join("a", Member("s1"), lambda result: None)
    for cursor in ("", "x", "-1", "9" * 40, "²"):
        members.members("a", cursor, 5, pages.append)
    assert [len(page.members) for page in pages] == [1] * 5


async def test_storm_of_members_is_told_in_few_writes_and_once_for_each(serve: Serve) -> None:
    """Everybody comes, goes and comes again while changes are gathered: the observer's list is right at the end."""
    async with serve() as harness:
        observer = await enter(harness, presence=True)
        members = [await harness.connect() for _ in range(40)]
        here: set[str] = set()
        told = 0
        for turn in range(5):
            for place, member in enumerate(members):
                await member.tell("subscribe", topic="room.a", info=turn)
                await member.tell("unsubscribe", topic="room.a")
                if place % 2:
                    await member.tell("subscribe", topic="room.a", info=turn)
        await asyncio.gather(*(member.ask("ping") for member in members))
        staying = {member.session for place, member in enumerate(members) if place % 2}
        last = await enter(harness, info="last")
        while (message := await observer.next())["session"] != last.session:
            told += 1
            (here.add if message["op"] == "join" else here.discard)(message["session"])
        assert here == staying
        await observer.nothing()
        assert told <= 40 * 5 * 3


async def test_session_that_left_before_anybody_knew_of_it_is_not_told_of() -> None:
    async with with_memory() as harness:
        observer = await enter(harness, presence=True)
        member = await harness.connect()
        await member.send('{"op":"subscribe","topic":"room.a"}')
        await member.send('{"op":"unsubscribe","topic":"room.a"}')
        await member.ask("ping")
        last = await enter(harness)
        told = [await observer.next()]
        if told[0]["session"] == member.session:  # the changes were sent in between
            told = [await observer.next(), await observer.next()][1:]
        assert told == [change("join", last)]


async def test_observer_that_does_not_read_keeps_nobody_up_and_is_closed_when_it_costs_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "MAX_KEPT", 50)
    monkeypatch.setattr(presence, "RETRY", 0.02)
    async with with_memory(max_queue=10) as harness:
        deaf = await harness.deaf()
        await deaf.tell("subscribe", topic="room.a", presence=True)
        await until(lambda: harness.node.members.count == 1)
        await deaf.tell("subscribe", topic="flood", max_queue=10)
        publisher = await harness.connect()
        session = harness.session(deaf)
        while not session.connection.lagging:
            await publisher.ask("publish", topic="flood", data="x" * 60_000)
        observer = await enter(harness, presence=True)
        told = []
        while deaf.session in harness.node.sessions:
            member = await enter(harness, info="y" * 200)
            told.append(await observer.next())
            if told[-1]["session"] != deaf.session:
                assert told[-1] == change("join", member, info="y" * 200)
        assert len(told) >= 50
        if told[-1]["session"] != deaf.session:
            assert (await observer.next())["op"] == "leave"


async def test_join_to_a_topic_with_many_members_looks_at_none_of_them() -> None:
    """The cost is counted in members touched, not in seconds: a member that is looked at says so."""

    class Touchy(dict[str, Any]):
        def __iter__(self) -> Any:
            raise AssertionError("all members were looked at")

        items = values = keys = __iter__

    members = MemoryPresence()
    members.start(lambda topic, member, here: None)
    for number in range(2000):
        members.join("a", Member(f"s{number}"), lambda result: None)
    roll = members._topics["a"]
    roll.members = Touchy(roll.members)
    members.join("a", Member("one more"), lambda result: None)
    members.leave("a", "s5", lambda result: None)
    assert len(roll.members) == 2000
