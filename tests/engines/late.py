"""An engine that is not in this process, or behaves as if: everything takes turns of the loop, nothing is in step.

Topics overtake each other, an event is delivered some turns after it was published, and `done` comes some turns later
again, for one event before an older one. Delivered events are copies, as if they had been serialised. Only what the
port promises holds. `LateServer` is what several nodes share.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from broker.engines.base import (
    Changed,
    Deliver,
    Engine,
    Event,
    HistoryDone,
    HistoryPage,
    InterestDone,
    LocateDone,
    Lost,
    Member,
    MemberPage,
    NoHistory,
    Position,
    PositionDone,
    Presence,
    PublishDone,
    Unavailable,
)
from broker.rules import Retention
from broker.topics import matches

EPOCH = "late"


class Call(msgspec.Struct, eq=False):
    """A call under way."""

    done: Callable[[Any], None]


class Waiting(msgspec.Struct, eq=False):
    """A publish under way."""

    engine: LateEngine
    event: Event
    retention: Retention
    call: Call


class LateServer:
    """Orders and numbers events. `keeps`: topics have history whatever the node says; `bound`: how many calls of a node
    may wait."""

    def __init__(self, *, keeps: bool = False, bound: int = 1000) -> None:
        self.keeps = keeps
        self.bound = bound
        self.engines: list[LateEngine] = []
        self.kept: dict[str, list[Event]] = {}
        self.tops: dict[str, int] = {}
        self.floors: dict[str, int] = {}
        """Up to which offset events may be missing that none of their key superseded."""
        self.dedups: dict[tuple[str, str], Position] = {}
        self.random = random.Random(1)
        self.hung = False
        self._topics: dict[str, deque[Waiting]] = {}
        self._loop = asyncio.get_running_loop()
        self.members = LatePresenceServer()

    def engine(self) -> LateEngine:
        """The engine of one more node."""
        return LateEngine(self)

    @property
    def waiting(self) -> int:
        """How many publishes it has not looked at."""
        return sum(map(len, self._topics.values()))

    def hang(self) -> None:
        """From now on do not answer."""
        self.hung = True

    def go_on(self) -> None:
        """Answer again, first what waits."""
        self.hung = False
        for _ in range(self.waiting):
            self.later(self._step)
        for engine in self.engines:
            engine.go_on()

    def take(self, waiting: Waiting) -> None:
        """Get a publish from an engine."""
        self._topics.setdefault(waiting.event.topic, deque()).append(waiting)
        self.later(self._step)

    def give_up(self, engine: LateEngine) -> None:
        """Forget what waits from this engine."""
        for topic, queue in list(self._topics.items()):
            self._topics[topic] = deque(waiting for waiting in queue if waiting.engine is not engine)

    def later(self, callback: Callable[[], object]) -> None:
        """Call back in a turn or some: a different time for each."""
        if self.random.random() < 0.5:
            self._loop.call_soon(callback)
        else:
            self._loop.call_later(self.random.random() / 500, callback)

    def page(self, topic: str, since: Position | None, limit: int) -> HistoryPage | NoHistory:
        """Read what is kept of a topic."""
        kept = self.kept.get(topic)
        if kept is None:
            return NoHistory(topic)
        top = self.tops[topic]
        first = kept[0].offset or 0 if kept else top + 1
        if since is None:
            return HistoryPage(kept[-limit:], EPOCH, first, top, complete=True, more=False)
        offset = since.offset or 0
        same = since.epoch in (EPOCH, None)
        found = kept[bisect_right(kept, offset, key=lambda event: event.offset or 0) if same and offset <= top else 0 :]
        complete = same and self.floors[topic] <= offset <= top
        return HistoryPage(found[:limit], EPOCH, first, top, complete=complete, more=len(found) > limit)

    def locate(self, topic: str, last: int) -> tuple[Position, Position]:
        """Where the newest events begin."""
        offsets = [event.offset or 0 for event in self.kept[topic][-last:]]
        top = self.tops[topic]
        return Position(EPOCH, offsets[0] - 1 if offsets else top), Position(EPOCH, top)

    def position(self, topic: str) -> Position:
        """Where a topic is."""
        return Position(EPOCH, self.tops[topic]) if topic in self.tops else Position()

    def _step(self) -> None:
        """Carry out one publish, of any topic."""
        topics = [topic for topic, queue in self._topics.items() if queue]
        if self.hung or not topics:
            return
        topic = self.random.choice(topics)
        waiting = self._topics[topic].popleft()
        if not self._topics[topic]:
            del self._topics[topic]
        event, position = waiting.event, Position()
        if (event.topic, event.dedup or "") in self.dedups:
            known = self.dedups[event.topic, event.dedup or ""]
            waiting.engine.hear((waiting.call, msgspec.structs.replace(known, duplicate=True)))
            return
        if self.keeps or waiting.retention.events:
            offset = self.tops[topic] = self.tops.get(topic, 0) + 1
            event, position = msgspec.structs.replace(event, offset=offset), Position(EPOCH, offset)
            kept = self.kept.setdefault(topic, [])
            if waiting.retention.compact and event.key is not None:
                kept[:] = [each for each in kept if each.key != event.key]
            kept.append(self.copy(event))
            self.floors.setdefault(topic, 0)
            while not self.keeps and len(kept) > waiting.retention.events:
                self.floors[topic] = kept.pop(0).offset or 0
        if event.dedup is not None:
            self.dedups[event.topic, event.dedup] = position
        for engine in self.engines:
            engine.hear(self.copy(event))
        waiting.engine.hear((waiting.call, position))

    @staticmethod
    def copy(event: Event) -> Event:
        """What travels."""
        return msgspec.structs.replace(event, data=bytes(event.data))


News = Event | tuple[Call, Position | Unavailable]


class LateEngine(Engine):
    """One node's connection to a `LateServer`."""

    def __init__(self, server: LateServer) -> None:
        self.server = server
        self.interests: dict[str, bool] = {}
        """Those that have taken effect."""
        self.asked: list[tuple[str, bool]] = []
        """All calls of `interest`."""
        self.published = 0
        self.under_way: dict[Call, None] = {}
        self.is_cut = False
        self._deliver: Deliver | None = None
        self._lost: Lost | None = None
        self._inbox: deque[News] = deque()
        self._asks: deque[tuple[Call, Callable[[], Any]]] = deque()
        """Calls that are no publishes, in their order."""
        self._known: list[tuple[Call, Position | Unavailable]] = []
        """Answers that nobody was told yet."""

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        await asyncio.sleep(0)
        self._deliver = deliver
        self._lost = lost
        self.server.engines.append(self)

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.server.give_up(self)
        while self._inbox:
            self._take_one()
        for call, result in list(self._known):
            self.answer(call, result)
        self._known.clear()
        for call in list(self.under_way):
            self.answer(call, Unavailable("the engine has ended"))
        self._asks.clear()
        self.server.engines.remove(self)
        self._deliver = self._lost = None

    def is_local(self, topic: str, retention: Retention) -> bool:
        return False

    def presence(self) -> Presence:
        return LatePresence(self.server.members)

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        self.published += 1
        call = self.begin(done)
        if len(self.under_way) > self.server.bound:
            self.hear((call, Unavailable("too much waits for the engine")))
        elif self.is_cut:
            self.hear((call, Unavailable("the engine has lost its connection")))
        else:
            self.server.take(Waiting(self, event, retention, call))

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        self.asked.append((filter, on))

        def work() -> Unavailable | None:
            if on and self.is_cut:
                return Unavailable("the engine has lost its connection")
            if on:
                self.interests[filter] = True
            else:
                self.interests.pop(filter, None)
            return None

        self.ask(done, work)

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        self.ask(done, lambda: self._reach(lambda: self.server.page(topic, since, limit)))

    def locate(self, topic: str, last: int, done: LocateDone) -> None:
        self.ask(done, lambda: self._reach(lambda: self.server.locate(topic, last)))

    def position(self, topic: str, done: PositionDone) -> None:
        self.ask(done, lambda: self._reach(lambda: self.server.position(topic)))

    def cut(self) -> None:
        """Lose the connection to the server: what other nodes publish does not get here."""
        self.is_cut = True

    def mend(self) -> None:
        """Have it again. Nobody can tell what went by."""
        self.is_cut = False
        for interest in self.interests:
            self._lose(interest)

    def go_on(self) -> None:
        """The server answers again."""
        for _ in self._asks:
            self.server.later(self._take_ask)

    def hear(self, news: News) -> None:
        """Something comes from the server."""
        if isinstance(news, Event) and (self.is_cut or not self.is_interested(news.topic)):
            return
        self._inbox.append(news)
        self.server.later(self._take_one)

    def is_interested(self, topic: str) -> bool:
        """Whether events of this topic are delivered here."""
        return any(matches(pattern, topic) for pattern in self.interests)

    def deliver(self, event: Event) -> None:
        """Hand an event to the node."""
        assert self._deliver is not None
        self._deliver(event)

    def begin(self, done: Callable[[Any], None]) -> Call:
        """Note a call that waits for its answer."""
        call = Call(done)
        self.under_way[call] = None
        return call

    def ask(self, done: Callable[[Any], None], work: Callable[[], Any]) -> None:
        """Carry out a call that is no publish, behind those before it."""
        call = self.begin(done)
        if len(self.under_way) > self.server.bound:
            self.server.later(lambda: self.answer(call, Unavailable("too much waits for the engine")))
            return
        self._asks.append((call, work))
        self.server.later(self._take_ask)

    def answer(self, call: Call, result: Any) -> None:
        """Tell who waits for a call."""
        if call in self.under_way:
            del self.under_way[call]
            call.done(result)

    def _reach(self, work: Callable[[], Any]) -> Any:
        return Unavailable("the engine has lost its connection") if self.is_cut else work()

    def _take_ask(self) -> None:
        if self._asks and not self.server.hung:
            call, work = self._asks.popleft()
            self.answer(call, work())

    def _take_one(self) -> None:
        """Events in the order in which they came; answers behind their event, but in any order among themselves."""
        if not self._inbox:
            return
        news = self._inbox.popleft()
        if isinstance(news, Event):
            self.deliver(news)
        else:
            self._known.append(news)
            self.server.later(self._tell_one)

    def _tell_one(self) -> None:
        if self._known:
            self.answer(*self._known.pop(self.server.random.randrange(len(self._known))))

    def _lose(self, filter: str) -> None:
        def tell() -> None:
            if self._lost is not None:
                self._lost(filter)

        self.server.later(tell)


class LatePresenceServer:
    """The members of several nodes, each with the time at which its node's lease ends. Time is what a test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.topics: dict[str, dict[str, tuple[Member, LatePresence]]] = {}
        self.nodes: list[LatePresence] = []
        self.loop = asyncio.get_running_loop()

    def tell(self, topic: str, member: Member, here: bool) -> None:
        """Tell every node of a change."""
        for node in self.nodes:
            node.tell(topic, member, here)

    def members(self, topic: str) -> dict[str, Member]:
        """Those whose node's lease has not ended, in the order of their sessions."""
        found = sorted(self.topics.get(topic, {}).items())
        return {session: member for session, (member, node) in found if node.ends > self.now}


class LatePresence(Presence):
    """One node's connection to a `LatePresenceServer`. Calls take a turn, in their order."""

    lease = 30.0

    def __init__(self, server: LatePresenceServer) -> None:
        self.server = server
        self.ends = server.now + self.lease
        self.changed: Changed | None = None

    def start(self, changed: Changed) -> None:
        self.changed = changed
        self.server.nodes.append(self)

    def tell(self, topic: str, member: Member, here: bool) -> None:
        """Tell this node of a change."""
        if self.changed is not None:
            self.changed(topic, member, here)

    def join(self, topic: str, member: Member, done: Callable[[Unavailable | None], None]) -> None:
        def work() -> None:
            self.server.topics.setdefault(topic, {})[member.session] = (member, self)
            self.server.tell(topic, member, True)
            done(None)

        self.server.loop.call_soon(work)

    def leave(self, topic: str, session: str, done: Callable[[Unavailable | None], None]) -> None:
        def work() -> None:
            known = self.server.topics.get(topic, {}).pop(session, None)
            if known is not None:
                self.server.tell(topic, known[0], False)
            done(None)

        self.server.loop.call_soon(work)

    def members(
        self, topic: str, cursor: str | None, limit: int, done: Callable[[MemberPage | Unavailable], None]
    ) -> None:
        def work() -> None:
            members = self.server.members(topic)
            following = [member for session, member in members.items() if cursor is None or session > cursor]
            page = following[:limit]
            done(MemberPage(page, len(members), page[-1].session if len(following) > limit else None))

        self.server.loop.call_soon(work)

    def renew(self) -> None:
        self.ends = self.server.now + self.lease
