"""What the tests of the native data path share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.speedups.nodes import Node


@pytest.fixture
def new_node() -> Iterator[Callable[..., Node]]:
    """Make nodes; their sockets are closed after the test."""
    nodes: list[Node] = []

    def make(**limits: Any) -> Node:
        nodes.append(Node(**limits))
        return nodes[-1]

    yield make
    for node in nodes:
        for client in node.clients:
            client.transport.discard()
