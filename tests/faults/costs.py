"""What test_costs.py counts, and the program that does it under callgrind:

    python -m tests.faults.costs LIBRARY CASE…

Each case has a size: the number of topics, patterns, subscriptions, members or routes that there are. It is prepared
once with `size` of them and once with twice as many, and only the operation itself is counted. LIBRARY is
bench/instructions/marks.c compiled; a mark is named "CASE SIZE".
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product

from bench.instructions.harness import Harness, frame, publish
from broker import messages
from broker._speedups import Connection
from broker.config import Config
from broker.log import set_up_log

LINEAR = 2.3
"""How much more an operation may take that meets twice as many."""
FLAT = 1.2
"""The same for an operation that does not meet them at all."""

Operation = Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    about: str
    most: float
    """The largest ratio that is allowed between twice the size and the size."""
    size: int
    make: Callable[[int], Operation]
    """Prepares so many, and returns the operation that is counted."""


# What the operations are made of.


def do(harness: Harness, connection: Connection, *commands: messages.Command | bytes) -> Operation:
    """Commands that come in one turn of the loop, and what is sent at its end."""
    frames = [frame(one if isinstance(one, bytes) else messages.encode_command(one)) for one in commands]
    data = b"".join(frames)

    def run() -> None:
        connection.feed(data)
        harness.context.flush()

    return run


def close(harness: Harness, connection: Connection) -> Operation:
    """The connection is lost."""

    def run() -> None:
        connection.connection_lost(None)
        harness.context.flush()

    return run


def subscribe(harness: Harness, connection: Connection, topics: list[str], credit: int | None = None) -> None:
    do(harness, connection, *(messages.Subscribe(topic, credit=credit) for topic in topics))()


def topics(size: int, group: str = "t") -> list[str]:
    return [f"{group}.{number}" for number in range(size)]


WORDS = "a.b.c.d.e.f.g.h.i.j"


def patterns(size: int, behind: str = "") -> list[str]:
    """So many patterns that all match WORDS."""
    choices = product(*((token, "*") for token in WORDS.split(".")))
    return [".".join(tokens) + behind for tokens in islice(choices, 1, size + 1)]


def others(size: int) -> list[str]:
    """So many patterns that do not match it."""
    return [f"*.none.{number}" for number in range(size)]


def route(harness: Harness, names: list[str]) -> Connection:
    """Publish to each topic, so that all of them have a route; return the publisher."""
    publisher = harness.connect()
    for name in names:
        do(harness, publisher, publish(name, 8))()
    return publisher


PING = messages.Ping(id=1)

# A publish and what it does not meet.


def publish_beside(kind: str, fast: bool = True) -> Callable[[int], Operation]:
    """A publish to a topic with one subscriber, beside others of a kind that do not match it."""

    def make(size: int) -> Operation:
        harness = Harness()
        harness.subscribe(WORDS)
        publisher = harness.connect()
        if kind == "topics":
            subscribe(harness, harness.connect(), topics(size))
        elif kind == "patterns":
            subscribe(harness, harness.connect(), others(size))
        elif kind == "own subscriptions":
            subscribe(harness, publisher, topics(size))
        elif kind == "own subscriptions without echo":
            subscribe(harness, publisher, topics(size))
            do(harness, publisher, messages.Subscribe("quiet", echo=False))()
        elif kind == "own subscription that matches without echo":
            subscribe(harness, publisher, topics(size))
            do(harness, publisher, messages.Subscribe(WORDS, echo=False))()
        elif kind == "routes":
            route(harness, topics(size))
        elif kind == "connections":
            for _ in range(size):
                harness.subscribe("elsewhere")
        if not fast:
            publisher.routes = None
        operation = do(harness, publisher, publish(WORDS))
        operation()
        operation()
        return operation

    return make


def publish_after_patterns(size: int) -> Operation:
    """Publishes after so many patterns less one came and went, which match none of them: first none, then one."""
    harness = Harness()
    publisher, attacker = harness.connect(), harness.connect()
    operation = do(harness, publisher, *(publish(topic, 8) for topic in topics(20)))
    operation()
    operation()
    for pattern in others(size - 1):
        do(harness, attacker, messages.Subscribe(pattern), messages.Unsubscribe(pattern))()
    return operation


# A publish and what it meets.


def publish_to_members(stalled: bool = False, **options: object) -> Callable[[int], Operation]:
    """A publish to so many subscribers of one topic."""

    def make(size: int) -> Operation:
        harness = Harness()
        for _ in range(size):
            member = harness.subscribe(WORDS, **options)
            if stalled:
                member.pause_writing()
        operation = do(harness, harness.connect(), publish(WORDS))
        operation()
        operation()
        return operation

    return make


def publish_to_patterns(fast: bool) -> Callable[[int], Operation]:
    """A publish to so many patterns of one connection, which gets one event."""

    def make(size: int) -> Operation:
        harness = Harness()
        subscribe(harness, harness.connect(), patterns(size))
        publisher = harness.connect()
        if not fast:
            publisher.routes = None
        operation = do(harness, publisher, publish(WORDS))
        operation()
        operation()
        return operation

    return make


def publish_without_echo(size: int) -> Operation:
    """So many subscriptions of the publisher, one of them without echo, and as many patterns that match."""
    harness = Harness()
    subscribe(harness, harness.connect(), patterns(size))
    publisher = harness.connect()
    subscribe(harness, publisher, topics(size))
    do(harness, publisher, messages.Subscribe("quiet", echo=False))()
    operation = do(harness, publisher, publish(WORDS))
    operation()
    operation()
    return operation


def publish_to_queue(overflow: str, keys: bool = False, size_of_queue: int = 1000) -> Callable[[int], Operation]:
    """A publish to a subscriber without credit, behind so many events of other keys or topics."""

    def make(size: int) -> Operation:
        harness = Harness()
        bound = size if overflow == "drop_oldest" else size_of_queue
        harness.subscribe("*", overflow=overflow, max_queue=bound, credit=0)
        publisher = harness.connect()
        for number in range(size):
            do(harness, publisher, publish("t", 8, key=f"k{number}" if keys else None))()
        operation = do(harness, publisher, publish("t", 8, key="k1" if keys else None))
        operation()
        return operation

    return make


# Commands of a connection that has many subscriptions.


def command_beside(
    command: Callable[[int], messages.Command], kind: str, first: Callable[[int], messages.Command] | None = None
) -> Callable[[int], Operation]:
    """A command on a connection with so many other subscriptions, carried out after `first`."""

    def make(size: int) -> Operation:
        harness = Harness()
        connection = harness.connect()
        if kind == "topics":
            subscribe(harness, connection, topics(size))
        elif kind == "patterns":
            subscribe(harness, connection, others(size))
        elif kind == "without credit":
            subscribe(harness, connection, topics(size), credit=0)
        elif kind == "queued":
            subscribe(harness, connection, topics(size), credit=0)
            route(harness, topics(size))
        elif kind == "gone":
            subscribe(harness, connection, topics(size))
            do(harness, connection, *(messages.Unsubscribe(topic) for topic in topics(size)))()
        if first is not None:
            do(harness, connection, first(size))()
        do(harness, connection, PING)()
        return do(harness, connection, command(size))

    return make


def ping_with_barriers(size: int) -> Operation:
    """A ping on a connection with so many subscriptions that each wait for as many broader ones."""
    harness, connection = with_barriers(size, size)
    return do(harness, connection, PING)


def ping_with_one_barrier(size: int) -> Operation:
    """A ping on a connection with one subscription that waits for so many broader ones."""
    harness, connection = with_barriers(size, 1)
    return do(harness, connection, PING)


def subscribe_behind_barriers(size: int) -> Operation:
    """One more subscription that waits for so many broader ones."""
    harness, connection = with_barriers(size, 1)
    return do(harness, connection, messages.Subscribe("a.b.c.d.e.f.g.h.>"))


def credit_for_many_barriers(size: int) -> Operation:
    """Credit for one pattern that so many subscriptions wait for."""
    harness, connection = with_barriers(1, size)
    return do(harness, connection, messages.Credit(patterns(1)[0], 1))


def with_barriers(broader: int, waiting: int) -> tuple[Harness, Connection]:
    """A connection with patterns that have an event queued, and with subscriptions that wait for it."""
    harness = Harness()
    connection = harness.connect()
    subscribe(harness, connection, patterns(broader), credit=0)
    # One event for each pattern: the most specific pattern of a topic gets it, so each has a topic of its own.
    publisher = harness.connect()
    for pattern in patterns(broader):
        do(harness, publisher, publish(pattern.replace("*", "z"), 8))()
    narrower = [pattern.removesuffix("j").removesuffix("*") + ">" for pattern in patterns(1023)]
    subscribe(harness, connection, list(dict.fromkeys(narrower))[:waiting])
    do(harness, connection, PING)()
    return harness, connection


# Patterns and routes.


def subscribe_beside_routes(
    topic: str, *, routes: int | None = None, filters: int | None = None
) -> Callable[[int], Operation]:
    """A new pattern beside so many routes, to topics that so many patterns match: `size` of what is not given."""

    def make(size: int) -> Operation:
        harness = beside_routes(size if routes is None else routes, size if filters is None else filters)
        return do(harness, harness.connect(), messages.Subscribe(topic))

    return make


def beside_routes(routes: int, filters: int) -> Harness:
    """So many topics with a subscriber of their own and a route, which so many patterns match as well."""
    harness = Harness()
    subscribe(harness, harness.connect(), patterns(filters, ".*"))
    names = [f"{WORDS}.{number}" for number in range(routes)]
    subscribe(harness, harness.connect(), names)
    route(harness, names)
    return harness


def unsubscribe_beside_routes(size: int) -> Operation:
    """The end of a pattern that so many routes match."""
    harness = Harness()
    connection = harness.connect()
    subscribe(harness, connection, ["a.>"])
    names = [f"a.{number}" for number in range(size)]
    subscribe(harness, harness.connect(), names)
    route(harness, names)
    return do(harness, connection, messages.Unsubscribe("a.>"))


# Closes.


def close_with(kind: str) -> Callable[[int], Operation]:
    """A connection is lost that has so many subscriptions."""

    def make(size: int) -> Operation:
        harness = Harness()
        connection = harness.connect()
        if kind == "topics":
            subscribe(harness, connection, topics(size))
        elif kind == "shared topics":
            subscribe(harness, harness.connect(), topics(size))
            subscribe(harness, connection, topics(size))
            route(harness, topics(size))
        elif kind == "patterns":
            subscribe(harness, connection, others(size))
        elif kind == "patterns beside routes":
            subscribe(harness, connection, others(size))
            route(harness, topics(100))
        elif kind == "patterns with routes":
            names = [f"{WORDS}.{number}" for number in range(20)]
            subscribe(harness, connection, patterns(size, ".*"))
            subscribe(harness, harness.connect(), names)
            route(harness, names)
        elif kind == "queued":
            subscribe(harness, connection, topics(size), credit=0)
            route(harness, topics(size))
        elif kind == "events":
            do(harness, connection, messages.Subscribe("t", credit=0, max_queue=10_000))()
            route(harness, ["t"] * size)
        elif kind == "barriers":
            harness, connection = with_barriers(1, size)
        elif kind == "members":
            do(harness, connection, messages.Subscribe("t"))()
            for _ in range(size):
                harness.subscribe("t")
            route(harness, ["t"])
        elif kind == "nothing beside connections":
            for _ in range(size):
                harness.subscribe("t")
        return close(harness, connection)

    return make


def close_of_all_members(size: int) -> Operation:
    """All of so many subscribers of one topic are lost in one turn."""
    harness = Harness()
    members = [harness.subscribe("t") for _ in range(size)]
    route(harness, ["t"])

    def run() -> None:
        for member in members:
            member.connection_lost(None)
        harness.context.flush()

    return run


def close_of_blocking_subscriber(size: int) -> Operation:
    """A subscriber is lost that so many publishers wait for."""
    harness = Harness()
    subscriber = harness.subscribe("t", overflow="block", max_queue=1, credit=0)
    for _ in range(size):
        do(harness, harness.connect(), publish("t", 8))()
    return close(harness, subscriber)


def credit_for_blocking_subscriber(size: int) -> Operation:
    """Credit for all of the events of so many publishers that wait."""
    harness = Harness()
    subscriber = harness.subscribe("t", overflow="block", max_queue=1, credit=0)
    for _ in range(size):
        do(harness, harness.connect(), publish("t", 8))()
    return do(harness, subscriber, messages.Credit("t", size + 1))


def credit_for_events(size: int) -> Operation:
    """Credit for so many queued events."""
    harness = Harness()
    subscriber = harness.subscribe("t", max_queue=10_000, credit=0)
    route(harness, ["t"] * size)
    return do(harness, subscriber, messages.Credit("t", size))


def change_policy(size: int) -> Operation:
    """A queue of so many events is from now on one of the newest of each key."""
    harness = Harness()
    subscriber = harness.subscribe("t", max_queue=10_000, credit=0)
    publisher = harness.connect()
    for number in range(size):
        do(harness, publisher, publish("t", 8, key=f"k{number}"))()
    return do(harness, subscriber, messages.Subscribe("t", overflow="latest"))


def shrink_queue(size: int) -> Operation:
    """A queue of so many events is cut down to one."""
    harness = Harness()
    subscriber = harness.subscribe("t", max_queue=10_000, credit=0)
    route(harness, ["t"] * size)
    return do(harness, subscriber, messages.Subscribe("t", max_queue=1))


SUBSCRIBE_TOPIC = messages.Subscribe("new.topic")
SUBSCRIBE_PATTERN = messages.Subscribe("new.*")

CASES = (
    # Publishes.
    Case("fast-topics", "publish beside other topics", FLAT, 100, publish_beside("topics")),
    Case("fast-patterns", "publish beside patterns that do not match", FLAT, 100, publish_beside("patterns")),
    Case("fast-routes", "publish beside other routes", FLAT, 100, publish_beside("routes")),
    Case("fast-connections", "publish beside other connections", FLAT, 100, publish_beside("connections")),
    Case("fast-own", "publish with many subscriptions", FLAT, 400, publish_beside("own subscriptions")),
    Case(
        "fast-own-no-echo",
        "publish with many subscriptions, another one without echo",
        FLAT,
        400,
        publish_beside("own subscriptions without echo"),
    ),
    Case(
        "fast-own-no-echo-match",
        "publish with many subscriptions, the one that matches without echo",
        FLAT,
        400,
        publish_beside("own subscription that matches without echo"),
    ),
    Case("slow-topics", "publish by the session beside other topics", FLAT, 100, publish_beside("topics", False)),
    Case("slow-patterns", "publish by the session beside patterns", FLAT, 100, publish_beside("patterns", False)),
    Case(
        "slow-own",
        "publish by the session with many subscriptions",
        FLAT,
        100,
        publish_beside("own subscriptions", False),
    ),
    Case("fast-members", "publish to many", LINEAR, 100, publish_to_members()),
    Case("fast-stalled", "publish to many that do not read", LINEAR, 100, publish_to_members(stalled=True)),
    Case("fast-no-credit", "publish to many without credit", LINEAR, 100, publish_to_members(credit=0)),
    Case("fast-matches", "publish to many patterns of one connection", FLAT, 200, publish_to_patterns(fast=True)),
    Case("slow-matches", "the same by the session", LINEAR, 200, publish_to_patterns(fast=False)),
    Case("fast-no-echo", "publish with many subscriptions to many patterns", LINEAR, 200, publish_without_echo),
    Case("drop-oldest", "publish at the bound of a long queue", FLAT, 150, publish_to_queue("drop_oldest")),
    Case("drop-newest", "publish behind a long queue", FLAT, 150, publish_to_queue("drop_newest")),
    Case("latest", "publish in place of one of many keys", FLAT, 150, publish_to_queue("latest", keys=True)),
    Case("patterns-gone", "publish after a pattern came and went", FLAT, 1, publish_after_patterns),
    # Commands.
    Case("ping-topics", "ping with many topics", FLAT, 200, command_beside(lambda _: PING, "topics")),
    Case("ping-patterns", "ping with many patterns", FLAT, 200, command_beside(lambda _: PING, "patterns")),
    Case(
        "ping-no-credit",
        "ping with many topics without credit",
        FLAT,
        200,
        command_beside(lambda _: PING, "without credit"),
    ),
    Case(
        "ping-queued",
        "ping with an event queued under each of many",
        FLAT,
        200,
        command_beside(lambda _: PING, "queued"),
    ),
    Case("ping-gone", "ping after many were unsubscribed", FLAT, 200, command_beside(lambda _: PING, "gone")),
    Case("ping-barriers", "ping with many behind many barriers", FLAT, 60, ping_with_barriers),
    Case("ping-barrier", "ping with one behind many barriers", FLAT, 200, ping_with_one_barrier),
    Case(
        "subscribe-topic", "subscribe with many topics", FLAT, 200, command_beside(lambda _: SUBSCRIBE_TOPIC, "topics")
    ),
    Case(
        "subscribe-pattern",
        "subscribe to a pattern, with many patterns",
        FLAT,
        200,
        command_beside(lambda _: SUBSCRIBE_PATTERN, "patterns"),
    ),
    Case(
        "subscribe-again",
        "subscribe again with many topics",
        FLAT,
        200,
        command_beside(lambda _: messages.Subscribe("t.1"), "topics"),
    ),
    Case(
        "subscribe-changed",
        "change a subscription with many topics",
        FLAT,
        200,
        command_beside(lambda _: messages.Subscribe("t.1", max_queue=7, overflow="drop_newest"), "topics"),
    ),
    Case(
        "subscribe-queued",
        "subscribe with events queued under many",
        LINEAR,  # each of the client's own subscriptions is compared with the new one
        200,
        command_beside(lambda _: SUBSCRIBE_TOPIC, "queued"),
    ),
    Case("subscribe-barrier", "subscribe behind many barriers", LINEAR, 100, subscribe_behind_barriers),
    Case(
        "unsubscribe-topic",
        "unsubscribe with many topics",
        FLAT,
        200,
        command_beside(lambda _: messages.Unsubscribe("t.1"), "topics"),
    ),
    Case(
        "unsubscribe-pattern",
        "unsubscribe from a pattern, with many patterns",
        FLAT,
        200,
        command_beside(lambda _: messages.Unsubscribe("*.none.1"), "patterns"),
    ),
    Case(
        "credit",
        "credit with many topics",
        FLAT,
        200,
        command_beside(lambda _: messages.Credit("t.1", 1), "without credit"),
    ),
    Case("credit-events", "credit for many events", LINEAR, 100, credit_for_events),
    Case("credit-barriers", "credit for what many wait for", LINEAR, 100, credit_for_many_barriers),
    Case("credit-block", "credit for many publishers that wait", LINEAR, 100, credit_for_blocking_subscriber),
    Case("change-policy", "change the policy of a long queue", LINEAR, 150, change_policy),
    Case("shrink-queue", "cut a long queue", LINEAR, 150, shrink_queue),
    # Patterns and routes.
    Case(
        "pattern-routes",
        "subscribe to a pattern beside many routes",
        LINEAR,
        200,
        subscribe_beside_routes("none.*", filters=30),
    ),
    Case(
        "pattern-routes-match",
        "the same, and it matches them",
        LINEAR,
        200,
        subscribe_beside_routes("a.b.>", filters=30),
    ),
    Case("pattern-filters", "the same beside many patterns", LINEAR, 100, subscribe_beside_routes("a.b.>", routes=30)),
    Case("pattern-off", "unsubscribe from a pattern that many routes match", LINEAR, 200, unsubscribe_beside_routes),
    # Closes.
    Case("close-topics", "close with many topics", LINEAR, 100, close_with("topics")),
    Case("close-shared", "close with many topics that others have too", LINEAR, 100, close_with("shared topics")),
    Case("close-patterns", "close with many patterns", LINEAR, 100, close_with("patterns")),
    Case(
        "close-patterns-routes",
        "close with many patterns beside routes",
        LINEAR,
        200,
        close_with("patterns beside routes"),
    ),
    Case(
        "close-patterns-match",
        "close with many patterns that routes match",
        LINEAR,
        100,
        close_with("patterns with routes"),
    ),
    Case("close-queued", "close with an event queued under each of many", LINEAR, 100, close_with("queued")),
    Case("close-events", "close with many events queued", LINEAR, 100, close_with("events")),
    Case("close-barriers", "close with many behind a barrier", LINEAR, 100, close_with("barriers")),
    Case("close-members", "close beside many members", LINEAR, 100, close_with("members")),
    Case(
        "close-nothing",
        "close without subscriptions beside others",
        FLAT,
        100,
        close_with("nothing beside connections"),
    ),
    Case("close-all", "close of all members", LINEAR, 100, close_of_all_members),
    Case("close-block", "close of one whom many publishers wait for", LINEAR, 100, close_of_blocking_subscriber),
)


def main() -> int:
    library = ctypes.CDLL(sys.argv[1])
    set_up_log(Config().log)  # as the broker has it: without this, each connection would be written to it
    gc.disable()
    for case in CASES:
        if case.name in sys.argv[2:]:
            for _ in range(2):  # Python specialises its bytecode, and what valgrind translates is inherited
                case.make(8)()
            for size in (case.size, 2 * case.size):
                if in_a_process_of_its_own(case, size, library) != 0:
                    sys.stderr.write(f"{case.name} failed\n")
                    return 1
    return 0


def in_a_process_of_its_own(case: Case, size: int, library: ctypes.CDLL) -> int:
    """Count one operation; return the exit status. Nothing is left behind that the next case would meet."""
    child = os.fork()
    if child == 0:
        count(case, size, library)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count(case: Case, size: int, library: ctypes.CDLL) -> None:
    operation = case.make(size)
    library.marks_start()
    library.marks_dump(b"start")
    operation()
    library.marks_dump(f"{case.name} {size}".encode())
    library.marks_stop()


if __name__ == "__main__":
    sys.exit(main())
