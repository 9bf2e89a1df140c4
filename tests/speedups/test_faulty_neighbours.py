"""One connection's fault stays its own: nothing of the others is lost, doubled, delayed or left half done."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from broker._speedups import RouteCache
from broker.node import _event_prefix
from tests.speedups.nodes import Node
from tests.speedups.transports import frames_in
from tests.speedups.wire import CLOSE, TEXT, client_frame

RECENT_PLACES = 4096
"""Places in the table of routes looked up last (RECENT in routes.pxi)."""
MANY = 1500
"""Members to which one send each costs more than a connection's share of a turn, by the units of work."""


def recent_place(name: bytes) -> int:
    """The place of a topic in the table of routes looked up last, as routes.pxi computes it."""
    mask, mixed, at = (1 << 64) - 1, len(name), 0
    words = []
    while at + 8 < len(name):
        words.append(name[at : at + 8])
        at += 8
    words.append(name[-8:])
    for word in words:
        mixed = ((mixed ^ int.from_bytes(word, "little")) * 0x9E3779B97F4A7C15) & mask
        mixed ^= mixed >> 32 if word is not words[-1] else 0
    return (mixed >> 32) % RECENT_PLACES


def fail(*_: object) -> None:
    raise RuntimeError("broken")


def no_memory(*_: object) -> None:
    raise MemoryError


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_routes_that_share_a_place_are_withdrawn_with_their_filter(new_node: Any) -> None:
    seen: dict[int, str] = {}
    for number in itertools.count():
        two = f"a.t{number}"
        one = seen.setdefault(recent_place(two.encode()), two)
        if one != two:
            break
    node: Node = new_node()
    subscriber, publisher = node.client(), node.client()
    subscription = subscriber.subscribe("a.>")
    cache = RouteCache(2)
    publisher.connection.routes = cache

    def install(topic: str) -> None:
        cache.install(topic, node.hub.audience(topic), _event_prefix(topic))

    kept = node.hub.audience("a.x")
    install(one)
    install(two)
    publisher.transport.send(TEXT, b'{"op":"publish","topic":"%s","data":1}' % two.encode())
    assert node.context.fast_publishes == 1, "it is found by its place"
    for number in range(3):
        install(f"a.zz{number}")
        assert one in cache or number
    cache.withdraw_filter(subscription.filter)
    assert len(cache) == 0
    assert kept.receivers == 1


def test_publisher_that_is_parked_twice_in_a_turn_goes_on_once(new_node: Any) -> None:
    node: Node = new_node()
    one, other, publisher = node.client(), node.client(), node.client()
    for client, topic in ((one, "a"), (other, "b")):
        client.stop()
        client.subscribe(topic, max_queue=1, overflow="block")
        node.publish(topic, 0, origin=publisher)
    node.publish("a", 1, origin=publisher)
    assert publisher.connection.parked_publishes == 1
    one.unsubscribe("a")
    node.publish("b", 1, origin=publisher)  # of an engine that answers late
    assert publisher.connection.parked_publishes == 1
    other.unsubscribe("b")
    node.turn()
    assert publisher.connection.parked_publishes == 0


@pytest.mark.parametrize("subscribed", [True, False])
@pytest.mark.parametrize("error", [True, False])
def test_close_frame_is_sent_after_a_batch_under_way(new_node: Any, subscribed: bool, error: bool) -> None:
    node: Node = new_node()
    client = node.client()
    (client if subscribed else node.client()).subscribe("t")
    client.connection.answer(b"{}")
    node.publish("t", 1, origin=client)
    if error:
        client.connection.feed(b"\xc3\x80\0\0\0\0")
    else:
        client.transport.send(CLOSE, b"\x03\xe8")
    frames, _ = frames_in(client.transport.received)
    assert [opcode for opcode, _ in frames] == [TEXT, *([TEXT] if subscribed else []), CLOSE]


def test_client_that_cannot_be_written_to_costs_no_one_else_an_event(
    new_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node: Node = new_node()
    broken, publisher, other = node.client(), node.client(), node.client()
    broken.subscribe("t", max_queue=2, credit=100)
    other.subscribe("t", credit=100)
    monkeypatch.setattr(broken.transport, "write", fail)
    for number in range(4):
        assert node.publish("t", number, origin=publisher)[0] == 2
    node.turn()
    assert broken.connection.state_name == "closed"
    assert other.read_all() == [0, 1, 2, 3]


def test_session_that_fails_at_the_close_leaves_no_subscription(new_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = new_node()
    client = node.client()
    client.subscribe("t")
    monkeypatch.setattr(client, "on_close", fail)
    with pytest.raises(RuntimeError, match="broken"):
        client.connection.close(4000, "x")
    assert node.context.subscriptions == 0
    node.turn()
    assert [opcode for opcode, _ in frames_in(client.transport.received)[0]] == [CLOSE]


def test_flush_that_fails_leaves_the_audience_and_the_others_as_they_were(
    new_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node: Node = new_node()
    broken, other, third = node.client(), node.client(), node.client()
    broken.subscribe("t")
    other.subscribe("t")
    kept = node.hub.audience("t")
    monkeypatch.setattr(broken.transport, "write", interrupt)
    third.connection.answer(b'{"op":"pong"}')
    node.publish("t", 1)
    with pytest.raises(KeyboardInterrupt):
        node.turn()
    monkeypatch.undo()
    node.turn()
    assert b"pong" in third.transport.received
    node.publish("t", 2)
    node.turn()
    assert other.read_all()[-1:] == [2]
    assert kept.receivers == 2


def test_sends_at_the_end_of_a_turn_are_no_work_of_the_next_commands(new_node: Any) -> None:
    node: Node = new_node()
    node.context.command_time = 0.004
    for _ in range(MANY):
        node.client().subscribe("t")
    publisher = node.client()
    routes = publisher.connection.routes = RouteCache()
    routes.install("t", node.hub.audience("t"), _event_prefix("t"))
    message = client_frame(TEXT, b'{"op":"publish","topic":"t","data":1}')
    node.turn()
    publisher.connection.feed(message)
    node.turn()
    publisher.connection.feed(message * 20)
    assert node.context.fast_publishes == 21


def test_commands_of_a_broken_connection_are_bounded_as_all_others(new_node: Any) -> None:
    node: Node = new_node()
    node.context.command_time = 0.0005
    for _ in range(500):
        node.client().subscribe("t", credit=0, overflow="drop_newest", max_queue=4)
    publisher = node.client()
    routes = publisher.connection.routes = RouteCache()
    routes.install("t", node.hub.audience("t"), _event_prefix("t"))
    message = client_frame(TEXT, b'{"op":"publish","topic":"t","data":1}')
    node.turn()
    publisher.connection.feed(message * 3000)
    publisher.connection.abort()
    before = node.context.fast_publishes
    node.loop.turn_once()
    assert node.context.fast_publishes - before < 3000


def test_subscriptions_behind_each_other_are_limited(new_node: Any) -> None:
    node: Node = new_node()
    client = node.client()
    for number in range(200):
        client.subscribe(f"a.*.{number}.>", credit=0)
        node.publish(f"a.x.{number}.y", 1)

    def subscribe_on() -> None:
        for number in range(200):
            client.subscribe(f"a.{number}.>")

    with pytest.raises(OverflowError, match="too many subscriptions"):
        subscribe_on()
    # What was refused has left nothing.
    assert node.context.subscriptions == 200 + 16_384 // 200


def test_publisher_that_cannot_be_answered_does_not_halt_the_others(
    new_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node: Node = new_node()
    subscriber, bad, good = node.client(), node.client(), node.client()
    subscriber.stop()
    subscriber.subscribe("t", max_queue=1, overflow="block")
    node.publish("t", 0)
    node.publish("t", 1, origin=bad)
    node.publish("t", 2, origin=good)
    bad.connection.answer_publish(b'{"op":"ok"}' + b" " * 70_000)
    good.connection.answer_publish(b'{"op":"ok","id":7}')
    monkeypatch.setattr(bad.transport, "write", no_memory)
    subscriber.unsubscribe("t")
    node.turn()
    assert good.transport.reading
    assert b'"id":7' in good.transport.received
    assert bad.connection.state_name == "closed"


def test_publisher_goes_on_after_a_turn_that_failed(new_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = new_node()
    subscriber, publisher, broken = node.client(), node.client(), node.client()
    subscriber.stop()
    subscriber.subscribe("t", max_queue=1, overflow="block")
    node.publish("t", 0)
    node.publish("t", 1, origin=publisher)
    assert not publisher.transport.reading
    broken.subscribe("u")
    monkeypatch.setattr(broken.transport, "write", interrupt)
    node.publish("u", 1)
    subscriber.unsubscribe("t")
    with pytest.raises(KeyboardInterrupt):
        node.turn()
    monkeypatch.undo()
    node.turn()
    assert publisher.transport.reading


def test_subscription_is_gone_even_if_its_end_fails(new_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = new_node()
    client = node.client()
    subscription = client.subscribe("a.>", credit=0)
    node.publish("a.b", 1)
    client.subscribe("a.b")
    node.turn()
    monkeypatch.setattr(node.loop, "call_soon", no_memory)
    with pytest.raises(MemoryError):
        subscription.cancel()
    monkeypatch.undo()
    assert (subscription.state, subscription.connection, node.context.subscriptions) == ("cancelled", None, 1)
    assert subscription.filter.subscribers == 0
    client.subscriptions.pop("a.>")


def test_publishers_go_on_even_if_the_end_of_a_subscription_fails(
    new_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node: Node = new_node()
    subscriber, one, two = node.client(), node.client(), node.client()
    subscriber.stop()
    subscription = subscriber.subscribe("t", max_queue=1, overflow="block")
    node.publish("t", 0)
    node.publish("t", 1, origin=one)
    node.publish("t", 2, origin=two)
    node.turn()
    monkeypatch.setattr(node.loop, "call_soon", no_memory)
    with pytest.raises(MemoryError):
        subscription.cancel()
    monkeypatch.undo()
    subscriber.subscriptions.clear()
    node.client().connection.answer(b"{}")  # the next turn
    node.turn()
    assert one.transport.reading
    assert two.transport.reading
    assert (subscription.state, subscription.connection) == ("cancelled", None)


def test_subscriptions_outlive_their_closed_loop(new_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = new_node()
    client = node.client()
    client.subscribe("a.>", credit=0)
    node.publish("a.b", 1)
    client.subscribe("a.b")
    client.subscribe("a.c")
    node.turn()
    monkeypatch.setattr(node.loop, "call_soon", fail)
    monkeypatch.setattr(node.loop, "is_closed", lambda: True, raising=False)
    client.subscriptions.pop("a.>").cancel()
    assert [each.state for each in client.subscriptions.values()] == ["queued", "queued"]
    client.subscriptions.clear()
    assert node.context.subscriptions == 0
    monkeypatch.undo()


def test_connection_whose_session_fails_is_cut(new_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = new_node()
    client = node.client()
    messages: list[bytes] = []

    def message(payload: bytes, text: bool) -> None:
        messages.append(payload)
        if payload == b"1":
            client.connection.pause()
        elif payload == b"2":
            raise MemoryError

    monkeypatch.setattr(client, "message", message)
    for payload in (b"1", b"2", b"3"):
        client.transport.send(TEXT, payload)
    client.connection.resume()
    with pytest.raises(MemoryError):
        node.turn()
    node.turn()
    assert messages == [b"1", b"2"]
    assert client.connection.state_name == "closed"


def test_turn_that_leaves_work_to_the_next_is_measured_from_its_beginning(
    new_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node: Node = new_node()
    clients = [node.client() for _ in range(3)]
    pause = 0.02
    for client in clients:
        client.subscribe("t", credit=1000, max_queue=1000)

        def write(data: bytes, client: Any = client) -> None:
            time.sleep(pause)
            type(client.transport).write(client.transport, data)

        monkeypatch.setattr(client.transport, "write", write)
    for number in range(300):
        node.publish("t", number, size=2000)
    began = time.monotonic()
    node.loop.turn_once()
    assert node.context.write_times[2] >= pause
    assert node.context.write_times[2] >= 0.8 * (time.monotonic() - began)


def test_write_that_fails_before_a_subscription_disconnects(new_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = new_node()
    client = node.client()
    client.subscribe("t", credit=10)
    node.publish("t", 0)
    monkeypatch.setattr(client.transport, "write", no_memory)
    client.subscribe("u")
    assert client.connection.state_name == "disconnected", "what was lost is not followed by anything"


def test_turn_writes_to_as_many_connections_as_it_has_time_for(new_node: Any) -> None:
    node: Node = new_node()
    clients = [node.client() for _ in range(1000)]
    for client in clients:
        client.subscribe("t", credit=1000)
    for number in range(20):
        node.publish("t", number, size=3000)
    node.loop.turn_once()
    # By the clock, so no exact number: one turn cannot write 60 MB in 4 ms.
    assert any(not client.transport.received for client in clients)
    node.turn()
    assert all(client.read() == list(range(20)) for client in clients)
