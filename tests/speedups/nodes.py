"""A node without its network, and clients that say what they read, for tests that go through one case each."""

from __future__ import annotations

import json
from typing import Any

from broker import messages
from broker._speedups import Connection, LoopContext, Subscription
from broker.config import Limits
from broker.errors import CLOSE_REASONS
from broker.hub import UNLIMITED, Hub
from tests.speedups.transports import SlowPipe, frames_in
from tests.speedups.turns import Loop
from tests.speedups.wire import CLOSE, TEXT, THREADS


class Node:
    """A context with a hub."""

    def __init__(self, **limits: Any) -> None:
        self.loop = Loop()
        self.context = LoopContext(
            self.loop.as_loop(),
            Limits(**{"ping_interval": 0, "block_timeout": 3600.0, **limits}),
            encode_gap=messages.encode_gap,
            close_reasons=CLOSE_REASONS,
            threads=THREADS,
        )
        self.hub = Hub(self.context)
        self.clients: list[Client] = []

    def client(self, kind: type[SlowPipe] = SlowPipe) -> Client:
        self.clients.append(Client(self, kind(self.loop)))
        return self.clients[-1]

    def publish(
        self,
        topic: str,
        number: object,
        size: int = 0,
        key: str | None = None,
        origin: Client | None = None,
        offset: int = 0,
    ) -> tuple[int, int, int]:
        """Publish an event with this number and so many bytes beside it; `offset` is for a topic with history."""
        payload = messages.encode_event(topic, json.dumps([number, "x" * size]).encode(), key, offset or None)
        return self.hub.audience(topic).publish(
            topic, payload, None if key is None else key.encode(), None if origin is None else origin.connection, offset
        )

    def turn(self) -> None:
        self.loop.turn()

    def end(self) -> None:
        """Let all clients go, and check that nothing is left."""
        for client in self.clients:
            client.transport.lose()
        self.turn()
        assert self.context.connections == self.context.subscriptions == self.context.queued == 0


class Client:
    """One connection, and what its other end has read."""

    def __init__(self, node: Node, transport: SlowPipe) -> None:
        self.node = node
        self.transport = transport
        self.connection = Connection(node.context, self)
        self.subscriptions: dict[str, Subscription] = {}
        transport.attach(self.connection)

    def subscribe(self, topic: str, max_queue: int = 256, overflow: str = "drop_oldest", **policy: Any) -> Subscription:
        policy = {"echo": True, "credit": UNLIMITED, **policy}
        made = self.node.hub.subscribe(self.connection, topic, max_queue=max_queue, overflow=overflow, **policy)
        self.subscriptions[topic] = made
        return made

    def unsubscribe(self, topic: str) -> None:
        self.node.hub.unsubscribe(self.subscriptions.pop(topic))

    def stop(self) -> None:
        """Read no more, so that the socket is full."""
        self.transport.block()
        self.connection.answer(b'{"op":"pong"}' + b" " * 20_000)
        self.node.turn()
        assert self.connection.blocked

    def read(self) -> list[Any]:
        """Read what there is without any more turn of the loop: events as numbers, gaps as (reason, count)."""
        self.transport.drain(None)
        found: list[Any] = []
        for opcode, payload in frames_in(self.transport.received)[0]:
            if opcode == CLOSE:
                found.append(payload)
                continue
            assert opcode == TEXT
            message = json.loads(payload)
            if message["op"] == "event":
                found.append(message["data"][0])
            elif message["op"] == "gap":
                found.append((message["reason"], message["missed"]))
        return found

    def read_all(self) -> list[Any]:
        """Read as long as something comes."""
        while True:
            before = len(self.transport.received)
            self.transport.drain(None)
            self.node.turn()
            self.transport.drain(None)
            if len(self.transport.received) == before:
                return self.read()

    def message(self, payload: bytes, text: bool) -> None:
        raise AssertionError(payload)

    def on_close(self, code: int, reason: str) -> None:
        for subscription in self.subscriptions.values():
            self.node.hub.unsubscribe(subscription)
        self.subscriptions.clear()
