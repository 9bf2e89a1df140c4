"""A client that reads loses nothing, whatever else goes on: events for which the socket, the credit and the order leave
the way free are sent, and what may wait is bounded by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from broker.hub import UNLIMITED
from tests.speedups.nodes import Client, Node
from tests.speedups.transports import RoomySocket, SlowPipe, SlowSocket

POLICIES = ["drop_oldest", "drop_newest", "latest", "block", "close"]
KINDS = [SlowPipe, RoomySocket]
MANY = 2000
"""More topics than one write has pieces, and than the default `max_queue` has room for."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overflow", POLICIES)
def test_a_wide_subscriber_gets_an_event_of_each_of_thousands_of_topics_in_one_turn(
    new_node: Callable[..., Node], kind: type[SlowPipe], overflow: str
) -> None:
    node = new_node()
    wide, crowd = node.client(kind), node.client()
    subscription = wide.subscribe(">", overflow=overflow)
    for number in range(MANY):
        crowd.subscribe(f"t.{number}")
    for number in range(MANY):
        node.publish(f"t.{number}", number)
    node.turn()
    # One turn may leave something for the next: the test reads on as a client does.
    assert sorted(wide.read_all(), key=str) == sorted(range(MANY), key=str)
    assert len(crowd.read_all()) == MANY
    assert subscription.dropped == 0
    node.end()


@pytest.mark.parametrize("max_queue", [1, 256])
def test_events_of_many_exact_subscriptions_of_one_client_all_arrive(
    new_node: Callable[..., Node], max_queue: int
) -> None:
    node = new_node()
    client = node.client()
    for number in range(MANY):
        client.subscribe(f"t.{number}", max_queue)
    for again in range(2):
        for number in range(MANY):
            node.publish(f"t.{number}", again * MANY + number)
    node.turn()
    assert sorted(client.read_all(), key=str) == sorted(range(2 * MANY), key=str)
    node.end()


@pytest.mark.parametrize("credit", [UNLIMITED, 1000])
@pytest.mark.parametrize("overflow", POLICIES)
def test_events_without_credit_take_no_room_from_a_subscription_that_can_be_sent(
    new_node: Callable[..., Node], overflow: str, credit: int
) -> None:
    node = new_node(max_outbox=10_000)
    client = node.client()
    client.subscribe("big", 1000, credit=0)
    for number in range(30):
        node.publish("big", number, 900)
    node.turn()
    assert 8000 < client.connection.queued_bytes <= 10_000
    small = client.subscribe("small", 5, overflow, credit=credit)
    for number in range(200):
        node.publish("small", number, 900)
    node.turn()
    assert client.read() == list(range(200))
    assert small.dropped == small.queued == 0
    node.end()


@pytest.mark.parametrize("kind", [SlowPipe, SlowSocket])
def test_events_without_credit_take_no_room_from_a_subscription_that_waits_for_the_socket(
    new_node: Callable[..., Node], kind: type[SlowPipe]
) -> None:
    node = new_node(max_outbox=10_000)
    client = node.client(kind)
    client.subscribe("big", 1000, credit=0)
    for number in range(30):
        node.publish("big", number, 900)
    node.turn()
    small = client.subscribe("small", 100)
    client.stop()
    for number in range(9):
        node.publish("small", number, 900)
    assert (small.queued, small.dropped) == (9, 0)
    # What waits for the socket counts against itself.
    for number in range(9, 14):
        node.publish("small", number, 900)
    assert 9 <= small.queued <= 10
    assert small.queued + small.dropped == 14
    assert client.read_all() == [("overflow", small.dropped), *range(small.dropped, 14)]
    node.end()


def test_what_waits_for_the_socket_takes_room_from_a_subscription_without_credit(new_node: Callable[..., Node]) -> None:
    node = new_node(max_outbox=10_000)
    client = node.client()
    idle = client.subscribe("idle", 1000, credit=0)
    client.subscribe("busy", 1000)
    client.stop()
    for number in range(9):
        node.publish("busy", number, 900)
    node.publish("idle", "idle", 900)
    node.publish("idle", "idle", 900)
    assert idle.queued + idle.dropped == 2
    assert idle.dropped >= 1
    node.end()


def test_a_gap_leaves_with_the_turn_in_which_the_socket_is_free(new_node: Callable[..., Node]) -> None:
    node = new_node()
    client = node.client()
    client.subscribe("a", 2, "drop_newest", credit=100)
    client.stop()
    for number in range(5):
        node.publish("a", number)
    client.transport.drain(None)
    node.turn()
    assert client.read() == [0, 1, ("overflow", 3)]
    assert not client.connection.lagging
    node.end()


def test_a_gap_of_a_subscription_whose_whole_queue_was_dropped_needs_no_input_of_the_client(
    new_node: Callable[..., Node],
) -> None:
    node = new_node(max_outbox=4000)
    client = node.client()
    client.subscribe("a", 100)
    client.stop()
    node.publish("a", 0, 900)
    node.publish("a", 1, 4000)
    client.transport.drain(None)
    node.turn()
    assert client.read() == [("overflow", 2)]
    node.end()


# The order barrier


def drop_for_bytes(node: Node, client: Client) -> None:
    """An event larger than all that may wait throws out what is queued, and is lost itself."""
    node.publish("a.c", "large", 8000)


def drop_for_length(node: Node, client: Client) -> None:
    node.publish("a.c", "second")


def drop_by_age(node: Node, client: Client) -> None:
    time.sleep(0.03)  # nothing tells when it has passed: it is the age that is tested
    node.publish("a.c", "young")


def conflate(node: Node, client: Client) -> None:
    client.subscriptions["a.*"].change(max_queue=1, overflow="latest", echo=True)
    node.publish("a.c", "other", key="k")


def unsubscribe(node: Node, client: Client) -> None:
    client.unsubscribe("a.*")


def change_bound(node: Node, client: Client) -> None:
    client.subscriptions["a.*"].change(max_queue=0, overflow="drop_oldest", echo=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "drop",
    [drop_for_bytes, drop_for_length, drop_by_age, conflate, unsubscribe, change_bound],
    ids=lambda drop: drop.__name__,
)
def test_a_subscription_goes_on_once_what_it_waited_for_is_dropped(
    new_node: Callable[..., Node], kind: type[SlowPipe], drop: Callable[[Node, Client], None]
) -> None:
    node = new_node(max_outbox=6000)
    node.context.max_age = {"a.b": 0.01}.get if drop is drop_by_age else None
    client = node.client(kind)
    client.subscribe("a.*", 1, credit=0)
    node.publish("a.b", "first", 100)
    node.turn()
    # This one is behind the order barrier: an event of its topic waits under the pattern, which has no credit.
    client.subscribe("a.b")
    node.context.max_age = None
    node.publish("a.b", "second")
    node.turn()
    assert client.read() == []
    drop(node, client)
    node.turn()
    assert "second" in client.read()
    node.publish("a.b", "third")
    node.turn()
    assert client.read()[-1] == "third"
    node.end()


def test_a_conflated_event_no_longer_holds_the_barrier(new_node: Callable[..., Node]) -> None:
    node = new_node()
    client = node.client()
    client.subscribe("a.>", 10, "latest", credit=0)
    node.publish("a.b", 0, key="k")
    node.turn()
    client.subscribe("a.*", 10)
    node.publish("a.b", 1)
    node.turn()
    assert client.read() == []
    # The pattern keeps its right to events of deeper topics alone, and the one that held the barrier is replaced.
    client.subscriptions["a.>"].change(max_queue=0, overflow="latest", echo=True)
    node.turn()
    assert client.read() == [1]
    node.end()


def test_events_behind_the_barrier_take_no_room_from_a_subscription_that_waits_for_the_socket(
    new_node: Callable[..., Node],
) -> None:
    node = new_node(max_outbox=10_000)
    client = node.client()
    client.subscribe("a.*", 10, credit=0)
    node.publish("a.b", "first")
    client.subscribe("a.b", 100)
    for number in range(9):
        node.publish("a.b", number, 900)
    small = client.subscribe("small", 100)
    client.stop()
    for number in range(9):
        node.publish("small", number, 900)
    assert (small.queued, small.dropped) == (9, 0)
    assert client.read_all() == list(range(9))
    node.end()


# In the middle of a turn


def cancel(client: Client) -> None:
    client.unsubscribe("a.b")


def change(**policy: Any) -> Callable[[Client], None]:
    def change(client: Client) -> None:
        client.subscriptions["a.b"].change(**{"max_queue": 10, "overflow": "drop_oldest", "echo": True, **policy})

    return change


def subscribe_to_another(client: Client) -> None:
    client.subscribe("a.c")


CHANGES: dict[str, Callable[[Client], None]] = {
    "cancel": cancel,
    "echo": change(echo=False),
    "overflow": change(overflow="drop_newest"),
    "latest": change(overflow="latest"),
    "block": change(overflow="block"),
    "max_queue": change(max_queue=1),
    "credit": change(credit=100),
    "another": subscribe_to_another,
}


ENDS: dict[str, Callable[[Client], None]] = {
    "close": lambda client: client.connection.close(1000, ""),
    "abort": lambda client: client.connection.abort(),
    "lose": lambda client: client.transport.lose(),
    "end_writing": lambda client: client.transport.end_writing(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", CHANGES)
def test_a_change_in_the_middle_of_a_turn_loses_nothing_of_the_batches_under_way(
    new_node: Callable[..., Node], kind: type[SlowPipe], how: str
) -> None:
    node = new_node()
    client, other = node.client(kind), node.client(kind)
    client.subscribe("a.*", 3)
    client.subscribe("a.b", 3)
    client.subscribe(">", 3)
    other.subscribe(">", 3)
    topics = ["a.b", "a.c", "b", "a.d.e"]
    expected = {topic: list(range(place, 40, len(topics))) for place, topic in enumerate(topics)}
    for number in range(40):
        if number == 20:
            CHANGES[how](client)
        node.publish(topics[number % len(topics)], number, origin=other if how != "echo" else client)
    node.turn()
    if how == "echo":
        expected["a.b"] = expected["a.b"][:5]
    read = client.read()
    for events in expected.values():
        assert [number for number in read if number in events] == events
    assert len(read) == sum(len(events) for events in expected.values())
    assert sorted(other.read()) == list(range(40))
    node.end()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ENDS)
def test_a_connection_that_ends_in_the_middle_of_a_turn_costs_the_others_nothing(
    new_node: Callable[..., Node], kind: type[SlowPipe], how: str
) -> None:
    node = new_node()
    client, other = node.client(kind), node.client(kind)
    for each in (client, other):
        each.subscribe("a.*", 3)
        each.subscribe("a.b", 3)
    for number in range(40):
        if number == 20:
            ENDS[how](client)
        node.publish(("a.b", "a.c")[number % 2], number)
    node.turn()
    assert sorted(other.read()) == list(range(40))
    for topic in range(2):
        read = [number for number in client.read() if isinstance(number, int) and number % 2 == topic]
        assert read == list(range(topic, 40, 2))[: len(read)]
    node.end()
