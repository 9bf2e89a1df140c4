"""A gap on a topic with history says between which offsets its events are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.speedups.nodes import Client, Node
from tests.speedups.transports import frames_in

MakeNode = Callable[..., Node]


def stream(client: Client) -> list[Any]:
    """Events as their offsets, gaps as (reason, missed, from, to)."""
    client.read_all()
    found: list[Any] = []
    for _, payload in frames_in(client.transport.received)[0]:
        message = json.loads(payload)
        if message["op"] == "event":
            found.append(message.get("offset", 0))
        elif message["op"] == "gap":
            found.append((message["reason"], message["missed"], message.get("from"), message.get("to")))
    return found


@pytest.mark.parametrize(
    ("overflow", "expected"),
    [
        ("drop_oldest", [("overflow", 7, 1, 7), 8, 9, 10]),
        ("drop_newest", [1, 2, 3, ("overflow", 7, 4, 10)]),
    ],
)
def test_overflow_says_which_offsets_are_missing(new_node: MakeNode, overflow: str, expected: list[Any]) -> None:
    node = new_node()
    client = node.client()
    client.subscribe("a", max_queue=3, overflow=overflow)
    client.stop()
    for n in range(1, 11):
        node.publish("a", n, offset=n)
    assert stream(client) == expected


def test_conflation_says_between_which_offsets_the_older_ones_were(new_node: MakeNode) -> None:
    node = new_node()
    client = node.client()
    client.subscribe("a", max_queue=10, overflow="latest")
    client.stop()
    for n, key in enumerate(["x", "y", "x", "y", "x"], 1):
        node.publish("a", n, key=key, offset=n)
    assert stream(client) == [("conflated", 3, 1, 3), 4, 5]


def test_gaps_without_history_and_of_patterns_have_no_offsets(new_node: MakeNode) -> None:
    node = new_node()
    client, wide = node.client(), node.client()
    client.subscribe("a", max_queue=1)
    wide.subscribe("*", max_queue=1)
    for each in (client, wide):
        each.stop()
    for n in range(3):
        node.publish("a", n)
    assert stream(client) == [("overflow", 2, None, None), 0]
    wide.read_all()
    wide.stop()
    for n in range(1, 4):
        node.publish("b", n, offset=n)
    assert stream(wide)[-2:] == [("overflow", 2, None, None), 3]


def test_change_of_the_policy_says_what_was_left_to_history(new_node: MakeNode) -> None:
    node = new_node()
    client = node.client()
    subscription = client.subscribe("a", max_queue=2, overflow="replay")
    client.stop()
    for n in range(1, 6):
        node.publish("a", n, offset=n)
    subscription.change(max_queue=2, overflow="drop_oldest", echo=True)
    found = stream(client)
    [gap] = [each for each in found if isinstance(each, tuple)]
    assert gap[1] == gap[3] - gap[2] + 1
    assert [*(each for each in found if not isinstance(each, tuple)), *range(gap[2], gap[3] + 1)] == [1, 2, 3, 4, 5]
