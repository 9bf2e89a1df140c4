"""Publishes that wait for a store: numbered and packed as the store reads them, delivered in order, answered once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker._speedups import Keeper, PendingBatch, RouteCache, deliver_batch
from broker.config import Limits
from broker.engines.store import unpack_events
from broker.node import _event_prefix
from tests.speedups.nodes import Client, Node
from tests.speedups.transports import frames_in
from tests.speedups.wire import TEXT, client_frame

MakeNode = Callable[..., Node]
TOPICS = ("a", "b.c", "lönger.than.the.others", "refused")


class World:
    """A publisher whose routes lead to a keeper, and a store that counts."""

    def __init__(self, node: Node, most: int = 1000, most_bytes: int = 1 << 20) -> None:
        self.node = node
        self.woken = 0
        self.left_to_the_session: list[bytes] = []
        self.routes = RouteCache()
        self.keeper = Keeper(self._wake, most, most_bytes)
        self.publisher = node.client()
        self.publisher.connection.routes = self.routes
        self.publisher.connection.session = self
        self.tops: dict[str, int] = {}
        self.kept: dict[str, list[tuple[int, str | None, Any]]] = {}
        self.batches: list[PendingBatch] = []

    def _wake(self) -> None:
        self.woken += 1

    def message(self, payload: bytes, text: bool) -> None:
        self.left_to_the_session.append(payload)

    def on_close(self, code: int, reason: str) -> None:
        """Nothing: it is not kept in a list."""

    def install(self, topic: str) -> None:
        audience = self.node.hub.audience(topic)
        self.routes.install(topic, audience, _event_prefix(topic), None, self.keeper, ("retention of", topic))

    def publish(self, topic: str, data: Any, key: str | None = None, id: int | str | None = None) -> None:
        fields = {"op": "publish", "topic": topic, "key": key, "data": data, "id": id}
        command = {name: value for name, value in fields.items() if value is not None or name == "data"}
        text = json.dumps(command, ensure_ascii=False, separators=(",", ":")).encode()
        self.publisher.connection.feed(client_frame(TEXT, text))

    def keep(self, most_events: int = 1000, most_bytes: int = 1 << 20) -> PendingBatch | None:
        """Number what waits, as the store does; topics with the name `refused` are."""
        batch = self.keeper.take()
        if batch is None:
            return None

        def take(topic: str, retention: object) -> object:
            assert retention == ("retention of", topic)
            return "no room" if topic == "refused" else (topic, self.tops.get(topic, 0), f"epoch of {topic[0]}")

        for topic, pack, count, size in batch.number(take, most_events, most_bytes):
            first = self.tops.get(topic, 0) + 1
            events = unpack_events(topic, pack, first, 0, 1 << 30)
            assert len(events) == count <= most_events
            assert sum(len(bytes(event.data)) + len((event.key or "").encode()) for event in events) == size
            assert count == 1 or size <= most_bytes
            self.tops[topic] = first + count - 1
            kept = self.kept.setdefault(topic, [])
            kept += [(event.offset or 0, event.key, json.loads(bytes(event.data))) for event in events]
        self.batches.append(batch)
        return batch

    def deliver(self) -> list[tuple[Any, bytes | None, Any]]:
        """Deliver and answer all that was numbered; what was refused."""
        refused = []
        for batch in self.batches:
            while not deliver_batch(batch, self.routes, self.node.hub.audience, 1.0):
                pass
            refused += batch.refused()
            self.keeper.done(batch)
        self.batches.clear()
        return refused

    def answers(self) -> list[dict[str, Any]]:
        """What the publisher was answered."""
        self.node.turn()
        self.publisher.transport.drain(None)
        return [json.loads(payload) for _, payload in frames_in(self.publisher.transport.received)[0]]


def events(client: Client) -> list[tuple[str, int, str | None, Any]]:
    """All events that a client got."""
    client.transport.drain(None)
    messages = [json.loads(payload) for _, payload in frames_in(client.transport.received)[0]]
    return [(each["topic"], each["offset"], each.get("key"), each["data"]) for each in messages]


def test_events_are_delivered_and_answered_after_they_were_kept(new_node: MakeNode) -> None:
    world = World(new_node())
    subscriber = world.node.client()
    subscriber.subscribe("a")
    world.install("a")
    world.publish("a", [1, {"x": None}], key="ä", id="first")
    world.publish("a", "two")
    world.publish("a", 3, id=7)
    assert world.woken == 1
    assert (world.keeper.waiting, world.publisher.connection.unanswered) == (3, 3)
    assert world.answers() == []
    assert events(subscriber) == []
    world.keep()
    assert world.kept == {"a": [(1, "ä", [1, {"x": None}]), (2, None, "two"), (3, None, 3)]}
    assert world.deliver() == []
    world.node.turn()
    assert events(subscriber) == [("a", 1, "ä", [1, {"x": None}]), ("a", 2, None, "two"), ("a", 3, None, 3)]
    ok = {"op": "ok", "receivers": 1, "queued": 0, "dropped": 0, "epoch": "epoch of a"}
    assert world.answers() == [{**ok, "id": "first", "offset": 1}, {**ok, "id": 7, "offset": 3}]
    assert (world.keeper.waiting, world.keeper.waiting_bytes, world.publisher.connection.unanswered) == (0, 0, 0)
    assert world.left_to_the_session == []


def test_who_subscribed_meanwhile_gets_the_event(new_node: MakeNode) -> None:
    world = World(new_node())
    world.install("a")
    world.publish("a", 1)
    late = world.node.client()
    late.subscribe("a")
    world.routes.withdraw("a")  # as the node's hub does with its own
    world.keep()
    world.deliver()
    world.node.turn()
    assert events(late) == [("a", 1, None, 1)]


def test_beyond_the_bounds_the_session_has_to_answer(new_node: MakeNode) -> None:
    world = World(new_node(max_inflight=1000), most=2)
    world.install("a")
    for n in range(3):
        world.publish("a", n)
    assert len(world.left_to_the_session) == 1
    world.keep()
    world.publish("a", 3)
    assert len(world.left_to_the_session) == 2, "what is under way counts"
    world.deliver()
    world.publish("a", 4)
    assert len(world.left_to_the_session) == 2
    world.keeper.most_bytes = 100
    world.publish("a", "x" * 200)
    assert len(world.left_to_the_session) == 3
    world.keep()
    world.deliver()


def test_connection_is_not_read_while_too_many_of_its_publishes_wait(new_node: MakeNode) -> None:
    world = World(new_node(max_inflight=4))
    world.install("a")
    for n in range(10):
        world.publish("a", n, id=n)
    assert world.publisher.connection.unanswered == 4
    seen = []
    for _ in range(5):
        world.keep()
        world.deliver()
        world.node.turn()
    seen = [answer["id"] for answer in world.answers()]
    assert seen == list(range(10))
    assert world.left_to_the_session == []


def test_failed_batch_is_refused_as_a_whole(new_node: MakeNode) -> None:
    world = World(new_node())
    world.install("a")
    world.publish("a", 1, id="x")
    world.publish("a", 2)
    batch = world.keep()
    assert batch is not None
    connection = world.publisher.connection
    assert batch.refused("why") == [(connection, b'"x"', "why"), (connection, None, "why")]
    assert batch.refused("why") == []
    assert deliver_batch(batch, world.routes, world.node.hub.audience, 1.0)
    assert world.answers() == []
    assert connection.unanswered == 0
    world.keeper.done(batch)


def test_publisher_that_is_gone_loses_nothing_of_the_others(new_node: MakeNode) -> None:
    world = World(new_node())
    subscriber = world.node.client()
    subscriber.subscribe("a")
    world.install("a")
    world.publish("a", 1, id=1)
    world.publisher.transport.lose()
    world.node.turn()
    world.keep()
    world.deliver()
    world.node.turn()
    assert events(subscriber) == [("a", 1, None, 1)]


def test_failing_audience_does_not_keep_the_others_from_being_answered(new_node: MakeNode) -> None:
    world = World(new_node())
    world.install("a")
    world.install("b")
    world.publish("a", 1, id=1)
    world.publish("b", 2, id=2)
    batch = world.keep()
    assert batch is not None
    world.routes.withdraw("a")

    def fail(topic: str) -> Any:
        raise RuntimeError(topic)

    with pytest.raises(RuntimeError, match="a"):
        deliver_batch(batch, world.routes, fail, 1.0)
    assert [answer["id"] for answer in world.answers()] == [1, 2]
    world.keeper.done(batch)


STEPS = st.one_of(
    st.tuples(
        st.just("publish"),
        st.sampled_from(TOPICS),
        st.sampled_from([None, "", "k", "ü", "long" * 20]),
        st.sampled_from([1, None, "text", "x" * 300, [1, [2, {"a": "ö"}]]]),
        st.booleans(),
    ),
    st.tuples(st.just("keep"), st.integers(1, 5), st.integers(1, 500)),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("subscribe"), st.sampled_from(TOPICS)),
    st.tuples(st.just("withdraw"), st.sampled_from(TOPICS)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_any_order_of_steps_keeps_delivers_and_answers_each_publish_once(steps: list[tuple[Any, ...]]) -> None:
    world = World(Node(max_inflight=Limits().max_inflight))
    observer = world.node.client()
    for topic in TOPICS:
        observer.subscribe(topic)
        world.install(topic)
    published: dict[str, list[tuple[str | None, Any]]] = {topic: [] for topic in TOPICS}
    ids: dict[int, str] = {}
    refused: list[Any] = []
    for step, *what in steps:
        if step == "publish":
            topic, key, data, answered = what
            if topic not in world.routes:
                world.install(topic)
            if world.publisher.connection.unanswered >= 60:
                continue
            published[topic].append((key, data))
            ids[len(ids)] = topic if answered else ""
            world.publish(topic, data, key, len(ids) - 1 if answered else None)
        elif step == "keep":
            world.keep(*what)
        elif step == "deliver":
            refused += world.deliver()
        elif step == "subscribe":
            world.node.client().subscribe(what[0])
        else:
            world.routes.withdraw(what[0])
    world.keep()
    refused += world.deliver()
    world.node.turn()
    for topic in TOPICS[:-1]:
        expected = [(n, key, data) for n, (key, data) in enumerate(published[topic], 1)]
        assert world.kept.get(topic, []) == expected
        assert [event[1:] for event in events(observer) if event[0] == topic] == expected
    assert len(refused) == len(published["refused"])
    answers = world.answers()
    wanted = {number for number, topic in ids.items() if topic not in ("", "refused")}
    assert sorted(answer["id"] for answer in answers) == sorted(wanted)
    for answer in answers:
        assert answer["epoch"] == f"epoch of {ids[answer['id']][0]}"
    assert {json.loads(text) for _, text, _ in refused if text} == {n for n, topic in ids.items() if topic == "refused"}
    assert (world.keeper.waiting, world.keeper.waiting_bytes, world.publisher.connection.unanswered) == (0, 0, 0)
    assert world.left_to_the_session == []
    world.node.end()
