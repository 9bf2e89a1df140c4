"""Where memory runs out in the middle of an operation, nothing is left half done."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator

import pytest

from broker._speedups import Audience, Connection, Filter, LoopContext, Subscription
from broker.messages import encode_event
from tests.speedups.turns import Loop, Pipe
from tests.speedups.wire import server_frames

if os.environ.get("CI"):
    testcapi = importlib.import_module("_testcapi")
else:
    testcapi = pytest.importorskip("_testcapi", reason="this Python comes without its test modules")

ALLOCATIONS = 60
"""More than any of the operations below makes."""


def failing(operation: Callable[[], object]) -> Iterator[bool]:
    """Run an operation again and again, each time with the next of its allocations failing; say whether it raised."""
    gc.disable()
    try:
        for number in range(ALLOCATIONS):
            raised = False
            testcapi.set_nomemory(number, number + 1)
            try:
                operation()
            except MemoryError:
                raised = True
            finally:
                testcapi.remove_mem_hooks()
            yield raised
    finally:
        gc.enable()


def connect(context: LoopContext) -> tuple[Connection, Pipe]:
    pipe, connection = Pipe(), Connection(context)
    connection.start(pipe)
    return connection, pipe


def test_a_subscription_that_cannot_be_made_leaves_the_others_of_its_filter() -> None:
    loop = Loop()
    context = loop.context()
    topic = Filter("a")
    first, pipe = connect(context)
    second, _ = connect(context)
    kept = Subscription(first, topic, max_queue=9)
    audience = Audience(context, (topic,))
    outcomes = []

    def subscribe() -> None:
        Subscription(second, topic, max_queue=9, credit=3)

    for raised in failing(subscribe):
        outcomes.append(raised)
        assert topic.subscribers == context.subscriptions == 1
        assert audience.receivers == 1
        assert audience.publish("a", encode_event("a", b"1"))[0] == 1
        loop.turn()
        assert len(server_frames(pipe.take())) == 1
    assert {True, False} == set(outcomes)
    kept.cancel()
    assert topic.subscribers == 0


def test_a_flush_that_fails_keeps_the_batches_for_the_next_turn() -> None:
    loop = Loop()
    context = loop.context()
    filters = [Filter("a"), Filter("b")]
    audiences = [Audience(context, (topic,)) for topic in filters]
    connections = [connect(context) for _ in range(3)]
    kept = [Subscription(connection, topic, max_queue=9) for connection, _ in connections for topic in filters]
    outcomes = []

    def publish() -> None:
        for audience, topic in zip(audiences, "ab", strict=True):
            audience.publish(topic, encode_event(topic, b"1"))

    publish()
    for raised in failing(context.flush):
        outcomes.append(raised)
        loop.turn()
        for connection, pipe in connections:
            # A connection that could not be written to is disconnected; the others have both events.
            sent = len(server_frames(pipe.take()))
            assert sent == 2 or connection.state_name == "disconnected"
        if any(connection.state_name == "disconnected" for connection, _ in connections):
            break
        publish()
    assert True in outcomes or loop.faults
    assert context.queued == 0
    del kept
