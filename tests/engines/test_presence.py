"""Every presence keeps the promises of its port; and the checks notice one that does not."""

from __future__ import annotations

import pytest

from broker.engines.base import JoinDone, Member, MemberPage, MembersDone, Presence
from broker.engines.memory import MemoryPresence
from tests.engines import presence
from tests.engines.late import LatePresence, LatePresenceServer
from tests.engines.presence import CHECKS, CHECKS_WITH_A_LEASE, Check, PresenceKind


class Memory(PresenceKind):
    """The members of one process."""

    def presence(self) -> Presence:
        return MemoryPresence()


class Late(PresenceKind):
    """The double for members that are kept somewhere else."""

    most_nodes = 2

    def __init__(self) -> None:
        self.server = LatePresenceServer()

    def presence(self) -> Presence:
        return LatePresence(self.server)

    def pass_time(self, seconds: float) -> None:
        self.server.now += seconds


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", [Memory, Late])
async def test_presence_keeps_the_promise(kind: type[PresenceKind], check: Check) -> None:
    await check(kind())


@pytest.mark.parametrize("check", CHECKS_WITH_A_LEASE)
async def test_presence_keeps_the_promise_of_the_lease(check: Check) -> None:
    await check(Late())


def test_memory_presence_forgets_topics_without_members() -> None:
    members = MemoryPresence()
    answers: list[object] = []
    members.join("a", Member("s1"), answers.append)
    members.leave("a", "s1", answers.append)
    members.leave("b", "s1", answers.append)
    assert answers == [None] * 3
    assert members._topics == {}


# Presences that break a promise


class Sticky(LatePresence):
    """Does not let members go."""

    def leave(self, topic: str, session: str, done: JoinDone) -> None:
        done(None)


class Hasty(LatePresence):
    """Says that a member has joined, and lets it join some turns later."""

    def join(self, topic: str, member: Member, done: JoinDone) -> None:
        done(None)
        self.server.loop.call_later(0.05, super().join, topic, member, lambda result: None)


class Numbered(LatePresence):
    """Counts places in place of sessions, so that a page shifts when somebody comes."""

    def members(self, topic: str, cursor: str | None, limit: int, done: MembersDone) -> None:
        sessions = list(self.server.members(topic))
        place = int(cursor or 0)
        real = sessions[place - 1] if place else None
        super().members(topic, real, limit, lambda page: done(_with_cursor(page, place + limit)))


def _with_cursor(page: object, place: int) -> MemberPage:
    assert isinstance(page, MemberPage)
    return MemberPage(page.members, page.count, None if page.cursor is None else str(place))


class Silent(LatePresence):
    """Says nothing of those that leave."""

    def tell(self, topic: str, member: Member, here: bool) -> None:
        if here:
            super().tell(topic, member, here)


class Immortal(LatePresence):
    """Never ends a lease."""

    def __init__(self, server: LatePresenceServer) -> None:
        super().__init__(server)
        self.ends = float("inf")


class Frail(LatePresence):
    """Does not renew."""

    def renew(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Sticky, presence.listed_until_left),
        (Hasty, presence.listed_until_left),
        (Numbered, presence.pages_are_complete),
        (Silent, presence.changes_are_told),
        (Immortal, presence.lease),
        (Frail, presence.lease),
    ],
)
async def test_check_fails_on_a_presence_that_breaks_its_promise(
    broken: type[LatePresence], check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.net.harness.TIMEOUT", 0.3)

    class Broken(Late):
        def presence(self) -> Presence:
            return broken(self.server)

    with pytest.raises((AssertionError, TimeoutError)):
        await check(Broken())


def test_each_presence_check_has_a_broken_presence() -> None:
    marks = test_check_fails_on_a_presence_that_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    assert {check for _, check in marks[0].args[1]} == {*CHECKS, *CHECKS_WITH_A_LEASE}
