"""The default engine: events stay in this process, and nothing is kept of them."""

from __future__ import annotations

import heapq

from broker.engines.base import (
    Deliver,
    Engine,
    Event,
    HistoryDone,
    InterestDone,
    JoinDone,
    Lost,
    Member,
    MemberPage,
    MembersDone,
    NoHistory,
    Position,
    PositionDone,
    Presence,
    PublishDone,
)
from broker.rules import Retention

NOWHERE = Position()


class MemoryEngine(Engine):
    """Delivers an event before `publish` returns. The order of an event loop is all the order that it needs."""

    def __init__(self) -> None:
        self._deliver: Deliver | None = None

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        self._deliver = deliver

    async def stop(self) -> None:
        self._deliver = None

    def is_local(self, topic: str) -> bool:
        """Yes: there is one node, and no topic keeps history."""
        return True

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        if self._deliver is None:
            raise RuntimeError("the engine is not started")
        self._deliver(event)
        done(NOWHERE)

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        """Nothing to do: every event is delivered to the one node that there is."""
        done(None)

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        done(NoHistory(topic))

    def position(self, topic: str, done: PositionDone) -> None:
        done(NOWHERE)


class MemoryPresence(Presence):
    """The members of one process. They end with it, so there is no lease."""

    def __init__(self) -> None:
        self._topics: dict[str, dict[str, Member]] = {}

    def join(self, topic: str, member: Member, done: JoinDone) -> None:
        self._topics.setdefault(topic, {})[member.session] = member
        done(None)

    def leave(self, topic: str, session: str, done: JoinDone) -> None:
        members = self._topics.get(topic, {})
        members.pop(session, None)
        if not members:
            self._topics.pop(topic, None)
        done(None)

    def members(self, topic: str, cursor: str | None, limit: int, done: MembersDone) -> None:
        members = self._topics.get(topic, {})
        following = (session for session in members if cursor is None or session > cursor)
        sessions = heapq.nsmallest(limit + 1, following)
        page = [members[session] for session in sessions[:limit]]
        done(MemberPage(page, len(members), page[-1].session if len(sessions) > limit else None))

    def renew(self) -> None:
        """Nothing to do."""
