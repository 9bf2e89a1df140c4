"""A client that reads loses nothing: while a socket takes data, no bound applies and nothing waits.

All of it against a broker in a process of its own, over real sockets, on the broker's default limits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.faults.traffic import Client, Clients, Fields, command, play, publish
from tests.fixtures_broker import RunningBroker, start_broker

MANY = 2000
ROOMY = 4 * 2**20
"""Bytes that a connection's queues may hold, by default (`max_outbox`)."""
SMALL_OUTBOX = 65_536
AMPLE = 1 << 20
"""The receive buffer of a client that reads: its socket takes all of a turn, however late the machine lets it read."""
SILENT = {"WSBROKER_LIMITS__PING_INTERVAL": "0"}
"""Without the broker's pings: each of them is a write, which would take along what nothing else has sent."""
SOON = 5.0
"""Seconds in which what may leave has come; there is nothing else that would send it later."""


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    with start_broker(environ=SILENT) as running:
        yield running


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningBroker]:
    """A broker whose connections may hold little."""
    with start_broker(environ={**SILENT, "WSBROKER_LIMITS__MAX_OUTBOX": str(SMALL_OUTBOX)}) as running:
        yield running


@pytest.fixture
def clients(broker: RunningBroker) -> Iterator[Clients]:
    with Clients(broker.port) as opened:
        yield opened


@pytest.fixture
def narrow_clients(narrow: RunningBroker) -> Iterator[Clients]:
    with Clients(narrow.port) as opened:
        yield opened


def numbered(topic: str, numbers: range, size: int = 0) -> bytes:
    """One publish for each number, to the same topic; of about `size` bytes."""
    return b"".join(command("publish", topic=topic, data=[number, "x" * size]) for number in numbers)


def numbers(messages: list[Fields]) -> list[int]:
    """The numbers of the events."""
    return [message["data"][0] for message in messages if message["op"] == "event"]


def read_events(client: Client, count: int) -> list[Fields]:
    """Read until so many events came, or were announced as missed, or the connection was closed."""
    came = []
    with contextlib.suppress(TimeoutError):  # what has not come is seen in what came
        for message in client.messages(SOON):
            if message["op"] in ("event", "gap", "close"):
                came.append(message)
                count -= message.get("missed", 1)
            if count <= 0 or message["op"] == "close":
                break
    return came


def summary(came: list[Fields]) -> dict[str, int]:
    """What came, in figures that a failure shows whole."""
    return {
        "events": sum(message["op"] == "event" for message in came),
        "missed": sum(message["missed"] for message in came if message["op"] == "gap"),
        "closed with": next((message["code"] for message in came if message["op"] == "close"), 0),
    }


# Thousands of topics in one turn.


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest", "close"])
def test_a_reader_of_everything_gets_the_events_of_2000_topics_in_one_turn(clients: Clients, overflow: str) -> None:
    topics = [f"t{number}" for number in range(MANY)]
    clients.subscribe(topics[:1000])
    clients.subscribe(topics[1000:])
    reader = clients.subscribe([">"], overflow=overflow, receive_buffer=AMPLE)
    publisher = clients.connect(*(command("publish", topic=topic, data=[-1, ""]) for topic in topics))
    read_events(reader, MANY)
    publisher.send(*(command("publish", topic=topic, data=[number, ""]) for number, topic in enumerate(topics)))
    came = read_events(reader, MANY)
    assert summary(came) == {"events": MANY, "missed": 0, "closed with": 0}
    assert sorted(numbers(came)) == list(range(MANY))


def test_a_reader_with_a_queue_of_one_event_gets_the_events_of_2000_topics_in_one_turn(clients: Clients) -> None:
    topics = [f"t{number}" for number in range(MANY)]
    clients.subscribe(topics[:1000])
    clients.subscribe(topics[1000:])
    reader = clients.subscribe([">"], max_queue=1, receive_buffer=AMPLE)
    publisher = clients.connect(*(command("publish", topic=topic, data=[-1, ""]) for topic in topics))
    read_events(reader, MANY)
    publisher.send(*(command("publish", topic=topic, data=[number, ""]) for number, topic in enumerate(topics)))
    assert summary(read_events(reader, MANY)) == {"events": MANY, "missed": 0, "closed with": 0}


def test_a_reader_that_publishes_without_echo_gets_the_events_of_the_others(clients: Clients) -> None:
    """Its own events are taken out of the batches, so the others of the turn are offered to it one by one."""
    bridge = clients.subscribe([">"], echo=False, receive_buffer=AMPLE)
    other = clients.connect()
    for _ in range(5):
        bridge.send(numbered("own", range(1000)))
        other.send(numbered("of.another", range(1000)))
        came = read_events(bridge, 1000)
        assert summary(came) == {"events": 1000, "missed": 0, "closed with": 0}
        assert numbers(came) == list(range(1000))


# What waits for credit does not count against what the socket would take.


def fill_outbox(clients: Clients, *others: bytes) -> Client:
    """A client whose subscription to `big` has no credit, and leaves no room in its `max_outbox` for one more event."""
    reader = clients.connect(
        command("subscribe", topic="big", credit=0, max_queue=65_536, overflow="drop_newest"),
        *others,
        receive_buffer=AMPLE,
    )
    publisher = clients.connect()
    # The later ones are smaller, and fill what the earlier ones left.
    assert play({publisher: numbered("big", range(90), 50_000) + numbered("big", range(2000), 100)}, 20)
    return reader


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest", "close"])
@pytest.mark.parametrize("credit", [{"credit": 1000}, {}], ids=["with credit", "without credit"])
def test_a_subscription_out_of_credit_takes_no_room_from_its_neighbour(
    clients: Clients, overflow: str, credit: dict[str, int]
) -> None:
    reader = fill_outbox(clients, command("subscribe", topic="small", overflow=overflow, **credit))
    clients.connect(numbered("small", range(200), 300))
    came = read_events(reader, 200)
    assert summary(came) == {"events": 200, "missed": 0, "closed with": 0}
    assert numbers(came) == list(range(200))


def test_gap_is_sent_without_another_command_from_the_client(clients: Clients) -> None:
    """If some events of `small` should be lost after all, their gap does not wait for the client's next command."""
    reader = fill_outbox(clients, command("subscribe", topic="small", credit=1000))
    clients.connect(numbered("small", range(100), 300))
    figures = summary(read_events(reader, 100))
    assert figures["events"] + figures["missed"] == 100


def test_every_event_or_a_gap_comes_once_a_barrier_is_gone(narrow_clients: Clients) -> None:
    """Events behind a barrier that fills `max_outbox`: they are kept or lost, but the client is told."""
    reader = narrow_clients.connect(command("subscribe", topic="a.*", credit=0, overflow="drop_newest"))
    publisher = narrow_clients.connect(numbered("a.x", range(1), 65_000))
    reader.send(command("subscribe", topic="a.x", overflow="drop_newest"))
    reader.settle()
    publisher.send(numbered("a.x", range(1, 4), 2000))
    publisher.settle()
    reader.send(command("unsubscribe", topic="a.*"))
    figures = summary(read_events(reader, 3))
    assert figures["events"] + figures["missed"] == 3


def test_what_waits_for_credit_stays_within_its_bounds(clients: Clients) -> None:
    """The other side of it: `max_outbox` still bounds what the broker keeps for one connection."""
    reader = clients.connect(command("subscribe", topic="big", credit=0, max_queue=10_000))
    publisher = clients.connect()
    count, size = 120, 50_000
    assert play({publisher: numbered("big", range(count), size)}, 20)
    reader.send(command("credit", topic="big", add=count))
    came = read_events(reader, count)
    kept = summary(came)["events"]
    assert summary(came) == {"events": kept, "missed": count - kept, "closed with": 0}
    assert ROOMY - 2 * size < kept * size <= ROOMY
    assert numbers(came) == list(range(count - kept, count))
    assert came[0]["op"] == "gap"


# The order barrier: a subscription waits for what broader ones have queued.


def test_events_behind_a_barrier_leave_once_it_is_dropped_for_want_of_bytes(narrow_clients: Clients) -> None:
    reader = narrow_clients.connect(command("subscribe", topic="a.*", credit=0))
    publisher = narrow_clients.connect(numbered("a.x", range(1)))  # waits under `a.*`
    reader.send(command("subscribe", topic="a.x"))
    reader.settle()
    publisher.send(numbered("a.x", range(1, 4)))  # wait for the first one
    publisher.settle()
    # Larger than all that may wait: it goes, and so does what waits under `a.*`.
    publisher.send(command("publish", topic="a.y", data=[99, "x" * (SMALL_OUTBOX + 1)]))
    came = read_events(reader, 3)
    assert [(message["topic"], message["data"][0]) for message in came if message["op"] == "event"] == [
        ("a.x", number) for number in range(1, 4)
    ]


def test_events_behind_a_barrier_leave_once_it_is_dropped_by_number(narrow_clients: Clients) -> None:
    reader = narrow_clients.connect(command("subscribe", topic="a.*", credit=0, max_queue=1))
    publisher = narrow_clients.connect(numbered("a.x", range(1)))
    reader.send(command("subscribe", topic="a.x"))
    reader.settle()
    publisher.send(numbered("a.x", range(1, 4)))
    publisher.settle()
    publisher.send(command("publish", topic="a.y", data=[99, ""]))  # in place of what waits under `a.*`
    came = read_events(reader, 3)
    assert numbers(came) == [1, 2, 3]


def test_a_gap_behind_a_barrier_leaves_with_its_events(narrow_clients: Clients) -> None:
    reader = narrow_clients.connect(command("subscribe", topic="a.*", credit=0))
    publisher = narrow_clients.connect(numbered("a.x", range(1)))
    reader.send(command("subscribe", topic="a.x", max_queue=1, overflow="drop_newest"))
    reader.settle()
    publisher.send(numbered("a.x", range(1, 4)))  # one waits, two are lost
    publisher.settle()
    publisher.send(command("publish", topic="a.y", data=[99, "x" * (SMALL_OUTBOX + 1)]))
    came = read_events(reader, 3)
    assert numbers(came) == [1]
    assert came[-1] == {"op": "gap", "topic": "a.x", "missed": 2, "reason": "overflow"}


@pytest.mark.parametrize("how", ["unsubscribe", "subscribe"], ids=["unsubscribed", "cut"])
def test_events_behind_a_barrier_leave_once_its_queue_is_given_up(narrow_clients: Clients, how: str) -> None:
    reader = narrow_clients.connect(command("subscribe", topic="a.*", credit=0))
    publisher = narrow_clients.connect(numbered("a.x", range(1)))
    reader.send(command("subscribe", topic="a.x"))
    reader.settle()
    publisher.send(numbered("a.x", range(1, 4)), numbered("a.z", range(50, 52)))
    publisher.settle()
    reader.send(command(how, topic="a.*", **({} if how == "unsubscribe" else {"max_queue": 1})))
    assert numbers(read_events(reader, 3)) == [1, 2, 3]


def test_order_is_kept_behind_a_barrier_that_is_not_dropped(clients: Clients) -> None:
    reader = clients.connect(command("subscribe", topic="a.*", credit=0))
    publisher = clients.connect(numbered("a.x", range(100)))
    reader.send(command("subscribe", topic="a.x"))
    reader.settle()
    publisher.send(numbered("a.x", range(100, 200)))
    publisher.settle()
    reader.send(command("credit", topic="a.*", add=1000))
    assert numbers(read_events(reader, 200)) == list(range(200))


# A subscriber that reads slowly, and one that reads again.


def test_client_that_stalls_for_a_while_gets_every_event_or_a_gap_in_order(clients: Clients) -> None:
    reader = clients.connect(command("subscribe", topic="t", max_queue=100), receive_buffer=4096)
    publisher = clients.connect()
    count = 5000
    assert play({publisher: numbered("t", range(count), 1000)}, 20)
    came = read_events(reader, count)
    expected = 0
    for message in came:
        if message["op"] == "gap":
            expected += message["missed"]
        else:
            assert message["data"][0] == expected
            expected += 1
    assert expected == count


def test_a_publish_larger_than_a_socket_takes_reaches_a_reader_whole(clients: Clients) -> None:
    reader = clients.connect(command("subscribe", topic="t", max_queue=1), receive_buffer=4096)
    publisher = clients.connect(publish("t", 1_000_000))
    [event] = read_events(reader, 1)
    assert event["data"] == "x" * 1_000_000
    publisher.settle()
