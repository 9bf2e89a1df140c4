"""A connection that the client has half-closed, or that the broker has aborted: until the loop says that it is lost,
the client reads whole frames, and at the end at most one that was cut.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker import messages
from broker._speedups import Connection, LoopContext
from broker.config import Limits
from broker.hub import UNLIMITED, Hub
from tests.speedups.nodes import Client, Node
from tests.speedups.transports import SlowPipe, SlowSocket, UvloopSocket, UvloopTurns, check_tail, frames_in
from tests.speedups.wire import CLOSE, TEXT, client_frame

KINDS = [SlowPipe, SlowSocket]
LARGE = 30_000
"""More bytes than a small socket takes at once."""

Ending = Callable[[Client], None]
ENDS: dict[str, Ending] = {
    "end_writing": lambda client: client.transport.end_writing(),
    "abort": lambda client: client.connection.abort(),
    "transport_close": lambda client: client.transport.close(),
}


def check_stream(client: Client) -> list[int]:
    """Check that the client read whole frames and at most one cut frame at the end. Returns its events."""
    received = client.transport.received
    _, size = frames_in(received)
    check_tail(received[size:])
    return [number for number in client.read() if isinstance(number, int)]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_follows_one_that_was_cut_after_the_end(
    new_node: Callable[..., Node], kind: type[SlowPipe], how: str
) -> None:
    node = new_node()
    client, other = node.client(kind), node.client()
    for each in (client, other):
        each.subscribe("a")
    node.publish("a", 0)
    node.turn()
    client.transport.drain(None)
    ENDS[how](client)
    if kind is SlowPipe:
        client.transport.room = 1000
    # The transport's buffer is empty: it drops what it is given, and the rest of the frame with it.
    node.publish("a", 1, LARGE)
    node.context.flush_batches()
    client.transport.drain(None)
    for number in range(2, 6):
        node.publish("a", number)
        node.context.flush()
        client.transport.drain(None)
    node.turn()
    assert check_stream(client) in ([0], [0, 1])
    assert client.connection.state_name == "closed"
    assert other.read() == list(range(6))
    node.end()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("queued", [1, 3, 40])
def test_no_queued_event_follows_a_frame_that_was_cut_after_the_end(
    new_node: Callable[..., Node], queued: int, how: str
) -> None:
    node = new_node()
    client = node.client(SlowSocket)
    subscription = client.subscribe("a", 100, credit=0)
    for number in range(queued):
        node.publish("a", number, LARGE if number == 0 else 10)
    node.turn()
    ENDS[how](client)
    for _ in range(queued):
        subscription.add_credit(1)
        node.context.flush()
        client.transport.drain(None)
    node.turn()
    check_stream(client)
    node.end()


@pytest.mark.parametrize("how", ENDS)
def test_no_answer_follows_a_frame_that_was_cut_after_the_end(new_node: Callable[..., Node], how: str) -> None:
    node = new_node()
    client = node.client(SlowSocket)
    client.subscribe("a")
    ENDS[how](client)
    node.publish("a", 0, LARGE)
    node.context.flush_batches()
    client.transport.drain(None)
    client.connection.answer(b'{"op":"pong"}')
    node.context.flush()
    client.transport.drain(None)
    # The close handshake, too, has nothing to say behind a frame that was cut.
    client.connection.close(1001, "going_away")
    client.transport.drain(None)
    node.turn()
    check_stream(client)
    node.end()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_transport_still_holds_at_the_end_stays_ahead(
    new_node: Callable[..., Node], kind: type[SlowPipe], how: str
) -> None:
    """A close with a full buffer waits until the client has read it; an abort does not."""
    node = new_node()
    client = node.client(kind)
    client.subscribe("a", 2)
    client.stop()
    ENDS[how](client)
    for number in range(4):
        node.publish("a", number)
        node.context.flush_batches()
        client.transport.drain(500)
    for _ in range(100):
        client.transport.drain(500)
        node.loop.turn_once()
        node.publish("a", "late")
    client.transport.drain(None)
    node.turn()
    check_stream(client)
    assert client.connection.state_name == "closed"
    node.end()


@pytest.mark.parametrize("wait", ["credit", "barrier", "socket", "replay", "block"])
def test_whatever_waits_for_a_client_that_half_closes_is_forgotten_with_it(
    new_node: Callable[..., Node], wait: str
) -> None:
    node = new_node()
    client, publisher = node.client(), node.client()
    client.subscribe("a.*", 1, credit=0 if wait in ("credit", "barrier") else UNLIMITED)
    node.publish("a.b", 0)
    if wait == "barrier":
        client.subscribe("a.b")
    elif wait in ("replay", "block"):
        client.subscribe("a.b", 1, wait)
    if wait in ("socket", "replay", "block"):
        client.transport.block()
        client.connection.answer(b'{"op":"pong"}')
        node.turn()
    for number in range(3):
        node.publish("a.b", number, origin=publisher, offset=number + 1)
    assert publisher.connection.parked_publishes == (2 if wait == "block" else 0)
    client.transport.end_writing()
    client.transport.drain(None)
    node.turn()
    assert client.connection.state_name == "closed"
    assert publisher.connection.parked_publishes == 0
    assert node.context.queued == node.context.lagging_connections == node.context.parked_publishers == 0
    check_stream(client)
    node.end()


def test_a_client_that_half_closes_in_answer_to_our_close_frame_reads_it(new_node: Callable[..., Node]) -> None:
    node = new_node()
    client = node.client(SlowSocket)
    client.connection.close(1001, "going_away")
    client.transport.send(CLOSE, (1001).to_bytes(2, "big"))
    client.transport.end_writing()
    node.turn()
    assert client.read() == [(1001).to_bytes(2, "big") + b"going_away"]
    assert client.connection.state_name == "closed"
    node.end()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_after_this_side_has_ended_writing(
    new_node: Callable[..., Node], kind: type[SlowPipe]
) -> None:
    """After a frame that cannot be read the broker sends a close frame, ends its direction and waits for the peer's."""
    node = new_node()
    client = node.client(kind)
    client.subscribe("a")
    client.transport.protocol.feed(client_frame(TEXT, b"{}", reserved=7))
    node.publish("a", 0)
    client.connection.answer(b'{"op":"pong"}')
    node.turn()
    client.transport.drain(None)
    assert client.connection.state_name == "half_closed"
    assert [opcode for opcode, _ in frames_in(client.transport.received)[0]] == [CLOSE]
    client.transport.end_writing()
    node.turn()
    assert client.connection.state_name == "closed"
    assert [opcode for opcode, _ in frames_in(client.transport.received)[0]] == [CLOSE]
    assert not node.loop.faults
    node.end()


@pytest.mark.parametrize("aborts", [False, True])
def test_uvloop_ends_a_connection_without_a_broken_frame(aborts: bool) -> None:
    """The same with uvloop's own transport, which the ones above stand in for."""
    turns = UvloopTurns()
    context = LoopContext(turns.as_loop(), Limits(ping_interval=0), encode_gap=messages.encode_gap)
    hub = Hub(context)
    transport = UvloopSocket(turns)
    connection = Connection(context)
    transport.attach(connection)
    try:
        subscription = hub.subscribe(connection, "a", max_queue=10, overflow="drop_oldest", echo=True)
        if aborts:
            connection.abort()
        else:
            transport.end_writing()
        while not transport.is_closing():
            turns.loop.call_soon(turns.loop.stop)
            turns.loop.run_forever()
        # It closes, and `connection_lost` comes in the next turn; the descriptor is open until then.
        assert subscription.connection is connection or not aborts
        for number, size in enumerate((LARGE, 10, 10)):
            data = b'[%d,"%s"]' % (number, b"x" * size)
            hub.audience("a").publish("a", messages.encode_event("a", data))
            context.flush()
            transport.drain(None)
        turns.turn()
        transport.drain(None)
        _, size = frames_in(transport.received)
        check_tail(transport.received[size:])
        assert connection.state_name == "closed"
        assert subscription.connection is None
    finally:
        transport.lose()
        turns.loop.close()
