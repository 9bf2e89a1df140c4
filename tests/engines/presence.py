"""The promises of the presence port, each as a check that takes a kind of presence and fails where it is not kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from broker.engines.base import Member, MemberPage, Presence
from tests.net.harness import until


class PresenceKind(ABC):
    """A kind of presence, as the checks see it."""

    most_nodes: int = 1
    """How many nodes can share one server; more are not asked for."""

    @abstractmethod
    def presence(self) -> Presence:
        """The presence of one more node."""

    def pass_time(self, seconds: float) -> None:
        """Let the lease run."""
        raise NotImplementedError

    def nodes(self) -> list[Presence]:
        return [self.presence() for _ in range(min(2, self.most_nodes))]


async def join(node: Presence, topic: str, *members: Member) -> None:
    """Join all, and wait for the answers."""
    answers: list[object] = []
    for member in members:
        node.join(topic, member, answers.append)
    await until(lambda: len(answers) >= len(members))
    assert answers == [None] * len(members)


async def leave(node: Presence, topic: str, session: str) -> None:
    """Leave, and wait for the answer."""
    answers: list[object] = []
    node.leave(topic, session, answers.append)
    await until(lambda: len(answers) >= 1)
    assert answers == [None]


async def page(node: Presence, topic: str, cursor: str | None = None, limit: int = 1000) -> MemberPage:
    """Read one page."""
    answers: list[object] = []
    node.members(topic, cursor, limit, answers.append)
    await until(lambda: len(answers) >= 1)
    [found] = answers
    assert isinstance(found, MemberPage)
    return found


async def listed_until_left(kind: PresenceKind) -> None:
    """1. A member is listed on every node until it leaves; joining again replaces it."""
    nodes = kind.nodes()
    ann, bob = Member("s1", "ann", b'{"x":1}'), Member("s2")
    await join(nodes[0], "a", ann)
    await join(nodes[-1], "a", bob)
    await join(nodes[0], "b", ann)
    for node in nodes:
        assert await page(node, "a") == MemberPage([ann, bob], 2, None)
        assert await page(node, "b") == MemberPage([ann], 1, None)
        assert await page(node, "never") == MemberPage([], 0, None)
    renamed = Member("s1", "ann", b"2")
    await join(nodes[0], "a", renamed)
    assert (await page(nodes[-1], "a")).members == [renamed, bob]
    await leave(nodes[0], "a", "s1")
    await leave(nodes[0], "a", "s1")  # it need not be there
    for node in nodes:
        assert (await page(node, "a")).members == [bob]
        assert (await page(node, "b")).members == [ann]


async def pages_are_complete(kind: PresenceKind) -> None:
    """2. A member that is there all the time is on exactly one page, whoever else comes and goes meanwhile."""
    nodes = kind.nodes()
    staying = [Member(f"s{n:03}") for n in range(0, 100, 2)]
    await join(nodes[0], "a", *staying)
    sessions: list[str] = []
    cursor = None
    for turn in range(100):
        found = await page(nodes[-1], "a", cursor, 7)
        assert len(found.members) <= 7
        sessions += [member.session for member in found.members]
        cursor = found.cursor
        if cursor is None:
            break
        await join(nodes[0], "a", Member(f"s{2 * turn + 1:03}"), Member(f"s{99 - 2 * turn:03}"))
        await leave(nodes[0], "a", f"s{2 * turn + 1:03}")
    assert cursor is None
    assert len(set(sessions)) == len(sessions)
    assert {member.session for member in staying} <= set(sessions)
    exact = await page(nodes[0], "b", None, 1)
    assert exact.cursor is None
    await join(nodes[0], "b", Member("s1"), Member("s2"))
    assert (await page(nodes[0], "b", None, 2)).cursor is None
    assert (await page(nodes[0], "b", None, 1)).count == 2


async def changes_are_told(kind: PresenceKind) -> None:
    """4. Every node is told who joined, was replaced or left, in order, and the one that asked before `done`."""
    told: list[list[object]] = []
    nodes = [kind.presence() for _ in range(min(2, kind.most_nodes))]
    for node in nodes:
        heard: list[object] = []
        node.start(lambda topic, member, here, heard=heard: heard.append((topic, member, here)))  # type: ignore[misc]
        told.append(heard)
    ann, renamed = Member("s1", "ann"), Member("s1", "ann", b"1")
    nodes[0].join("a", ann, told[0].append)
    nodes[0].join("a", renamed, told[0].append)
    nodes[0].leave("a", "s1", told[0].append)
    nodes[0].leave("a", "s1", told[0].append)  # it is gone: nothing to tell
    await until(lambda: len(told[0]) >= 7)
    changes = [("a", ann, True), ("a", renamed, True), ("a", renamed, False)]
    assert told[0] == [changes[0], None, changes[1], None, changes[2], None, None]
    for heard in told[1:]:
        await until(lambda heard=heard: len(heard) >= 3)  # type: ignore[misc]
        assert heard == changes


async def lease(kind: PresenceKind) -> None:
    """3. The members of a node that does not renew go away with its lease, and no others."""
    alive, dead = kind.nodes()
    assert alive.lease is not None
    await join(alive, "a", Member("s1"))
    await join(dead, "a", Member("s2"))
    for _ in range(4):
        kind.pass_time(alive.lease / 3)
        alive.renew()
    assert (await page(alive, "a")) == MemberPage([Member("s1")], 1, None)
    # A node that comes back renews and joins again.
    dead.renew()
    await join(dead, "a", Member("s2"))
    kind.pass_time(alive.lease / 3)
    assert (await page(alive, "a")).count == 2


Check = Callable[[PresenceKind], Awaitable[None]]

CHECKS: list[Check] = [listed_until_left, pages_are_complete, changes_are_told]
"""Those that every presence must pass."""
CHECKS_WITH_A_LEASE: list[Check] = [lease]
"""Those for a presence that several nodes share."""
