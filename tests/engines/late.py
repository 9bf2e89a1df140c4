"""An engine that is not in this process, or behaves as if: everything takes turns of the loop, nothing is in step.

Topics overtake each other, an event is delivered some turns after it was published, and `done` comes some turns later
again, for one event before an older one. Only what the port promises holds. `LateServer` is what several nodes share.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

import msgspec

from broker.engines.base import Deliver, Done, Engine, Event, HistoryDone, Lost, NoHistory, Position, Unavailable
from broker.topics import matches

EPOCH = "late"


class Waiting(msgspec.Struct, eq=False):
    """A publish under way."""

    engine: LateEngine
    event: Event
    done: Done


class LateServer:
    """Orders and numbers events. `keeps` says whether topics have history, `bound` how many publishes may wait."""

    def __init__(self, *, keeps: bool = False, bound: int = 1000) -> None:
        self.keeps = keeps
        self.bound = bound
        self.engines: list[LateEngine] = []
        self.history: dict[str, list[Event]] = {}
        self.random = random.Random(1)
        self._topics: dict[str, deque[Waiting]] = {}
        self._hung = False
        self._loop = asyncio.get_running_loop()

    def engine(self) -> LateEngine:
        """The engine of one more node."""
        return LateEngine(self)

    @property
    def waiting(self) -> int:
        """How many publishes it has not looked at."""
        return sum(map(len, self._topics.values()))

    def hang(self) -> None:
        """From now on do not answer."""
        self._hung = True

    def go_on(self) -> None:
        """Answer again, first what waits."""
        self._hung = False
        for _ in range(self.waiting):
            self.later(self._step)

    def take(self, waiting: Waiting) -> None:
        """Get a publish from an engine."""
        self._topics.setdefault(waiting.event.topic, deque()).append(waiting)
        self.later(self._step)

    def give_up(self, engine: LateEngine) -> list[Waiting]:
        """Forget what waits from this engine, and return it."""
        mine = [waiting for topic in self._topics.values() for waiting in topic if waiting.engine is engine]
        for topic, queue in list(self._topics.items()):
            self._topics[topic] = deque(waiting for waiting in queue if waiting.engine is not engine)
        return mine

    def later(self, callback: Callable[[], object]) -> None:
        """Call back in a turn or some: a different time for each."""
        if self.random.random() < 0.5:
            self._loop.call_soon(callback)
        else:
            self._loop.call_later(self.random.random() / 500, callback)

    def _step(self) -> None:
        """Carry out one publish, of any topic."""
        topics = [topic for topic, queue in self._topics.items() if queue]
        if self._hung or not topics:
            return
        topic = self.random.choice(topics)
        waiting = self._topics[topic].popleft()
        if not self._topics[topic]:
            del self._topics[topic]
        if self.keeps:
            kept = self.history.setdefault(topic, [])
            waiting.event.offset = len(kept) + 1
            kept.append(self.copy(waiting.event))
        for engine in self.engines:
            engine.hear(waiting.event if engine is waiting.engine else self.copy(waiting.event))
        position = Position(EPOCH, waiting.event.offset) if self.keeps else Position()
        waiting.engine.hear((waiting.done, position))

    @staticmethod
    def copy(event: Event) -> Event:
        """What travels to other nodes."""
        return Event(event.topic, bytes(event.data), event.key, event.offset)


class LateEngine(Engine):
    """One node's connection to a `LateServer`."""

    def __init__(self, server: LateServer) -> None:
        self.server = server
        self.interests: dict[str, bool] = {}
        self.asked: list[tuple[str, bool]] = []
        """All calls of `interest`."""
        self.published = 0
        self._deliver: Deliver | None = None
        self._lost: Lost | None = None
        self._inbox: deque[Event | tuple[Done, Position | Unavailable]] = deque()
        self._under_way: set[Done] = set()
        self._known: list[tuple[Done, Position | Unavailable]] = []
        """Answers that nobody was told yet."""
        self._cut = False

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        await asyncio.sleep(0)
        self._deliver = deliver
        self._lost = lost
        self.server.engines.append(self)

    async def stop(self) -> None:
        await asyncio.sleep(0)
        for waiting in self.server.give_up(self):
            self.answer(waiting.done, Unavailable("the engine has ended"))
        while self._inbox:
            self._take_one()
        for done, result in list(self._known):
            self.answer(done, result)
        self._known.clear()
        self.server.engines.remove(self)
        self._deliver = self._lost = None

    def publish(self, event: Event, done: Done) -> None:
        self.published += 1
        self._under_way.add(done)
        if len(self._under_way) > self.server.bound:
            self.hear((done, Unavailable("too much waits for the engine")))
        elif self._cut:
            self.hear((done, Unavailable("the engine has lost its connection")))
        else:
            self.server.take(Waiting(self, event, done))

    def interest(self, topic: str, on: bool) -> None:
        self.asked.append((topic, on))
        if on:
            self.interests[topic] = True
        else:
            del self.interests[topic]

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        kept = self.server.history.get(topic, [])
        if not self.server.keeps:
            self.server.later(lambda: done(NoHistory(topic)))
        elif since is None:
            self.server.later(lambda: done(kept[-limit:]))
        else:
            self.server.later(lambda: done(kept[since.offset or 0 :][:limit]))

    def cut(self) -> None:
        """Lose the connection to the server: what other nodes publish does not get here."""
        self._cut = True

    def mend(self) -> None:
        """Have it again. Nobody can tell what went by."""
        self._cut = False
        for topic in self.interests:
            self._lose(topic)

    def hear(self, news: Event | tuple[Done, Position | Unavailable]) -> None:
        """Something comes from the server."""
        if isinstance(news, Event) and (self._cut or not self.is_interested(news.topic)):
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

    def answer(self, done: Done, result: Position | Unavailable) -> None:
        """Tell a publisher."""
        if done in self._under_way:
            self._under_way.remove(done)
            done(result)

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

    def _lose(self, topic: str) -> None:
        def tell() -> None:
            if self._lost is not None:
                self._lost(topic)

        self.server.later(tell)
