"""The default engine: events stay in this process, and what is kept of them is lost with it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import Final

from broker import messages
from broker._speedups import HistoryStore, TopicLog, append_event
from broker.config import Limits
from broker.engines.base import (
    Changed,
    Deliver,
    Engine,
    EngineStats,
    Event,
    HistoryDone,
    HistoryPage,
    InterestDone,
    JoinDone,
    LocateDone,
    Lost,
    Member,
    MemberPage,
    MembersDone,
    NoHistory,
    Position,
    PositionDone,
    Presence,
    PublishDone,
    Unavailable,
)
from broker.retention import MAX_DEDUP_AGE
from broker.rules import Retention

NOWHERE: Final = Position()
SWEEP: Final = 1.0
"""Seconds between two looks for kept events that have grown too old."""
SWEEP_ON: Final = 0.02
"""Seconds until the next look, where one has not seen all topics."""


def new_epoch() -> str:
    """Make the name of a numbering: so long that no topic gets the same one twice."""
    return secrets.token_hex(6)


class Dedups:
    """What was published with `dedup`, bounded in number and age. Times are in seconds of a monotonic clock."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[tuple[str, str], tuple[float, Position]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, topic: str, dedup: str, age: float, now: float) -> Position | None:
        """Find where the publish is that had this `dedup`, at most `age` seconds ago."""
        known = self._known.get((topic, dedup))
        return None if known is None or now - known[0] > age else known[1]

    def note(self, topic: str, dedup: str, position: Position, now: float) -> None:
        """Remember a publish; the oldest one is forgotten where there are too many."""
        self._known.pop((topic, dedup), None)
        self._known[topic, dedup] = now, position
        while len(self._known) > self.most:
            self._known.popitem(last=False)

    def sweep(self, age: float, now: float) -> None:
        """Forget what is older than `age`."""
        while self._known and now - next(iter(self._known.values()))[0] > age:
            self._known.popitem(last=False)


class MemoryEngine(Engine):
    """Delivers an event before `publish` returns. The order of an event loop is all the order that it needs."""

    def __init__(self, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self._deliver: Deliver | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._dedups = Dedups(limits.dedup_entries)
        self._longest_dedup = 0.0
        self.store = HistoryStore(max_bytes=limits.history_bytes, max_topics=limits.history_topics, new_epoch=new_epoch)

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        self._deliver = deliver

    async def stop(self) -> None:
        self._deliver = None
        if self._timer is not None:
            self._timer.cancel()

    def configure(self, limits: Limits) -> None:
        self.store.max_bytes, self.store.max_topics = limits.history_bytes, limits.history_topics
        self._dedups.most = limits.dedup_entries
        self.store.enforce()

    def is_local(self, topic: str, retention: Retention) -> bool:
        """Yes: there is one node."""
        return True

    def log(self, topic: str) -> TopicLog | None:
        return self.store.find(topic)

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        if self._deliver is None:
            raise RuntimeError("the engine is not started")
        if event.dedup is not None:
            self._publish_once(event, event.dedup, retention, done)
            return
        position = NOWHERE
        if retention.events:
            event, position = self._keep(event, retention)
        elif self._timer is not None:
            self.store.drop(event.topic)  # its rule may have kept history before a reload
        self._deliver(event)
        done(position)

    def _publish_once(self, event: Event, dedup: str, retention: Retention, done: PublishDone) -> None:
        """Publish an event, unless it was published before."""
        now = time.monotonic()
        earlier = self._dedups.find(event.topic, dedup, retention.dedup_age, now)
        if earlier is not None:
            done(Position(earlier.epoch, earlier.offset, duplicate=True))
            return

        def note(position: Position | Unavailable) -> None:
            if isinstance(position, Position):
                self.begin_sweep()
                self._longest_dedup = max(self._longest_dedup, retention.dedup_age)
                self._dedups.note(event.topic, dedup, position, now)
            done(position)

        self.publish(Event(event.topic, event.data, event.key, None, event.token), retention, note)

    def remember_dedup(self, topic: str, dedup: str, age: float) -> None:
        """Remember a publish to a topic without history from before the start, `age` seconds ago."""
        self.begin_sweep()
        self._longest_dedup = MAX_DEDUP_AGE
        self._dedups.note(topic, dedup, NOWHERE, time.monotonic() - age)

    def _keep(self, event: Event, retention: Retention) -> tuple[Event, Position]:
        """Number an event and keep it."""
        self.begin_sweep()
        log = self.store.log(
            event.topic,
            events=retention.events,
            age=retention.age or 0,
            bytes=retention.bytes or 0,
            compact=retention.compact,
            tombstone_age=retention.tombstone_age,
        )
        payload = messages.encode_event(event.topic, event.data, event.key, log.top + 1)
        key = None if event.key is None else event.key.encode()
        offset = append_event(log, payload, key, len(bytes(event.data)))
        return Event(event.topic, event.data, event.key, offset, event.token), Position(log.epoch, offset)

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        """Nothing to do: every event is delivered to the one node that there is."""
        done(None)

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        log = self.store.find(topic)
        if log is None:
            done(NoHistory(topic))
            return
        if since is None:
            done(HistoryPage(log.latest(limit), log.epoch, log.oldest, log.top, complete=True, more=False))
            return
        offset = since.offset or 0
        same = since.epoch is None or since.epoch == log.epoch
        events, more = log.after(offset if same and offset <= log.top else 0, limit)
        # Afterwards, because reading drops what is too old.
        complete = same and log.floor <= offset <= log.top
        done(HistoryPage(events, log.epoch, log.oldest, log.top, complete=complete, more=more))

    def locate(self, topic: str, last: int, done: LocateDone) -> None:
        log = self.store.find(topic)
        if log is None:
            nothing = Position(self.store.epoch, 0)
            done((nothing, nothing))
        else:
            done((Position(log.epoch, log.before(min(last, MOST))), Position(log.epoch, log.top)))

    def position(self, topic: str, done: PositionDone) -> None:
        log = self.store.find(topic)
        done(Position(self.store.epoch, 0) if log is None else Position(log.epoch, log.top))

    def stats(self) -> EngineStats:
        store = self.store
        return EngineStats(len(store), store.memory, store.events_evicted, len(self._dedups))

    def presence(self) -> Presence:
        return MemoryPresence()

    def begin_sweep(self) -> None:
        """Have what is kept looked at for its age, as long as something is kept."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP, self._sweep)

    def _sweep(self) -> None:
        left = self.store.sweep()
        self._dedups.sweep(self._longest_dedup, time.monotonic())
        self._timer = None
        if len(self.store) or len(self._dedups):
            self._timer = asyncio.get_running_loop().call_later(SWEEP_ON if left else SWEEP, self._sweep)


MOST: Final = 2**31


class Roll:
    """The members of one topic, in the order in which they joined. Their places are numbered, and are the cursors."""

    __slots__ = ("_holes", "_next", "_places", "_sessions", "members")

    def __init__(self) -> None:
        self.members: dict[str, tuple[int, Member]] = {}
        """The place and the member of each session."""
        self._places: list[int] = []
        self._sessions: list[str | None] = []
        """Who is at each of the places; None: it has left."""
        self._holes = 0
        self._next = 1

    def add(self, member: Member) -> None:
        """Add a member, or replace the one of its session at its place."""
        known = self.members.get(member.session)
        if known is not None:
            self.members[member.session] = known[0], member
            return
        self.members[member.session] = self._next, member
        self._places.append(self._next)
        self._sessions.append(member.session)
        self._next += 1

    def remove(self, session: str) -> Member | None:
        """Remove the member of a session, if it is there. Places that are empty are given up when they are many."""
        known = self.members.pop(session, None)
        if known is None:
            return None
        self._sessions[bisect_left(self._places, known[0])] = None
        self._holes += 1
        if self._holes > len(self.members) + FEWEST_HOLES:
            self._sessions = list(self.members)
            self._places = [place for place, _ in self.members.values()]
            self._holes = 0
        return known[1]

    def page(self, cursor: int, limit: int) -> tuple[list[Member], int | None]:
        """Give at most `limit` members behind a place, and the place of the last one; None: none is behind it."""
        members: list[Member] = []
        for at in range(bisect_right(self._places, cursor), len(self._places)):
            session = self._sessions[at]
            if session is None:
                continue
            if len(members) == limit:
                return members, cursor
            cursor = self._places[at]
            members.append(self.members[session][1])
        return members, None


FEWEST_HOLES: Final = 16
"""So many empty places of a topic are never given up."""


class MemoryPresence(Presence):
    """The members of one process. They end with it, so there is no lease."""

    def __init__(self) -> None:
        self._topics: dict[str, Roll] = {}
        self._changed: Changed | None = None

    def start(self, changed: Changed) -> None:
        self._changed = changed

    def join(self, topic: str, member: Member, done: JoinDone) -> None:
        self._topics.setdefault(topic, Roll()).add(member)
        if self._changed is not None:
            self._changed(topic, member, True)
        done(None)

    def leave(self, topic: str, session: str, done: JoinDone) -> None:
        roll = self._topics.get(topic)
        member = None if roll is None else roll.remove(session)
        if roll is not None and not roll.members:
            del self._topics[topic]
        if member is not None and self._changed is not None:
            self._changed(topic, member, False)
        done(None)

    def members(self, topic: str, cursor: str | None, limit: int, done: MembersDone) -> None:
        roll = self._topics.get(topic)
        if roll is None:
            done(MemberPage([], 0, None))
            return
        members, place = roll.page(_place(cursor), limit)
        done(MemberPage(members, len(roll.members), None if place is None else str(place)))

    def renew(self) -> None:
        """Nothing to do."""


def _place(cursor: str | None) -> int:
    """Read a cursor. One that was never given is like the beginning."""
    return int(cursor) if cursor is not None and re.fullmatch(r"[0-9]{1,18}", cursor) else 0
