"""The promises of `broker.engines.base`, each as a check that takes a kind of engine and fails where it is not kept.

The numbers are those at the head of that file. `test_conformance.py` runs them on every engine, and on engines that
break one of them each, so that it is known that the checks can fail.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from broker.engines.base import Done, Engine, Event, NoHistory, Position, Unavailable
from tests.net.harness import until

PATIENCE = 10.0
"""Seconds after which a check that waits has failed."""


class Kind(ABC):
    """A kind of engine, as the checks see it: a factory, and the ways to disturb what is behind it."""

    most_nodes: int = 1
    """How many nodes can share one server; more are not asked for."""
    keeps: bool = False
    """Whether topics have history."""
    may_fail: bool = False
    """Whether there is a server that can hang or be lost. Without one the checks of that do not apply."""
    bound: int = 0
    """How many publishes may wait on one node, where there is a server."""

    @abstractmethod
    def engine(self) -> Engine:
        """The engine of one more node, not yet started."""

    def hang(self) -> None:
        """Make the server answer nothing."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Make it answer again."""
        raise NotImplementedError

    def cut(self, engine: Engine) -> None:
        """Part one engine from the server."""
        raise NotImplementedError

    def mend(self, engine: Engine) -> None:
        """Let it come back."""
        raise NotImplementedError


class Node:
    """In place of a node: it writes down what it is told, in one list, so that the order can be seen."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.told: list[tuple[str, object]] = []
        self.published = 0
        self.is_stopped = False

    @property
    def delivered(self) -> list[Event]:
        return [what for kind, what in self.told if kind == "deliver" and isinstance(what, Event)]

    @property
    def answers(self) -> list[tuple[Event, Position | Unavailable]]:
        return [what for kind, what in self.told if kind == "done" and isinstance(what, tuple)]

    @property
    def lost(self) -> set[str]:
        return {str(what) for kind, what in self.told if kind == "lost"}

    def publish(self, topic: str, data: object, *, key: str | None = None) -> Event:
        event = Event(topic, msgspec.json.encode(data), key, origin=self)
        self.published += 1
        self.engine.publish(event, self._done(event))
        return event

    def data(self, topic: str) -> list[str]:
        """The events of a topic, in the order in which they came."""
        return [bytes(event.data).decode() for event in self.delivered if event.topic == topic]

    async def start(self) -> None:
        await self.engine.start(self._deliver, lambda topic: self._tell("lost", topic))

    async def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            await asyncio.wait_for(self.engine.stop(), PATIENCE)

    async def answered(self) -> None:
        """Wait until there is an answer for each publish."""
        await until(lambda: len(self.answers) >= self.published)

    def _done(self, event: Event) -> Done:
        return lambda result: self._tell("done", (event, result))

    def _deliver(self, event: Event) -> None:
        self._tell("deliver", event)

    def _tell(self, kind: str, what: object) -> None:
        self.told.append((kind, what))


@asynccontextmanager
async def nodes(kind: Kind, count: int = 2) -> AsyncIterator[list[Node]]:
    """Started nodes that share a server: as many as wanted, or as the engine allows."""
    harness = [Node(kind.engine()) for _ in range(min(count, kind.most_nodes))]
    for node in harness:
        await node.start()
    try:
        yield harness
    finally:
        for node in harness:
            await node.stop()


async def some_turns() -> None:
    """Long enough for anything that is wrongly still to come."""
    for _ in range(10):
        await asyncio.sleep(0.001)


async def order(kind: Kind) -> None:
    """1. Events of a topic are delivered on every node in one order, each publisher's in the order it published."""
    async with nodes(kind, 3) as harness:
        topics = [f"t.{n}" for n in range(5)]
        for node in harness:
            node.engine.interest("t.*", True)
        for n in range(100):
            for topic in topics:
                for place, node in enumerate(harness):
                    node.publish(topic, [place, n])
            if n % 10 == 0:
                await asyncio.sleep(0)
        await asyncio.gather(*(node.answered() for node in harness))
        await until(lambda: all(len(node.delivered) >= 500 * len(harness) for node in harness))
        for topic in topics:
            orders = [node.data(topic) for node in harness]
            assert all(one == orders[0] for one in orders)
            decoded = [msgspec.json.decode(data) for data in orders[0]]
            for place in range(len(harness)):
                assert [n for by, n in decoded if by == place] == list(range(100))
            offsets = [event.offset for event in harness[0].delivered if event.topic == topic]
            assert offsets == (list(range(1, len(offsets) + 1)) if kind.keeps else [None] * len(offsets))


async def once(kind: Kind) -> None:
    """2. A node gets each event of a topic that it has interest in once, whatever the number of its interests."""
    async with nodes(kind) as harness:
        for node in harness:
            for topic in ("a.b", "a.*", "a.>", ">"):
                node.engine.interest(topic, True)
        for n in range(50):
            harness[n % len(harness)].publish("a.b", n)
        await asyncio.gather(*(node.answered() for node in harness))
        await until(lambda: all(len(node.delivered) >= 50 for node in harness))
        await some_turns()
        for node in harness:
            assert Counter(node.data("a.b")) == Counter(str(n) for n in range(50))
        # With one interest less it still has one.
        harness[-1].engine.interest("a.*", False)
        harness[0].publish("a.b", 50)
        await harness[0].answered()
        await until(lambda: "50" in harness[-1].data("a.b"))
        await some_turns()
        assert harness[-1].data("a.b").count("50") == 1


async def unchanged(kind: Kind) -> None:
    """2, too: it is the event that was published. Who published it is known on its own node alone."""
    async with nodes(kind) as harness:
        for node in harness:
            node.engine.interest("a", True)
        sent = harness[0].publish("a", {"x": [1.50, "ü"]}, key="k")
        await until(lambda: all(node.delivered for node in harness))
        for node in harness:
            [event] = node.delivered
            assert (event.topic, bytes(event.data), event.key) == ("a", b'{"x":[1.5,"\xc3\xbc"]}', "k")
            assert event.origin is (harness[0] if node is harness[0] else None)
        assert harness[0].delivered[0] is sent  # its receipt is read after `done`
        await harness[0].answered()


async def delivered_then_done(kind: Kind) -> None:
    """3. On the node that published an event, `done` comes after `deliver`."""
    async with nodes(kind, 1) as [node]:
        node.engine.interest("a.>", True)
        for n in range(100):
            node.publish(f"a.{n % 3}", n)
        await node.answered()
        seen: set[int] = set()
        for what, event in node.told:
            if what == "deliver":
                seen.add(id(event))
            else:
                assert isinstance(event, tuple)
                assert id(event[0]) in seen
        # Without interest it is just done.
        node.engine.interest("a.>", False)
        node.publish("b", 1)
        await node.answered()


async def done_once(kind: Kind) -> None:
    """4. `done` comes exactly once, with the position of the event, which is the one that it is delivered with."""
    async with nodes(kind) as harness:
        harness[-1].engine.interest("a", True)
        for n in range(50):
            harness[0].publish("a", n)
        await harness[0].answered()
        await until(lambda: len(harness[-1].delivered) >= 50)
        await some_turns()
        assert len(harness[0].answers) == 50
        assert len({id(event) for event, _ in harness[0].answers}) == 50
        positions = {}
        for event, position in harness[0].answers:
            assert isinstance(position, Position)
            assert (position.epoch is None) == (position.offset is None) == (not kind.keeps)
            positions[bytes(event.data)] = position.offset
        assert {bytes(event.data): event.offset for event in harness[-1].delivered} == positions


async def refused_means_nothing(kind: Kind) -> None:
    """4. With an error nothing was kept, and nothing is delivered."""
    async with nodes(kind) as harness:
        harness[-1].engine.interest("a", True)
        kind.hang()
        for n in range(2 * kind.bound):
            harness[0].publish("a", n)
        await until(lambda: len(harness[0].answers) > 0)
        kind.go_on()
        await harness[0].answered()
        refused = {bytes(event.data) for event, result in harness[0].answers if isinstance(result, Unavailable)}
        taken = {bytes(event.data) for event, result in harness[0].answers if isinstance(result, Position)}
        assert refused
        assert taken
        await until(lambda: len(harness[-1].delivered) >= len(taken))
        await some_turns()
        assert {bytes(event.data) for event in harness[-1].delivered} == taken


async def never_blocks(kind: Kind) -> None:
    """5. Calls return at once while the server hangs, and what waits is bounded: beyond it there is Unavailable."""
    async with nodes(kind, 1) as [node]:
        kind.hang()
        node.engine.interest("a", True)
        for n in range(3 * kind.bound):
            node.publish("a", n)
        await until(lambda: len(node.answers) >= 2 * kind.bound)
        assert all(isinstance(result, Unavailable) and str(result) for _, result in node.answers)
        assert node.delivered == []
        kind.go_on()
        await node.answered()
        # It has recovered.
        node.publish("a", "again")
        await node.answered()
        assert isinstance(node.answers[-1][1], Position)


async def no_silent_loss(kind: Kind) -> None:
    """6. After the connection was lost, `lost` is called for each topic of which an event may be missing."""
    async with nodes(kind) as [publisher, subscriber]:
        subscriber.engine.interest("a", True)
        subscriber.engine.interest("b", True)
        kind.cut(subscriber.engine)
        publisher.publish("a", 1)
        await publisher.answered()
        kind.mend(subscriber.engine)
        await until(lambda: subscriber.data("a") == ["1"] or "a" in subscriber.lost)
        publisher.publish("a", 2)
        await until(lambda: subscriber.data("a")[-1:] == ["2"])


async def ends(kind: Kind) -> None:
    """7. When `stop` has returned, each publish has been answered once, and nothing is called back any more."""
    async with nodes(kind) as harness:
        for node in harness:
            node.engine.interest("a", True)
        for n in range(50):
            harness[0].publish("a", n)
            harness[-1].publish("a", n)
            if n % 10 == 0:
                await asyncio.sleep(0)
        await harness[0].stop()
        taken = {id(event) for event, result in harness[0].answers if isinstance(result, Position)}
        assert {id(event) for event in harness[0].delivered if event.origin is harness[0]} == taken
        assert len({id(event) for event, _ in harness[0].answers}) == len(harness[0].answers) == harness[0].published
        before = list(harness[0].told)
        if harness[-1] is not harness[0]:
            harness[-1].publish("a", 50)
            await harness[-1].answered()
        await some_turns()
        assert harness[0].told == before


async def ends_although_the_server_hangs(kind: Kind) -> None:
    """7, too: who has no answer by then gets Unavailable."""
    async with nodes(kind, 1) as [node]:
        kind.hang()
        node.publish("a", 1)
        await node.stop()
        assert len(node.answers) == 1
        assert isinstance(node.answers[0][1], Unavailable)


async def history(kind: Kind) -> None:
    """History is read by callback too: the newest, those after a position, or the word that there is none."""
    async with nodes(kind, 1) as [node]:
        for n in range(5):
            node.publish("a", n)
        await node.answered()
        results: list[list[Event] | Unavailable | NoHistory] = []
        position = next((result for _, result in node.answers if isinstance(result, Position)), None)
        assert position is not None
        node.engine.history("a", None, 2, results.append)
        await until(lambda: len(results) == 1)
        node.engine.history("a", Position(position.epoch, 1), 2, results.append)
        await until(lambda: len(results) == 2)
        if not kind.keeps:
            assert all(isinstance(result, NoHistory) for result in results)
            return
        newest, after = results
        assert isinstance(newest, list)
        assert isinstance(after, list)
        assert [(event.offset, bytes(event.data)) for event in newest] == [(4, b"3"), (5, b"4")]
        assert [(event.offset, bytes(event.data)) for event in after] == [(2, b"1"), (3, b"2")]


Check = Callable[[Kind], Awaitable[None]]

CHECKS: list[Check] = [order, once, unchanged, delivered_then_done, done_once, ends, history]
"""Those that every engine must pass."""
CHECKS_WITH_A_SERVER: list[Check] = [
    refused_means_nothing,
    never_blocks,
    no_silent_loss,
    ends_although_the_server_hangs,
]
"""Those about what is behind it; they need `may_fail`, and two nodes."""
