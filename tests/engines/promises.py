"""The promises of `broker.engines.base`, each as a check that takes a kind of engine and fails where it is not kept.

The numbers are those at the head of that file. `test_conformance.py` runs them on every engine, and on engines that
break one of them each, so that it is known that the checks can fail.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

import msgspec

from broker.engines.base import Engine, Event, HistoryPage, NoHistory, Position, Unavailable
from broker.rules import NOTHING_KEPT, Retention
from tests.net import harness as waiting
from tests.net.harness import until

KEEP = Retention(events=1000)

PATIENCE = 10.0
"""Seconds after which a check that waits has failed."""


class Kind(ABC):
    """A kind of engine, as the checks see it: a factory, and the ways to disturb what is behind it."""

    most_nodes: int = 1
    """How many nodes can share one server; more are not asked for."""
    keeps: bool = False
    """Whether the engine keeps history; the nodes then publish with a retention."""
    may_fail: bool = False
    """Whether there is a server that can hang or be lost. Without one the checks of that do not apply."""
    bound: int = 0
    """How many calls may wait on one node, where there is a server."""

    @abstractmethod
    def engine(self) -> Engine:
        """The engine of one more node, not yet started."""

    def end(self) -> None:  # noqa: B027 -- most make nothing
        """Remove what it has made."""

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
    """In place of a node: it notes what the engine tells it, in one list, so that the order can be seen."""

    def __init__(self, engine: Engine, name: int, retention: Retention) -> None:
        self.engine = engine
        self.name = name
        self.retention = retention
        self.told: list[tuple[str, Any]] = []
        self.published: list[Event] = []
        self.is_stopped = False

    @property
    def delivered(self) -> list[Event]:
        return [what for kind, what in self.told if kind == "deliver"]

    @property
    def own(self) -> list[Event]:
        """The delivered events that this node published."""
        tokens = {event.token for event in self.published}
        return [event for event in self.delivered if event.token in tokens]

    @property
    def answers(self) -> list[tuple[Event, Position | Unavailable]]:
        """The answers to publishes."""
        return [what for kind, what in self.told if kind == "done"]

    @property
    def lost(self) -> set[str]:
        return {what for kind, what in self.told if kind == "lost"}

    def publish(
        self,
        topic: str,
        data: object,
        *,
        key: str | None = None,
        retention: Retention | None = None,
        dedup: str | None = None,
    ) -> Event:
        token = (self.name << 32) + len(self.published)
        event = Event(topic, msgspec.json.encode(data), key, token=token, dedup=dedup)
        self.published.append(event)
        self.engine.publish(event, retention or self.retention, lambda result: self._tell("done", (event, result)))
        return event

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """Call the engine; the list takes its answers."""
        answers: list[Any] = []

        def done(result: Any) -> None:
            self._tell("answer", result)
            answers.append(result)

        getattr(self.engine, name)(*arguments, done)
        return answers

    async def result(self, name: str, *arguments: Any) -> Any:
        """Call the engine, and return the one answer."""
        answers = self.ask(name, *arguments)
        await until(lambda: bool(answers))
        assert len(answers) == 1
        return answers[0]

    async def interested(self, *filters: str) -> None:
        """Get the events of these from here on."""
        for each in filters:
            assert await self.result("interest", each, True) is None

    def data(self, topic: str) -> list[str]:
        """The events of a topic, in the order in which they came."""
        return [bytes(event.data).decode() for event in self.delivered if event.topic == topic]

    async def start(self) -> None:
        await self.engine.start(
            lambda event: self._tell("deliver", event),
            lambda lost: self._tell("lost", lost),
        )

    async def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            await asyncio.wait_for(self.engine.stop(), PATIENCE)

    async def answered(self) -> None:
        """Wait until there is an answer for each publish."""
        await until(lambda: len(self.answers) >= len(self.published))

    def _tell(self, kind: str, what: object) -> None:
        self.told.append((kind, what))


@asynccontextmanager
async def nodes(kind: Kind, count: int = 2) -> AsyncIterator[list[Node]]:
    """Started nodes that share a server: as many as wanted, or as the engine allows."""
    retention = KEEP if kind.keeps else NOTHING_KEPT
    harness = [Node(kind.engine(), n, retention) for n in range(min(count, kind.most_nodes))]
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


@contextmanager
def returning_at_once() -> Iterator[None]:
    """Fail where a call inside blocks for as long as a test waits."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the call blocks")

    before = signal.signal(signal.SIGUSR1, fail)
    timer = threading.Timer(waiting.TIMEOUT, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


async def order(kind: Kind) -> None:
    """1. Events of a topic are delivered on every node in one order, each publisher's in the order it published."""
    async with nodes(kind, 3) as harness:
        topics = [f"t.{n}" for n in range(5)]
        for node in harness:
            await node.interested("t.*")
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
            await node.interested("a.b", "a.*", "a.>", ">")
        for n in range(50):
            harness[n % len(harness)].publish("a.b", n)
        await asyncio.gather(*(node.answered() for node in harness))
        await until(lambda: all(len(node.delivered) >= 50 for node in harness))
        await some_turns()
        for node in harness:
            assert Counter(node.data("a.b")) == Counter(str(n) for n in range(50))
        # With one interest less it still has one.
        assert await harness[-1].result("interest", "a.*", False) is None
        harness[0].publish("a.b", 50)
        await harness[0].answered()
        await until(lambda: "50" in harness[-1].data("a.b"))
        await some_turns()
        assert harness[-1].data("a.b").count("50") == 1


async def equal(kind: Kind) -> None:
    """2. A delivered event is equal to the published one. It need not be the same object."""
    async with nodes(kind) as harness:
        for node in harness:
            await node.interested("a")
        sent = [harness[0].publish("a", {"x": [1.50, "\u00fc"]}, key="k"), harness[0].publish("a", None)]
        await until(lambda: all(len(node.delivered) >= 2 for node in harness))
        for node in harness:
            received = [msgspec.structs.replace(event, data=bytes(event.data), offset=None) for event in node.delivered]
            assert received == sent
        await harness[0].answered()


async def done_once(kind: Kind) -> None:
    """3. `done` comes exactly once, with the position of the event, which is the one that it is delivered with."""
    async with nodes(kind) as harness:
        await harness[-1].interested("a")
        for n in range(50):
            harness[0].publish("a", n)
        await harness[0].answered()
        await until(lambda: len(harness[-1].delivered) >= 50)
        await some_turns()
        assert len(harness[0].answers) == 50
        assert len({event.token for event, _ in harness[0].answers}) == 50
        positions = {}
        for event, position in harness[0].answers:
            assert isinstance(position, Position)
            assert (position.epoch is None) == (position.offset is None) == (not kind.keeps)
            positions[event.token] = position.offset
        assert {event.token: event.offset for event in harness[-1].delivered} == positions


async def done_means_kept(kind: Kind) -> None:
    """3. As soon as `done` has come, the event is in the history at its position, as long as its retention says."""
    async with nodes(kind) as harness:
        for n in range(20):
            harness[0].publish("a", n)
        if not kind.keeps:
            await harness[0].answered()
            assert isinstance(await harness[0].result("history", "a", None, 100), NoHistory)
            return
        answered: dict[int | None, Position | Unavailable] = {}
        while len(answered) < 20:
            await until(lambda: len(harness[0].answers) > 0)
            answered = {event.token: result for event, result in harness[0].answers}
            page = await harness[-1].result("history", "a", None, 100)
            assert isinstance(page, HistoryPage)
            kept = {bytes(event.data): event.offset for event in page.events}
            sent = {event.token: bytes(event.data) for event in harness[0].published}
            for token, result in answered.items():
                assert isinstance(result, Position)
                assert kept.get(sent[token]) == result.offset
        # A retention of another topic is its own.
        for n in range(5):
            harness[0].publish("few", n, retention=Retention(events=2))
            harness[0].publish("none", n, retention=NOTHING_KEPT)
        await harness[0].answered()
        page = await harness[0].result("history", "few", None, 100)
        assert [bytes(event.data) for event in page.events] == [b"3", b"4"]
        assert (page.first, page.top) == (4, 5)
        assert isinstance(await harness[0].result("history", "none", None, 100), NoHistory)


async def refused_means_nothing(kind: Kind) -> None:
    """3. With an error nothing was kept, and nothing is delivered."""
    async with nodes(kind) as harness:
        await harness[-1].interested("a")
        kind.hang()
        for n in range(2 * kind.bound):
            harness[0].publish("a", n)
        await until(lambda: len(harness[0].answers) > 0)
        kind.go_on()
        await harness[0].answered()
        refused = {event.token for event, result in harness[0].answers if isinstance(result, Unavailable)}
        taken = {event.token for event, result in harness[0].answers if isinstance(result, Position)}
        assert refused
        assert taken
        await until(lambda: len(harness[-1].delivered) >= len(taken))
        await some_turns()
        assert {event.token for event in harness[-1].delivered} == taken


async def delivered_before_done(kind: Kind) -> None:
    """4. On the node that published an event, `done` comes after `deliver`."""
    async with nodes(kind) as harness:
        node, other = harness[0], harness[-1]
        await node.interested("a.>")
        for n in range(100):
            node.publish(f"a.{n % 3}", n)
            if other is not node:
                other.publish(f"a.{n % 3}", n)
        await node.answered()
        seen: set[int | None] = set()
        for what, told in node.told:
            if what == "deliver":
                seen.add(told.token)
            elif what == "done":
                assert told[0].token in seen
        # Without interest it is just done.
        await node.result("interest", "a.>", False)
        node.publish("b", 1)
        await asyncio.gather(node.answered(), other.answered())


async def never_blocks(kind: Kind) -> None:
    """5. Every call returns at once while the server hangs."""
    async with nodes(kind, 1) as [node]:
        kind.hang()
        with returning_at_once():
            node.publish("a", 1)
            answers = [
                node.ask("interest", "a", True),
                node.ask("history", "a", None, 10),
                node.ask("position", "a"),
                node.ask("interest", "a", False),
            ]
        await some_turns()
        kind.go_on()
        await node.answered()
        await until(lambda: all(answers))


async def bounded(kind: Kind) -> None:
    """6. At the bound of what waits, calls get Unavailable. The engine recovers."""
    async with nodes(kind, 1) as [node]:
        await node.interested("a")
        kind.hang()
        for n in range(3 * kind.bound):
            node.publish("a", n)
        others = [node.ask("position", "a") for _ in range(2)]
        await until(lambda: len(node.answers) >= 2 * kind.bound and all(others))
        assert all(isinstance(result, Unavailable) and result.message for _, result in node.answers)
        assert all(isinstance(result, Unavailable) for [result] in others)
        assert node.delivered == []
        kind.go_on()
        await node.answered()
        node.publish("a", "again")
        await node.answered()
        assert isinstance(node.answers[-1][1], Position)


async def no_silent_loss(kind: Kind) -> None:
    """7. After the connection was lost, `lost` is called for each topic or pattern of which an event may be missing."""
    async with nodes(kind) as [publisher, subscriber]:
        await subscriber.interested("a", "b.*")
        kind.cut(subscriber.engine)
        publisher.publish("a", 1)
        publisher.publish("b.c", 1)
        await publisher.answered()
        kind.mend(subscriber.engine)
        await until(lambda: subscriber.data("a") == ["1"] or "a" in subscriber.lost)
        await until(lambda: subscriber.data("b.c") == ["1"] or bool({"b.c", "b.*"} & subscriber.lost))
        publisher.publish("a", 2)
        await until(lambda: subscriber.data("a")[-1:] == ["2"])
        await publisher.answered()


async def ends(kind: Kind) -> None:
    """8. When `stop` has returned, each call has been answered once, and nothing is called back any more."""
    async with nodes(kind) as harness:
        for node in harness:
            await node.interested("a")
        for n in range(50):
            harness[0].publish("a", n)
            harness[-1].publish("a", n)
            if n % 10 == 0:
                await asyncio.sleep(0)
        answers = [harness[0].ask("position", "a"), harness[0].ask("interest", "b", True)]
        await harness[0].stop()
        taken = {event.token for event, result in harness[0].answers if isinstance(result, Position)}
        assert {event.token for event in harness[0].own} == taken
        assert len({event.token for event, _ in harness[0].answers}) == len(harness[0].answers)
        assert len(harness[0].answers) == len(harness[0].published)
        assert [len(each) for each in answers] == [1, 1]
        before = list(harness[0].told)
        if harness[-1] is not harness[0]:
            harness[-1].publish("a", 50)
            await harness[-1].answered()
        await some_turns()
        assert harness[0].told == before


async def ends_although_the_server_hangs(kind: Kind) -> None:
    """8. Calls without an answer by then get Unavailable."""
    async with nodes(kind, 1) as [node]:
        kind.hang()
        node.publish("a", 1)
        answers = [
            node.ask("interest", "a", True),
            node.ask("history", "a", None, 1),
            node.ask("position", "a"),
        ]
        await node.stop()
        assert len(node.answers) == 1
        assert isinstance(node.answers[0][1], Unavailable)
        assert all(isinstance(result, Unavailable) for [result] in answers)


async def interest_is_complete(kind: Kind) -> None:
    """9. Events published anywhere after `done` of an interest are delivered; and the last call for a filter counts."""
    async with nodes(kind) as harness:
        for n in range(20):
            topic = f"a.{n}"
            await harness[-1].interested(topic)
            harness[0].publish(topic, n)
        await until(lambda: len(harness[-1].delivered) >= 20)
        assert [harness[-1].data(f"a.{n}") for n in range(20)] == [[str(n)] for n in range(20)]
        await harness[-1].interested("b")
        answers = [harness[-1].ask("interest", "b", on) for on in (False, True, False, True)]
        await until(lambda: all(answers))
        await some_turns()
        assert answers == [[None]] * 4
        harness[0].publish("b", 1)
        await until(lambda: harness[-1].data("b") == ["1"])
        await harness[0].answered()


async def refused_interest_changes_nothing(kind: Kind) -> None:
    """9. An interest that got Unavailable is none: it can be asked for again, and brings no events until then."""
    async with nodes(kind) as [publisher, subscriber]:
        kind.cut(subscriber.engine)
        assert isinstance(await subscriber.result("interest", "a", True), Unavailable)
        kind.mend(subscriber.engine)
        publisher.publish("a", 1)
        await publisher.answered()
        await some_turns()
        assert subscriber.delivered == []
        await subscriber.interested("a")
        publisher.publish("a", 2)
        await until(lambda: subscriber.data("a") == ["2"])
        await publisher.answered()


async def history(kind: Kind) -> None:
    """10. History is read in pages that say which part they are: the newest events, or those after a position."""
    async with nodes(kind) as harness:
        node = harness[-1]
        for n in range(6):
            harness[0].publish("a", n, key=str(n), retention=Retention(events=5) if kind.keeps else None)
        await harness[0].answered()
        if not kind.keeps:
            assert await node.result("history", "a", None, 2) == NoHistory("a")
            assert await node.result("history", "a", Position("e", 0), 2) == NoHistory("a")
            return
        epoch = next(result.epoch for _, result in harness[0].answers if isinstance(result, Position))
        # (since, limit) → (offsets, complete, more)
        for since, limit, offsets, complete, more in (
            (None, 2, [5, 6], True, False),
            (None, 100, [2, 3, 4, 5, 6], True, False),
            (Position(epoch, 3), 2, [4, 5], True, True),
            (Position(epoch, 3), 3, [4, 5, 6], True, False),
            (Position(epoch, 1), 100, [2, 3, 4, 5, 6], True, False),
            (Position(epoch, 0), 2, [2, 3], False, True),
            (Position(epoch, 6), 10, [], True, False),
            (Position(None, 4), 10, [5, 6], True, False),
            (Position(epoch, 7), 10, [2, 3, 4, 5, 6], False, False),
            (Position("another", 4), 100, [2, 3, 4, 5, 6], False, False),
        ):
            page = await node.result("history", "a", since, limit)
            assert isinstance(page, HistoryPage)
            assert (page.epoch, page.first, page.top) == (epoch, 2, 6)
            assert [event.offset for event in page.events] == offsets
            assert (page.complete, page.more) == (complete, more)
            assert all(bytes(event.data) == b"%d" % ((event.offset or 0) - 1) for event in page.events)
            assert all(event.key == str((event.offset or 0) - 1) for event in page.events)


async def position(kind: Kind) -> None:
    """10. The position is that of the newest event that was answered; without history it is none."""
    async with nodes(kind) as harness:
        never = await harness[-1].result("position", "never")
        assert never.offset in (None, 0)
        for n in range(3):
            harness[0].publish("a", n)
            await harness[0].answered()
            at = await harness[-1].result("position", "a")
            assert (at if kind.keeps else Position()) == harness[0].answers[-1][1]
            assert kind.keeps or at.offset in (None, 0)
        assert (harness[0].answers[-1][1] == Position()) == (not kind.keeps)


async def locate(kind: Kind) -> None:
    """10. The beginning of the newest events is found, and the top."""
    async with nodes(kind) as harness:
        if not kind.keeps:
            return
        for n in range(6):
            harness[0].publish("a", n, retention=Retention(events=4))
        await harness[0].answered()
        top = await harness[0].result("position", "a")
        for last, offset in ((1, 5), (3, 3), (4, 2), (5, 2), (2**53 - 1, 2)):
            assert await harness[-1].result("locate", "a", last) == (Position(top.epoch, offset), top)


async def compacted(kind: Kind) -> None:
    """11. Of a compacted topic each key has one event, its newest, and only what was dropped otherwise is missing."""
    async with nodes(kind) as harness:
        node = harness[-1]
        if not kind.keeps:
            return
        table = Retention(events=5, compact=True)
        for key, data in (("a", 1), ("b", 2), (None, 3), ("a", 4), ("b", None), (None, 5), ("c", 6)):
            harness[0].publish("t", data, key=key, retention=table)
        await harness[0].answered()
        epoch = (await node.result("position", "t")).epoch
        page = await node.result("history", "t", Position(epoch, 0), 10)
        assert ([event.offset for event in page.events], page.complete) == ([3, 4, 5, 6, 7], True)
        harness[0].publish("t", 7, key="c", retention=table)
        harness[0].publish("t", 8, key="d", retention=table)
        await harness[0].answered()
        # The first event without a key was dropped, at offset 3. Of the others none is missing.
        for since, limit, offsets, complete, more in (
            (Position(epoch, 0), 10, [4, 5, 6, 8, 9], False, False),
            (Position(epoch, 2), 10, [4, 5, 6, 8, 9], False, False),
            (Position(epoch, 3), 2, [4, 5], True, True),
            (Position(epoch, 6), 10, [8, 9], True, False),
        ):
            page = await node.result("history", "t", since, limit)
            assert [event.offset for event in page.events] == offsets
            assert (page.complete, page.more, page.first, page.top) == (complete, more, 4, 9)
        page = await node.result("history", "t", None, 10)
        table_now = {event.key: bytes(event.data) for event in page.events}
        assert table_now == {"a": b"4", "b": b"null", None: b"5", "c": b"7", "d": b"8"}


async def idempotent(kind: Kind) -> None:
    """12. A publish that is repeated is answered with the position of the first one, and not delivered again."""
    async with nodes(kind) as harness:
        await harness[-1].interested(">")
        for _ in range(3):
            harness[0].publish("a", 1, dedup="x")
            await harness[0].answered()
            harness[0].publish("a", 2, dedup=None)
            harness[0].publish("b", 3, dedup="x")
            await harness[0].answered()
        harness[0].publish("a", 4, dedup="y")
        await harness[0].answered()
        await until(lambda: len(harness[-1].delivered) >= 6)
        await some_turns()
        assert harness[-1].data("a") == ["1", "2", "2", "2", "4"]
        assert harness[-1].data("b") == ["3"]
        firsts: dict[tuple[str, str], Position] = {}
        for event, result in harness[0].answers:
            assert isinstance(result, Position)
            if event.dedup is None:
                assert not result.duplicate
                continue
            first = firsts.setdefault((event.topic, event.dedup), result)
            assert result == (first if result is first else msgspec.structs.replace(first, duplicate=True))


Check = Callable[[Kind], Awaitable[None]]

CHECKS: list[Check] = [
    order,
    once,
    equal,
    done_once,
    done_means_kept,
    delivered_before_done,
    ends,
    interest_is_complete,
    history,
    position,
    locate,
    compacted,
    idempotent,
]
"""Those that every engine must pass."""
CHECKS_WITH_A_SERVER: list[Check] = [
    refused_means_nothing,
    never_blocks,
    bounded,
    no_silent_loss,
    ends_although_the_server_hangs,
    refused_interest_changes_nothing,
]
"""Those about what is behind it; they need `may_fail`, and two nodes."""
