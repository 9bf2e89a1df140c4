"""Members of topics: who is subscribed, and who is told when somebody joins or leaves.

A session that subscribes to a topic with presence is a member of it. An *observer* is a subscription that asked for
`join` and `leave`. Changes of a topic with observers are numbered, and the newest one of each session is kept until
every observer has got it. Each observer has a cursor: the number of the last change that it was sent. The changes are
sent from time to time, so that a storm of reconnections is sent in few large writes, each encoded once.

Invariant: the changes of one session reach an observer in their order. An observer that does not read costs its cursor.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import msgspec

from broker import messages
from broker._speedups import frame
from broker.engines.base import Member, MemberPage, Presence, Unavailable
from broker.errors import CloseCode, CommandError
from broker.identities import check_right
from broker.rules import Rules
from broker.session import Done, Session
from broker.topics import check_topic, is_pattern

MAX_INFO: Final = 1024
"""Bytes of the `info` of a member."""
MIN_PAUSE: Final = 0.02
"""Seconds between two times at which changes are sent, at the least."""
SHARE: Final = 0.2
"""Part of the time of the loop in which changes may be sent, at the most."""
SLICE: Final = 0.002
"""Seconds of one turn of the loop in which they are sent."""
RETRY: Final = 0.25
"""Seconds after which an observer is tried again that did not read."""
WRITE: Final = 65_536
"""Bytes of changes that one observer is sent at once, but one change at least."""
MAX_KEPT: Final = 65_536
"""Changes of one topic that are kept for observers that do not read. Beyond it those observers are closed."""


class Change(msgspec.Struct, gc=False):
    """The newest change of one session."""

    number: int
    born: int
    """The number of its join, where no observer knew of the session before that; else 0."""
    member: Member
    here: bool
    """Whether it is there now."""


class Watched(msgspec.Struct, eq=False):
    """A topic with observers."""

    newest: int = 0
    """The number of the newest change."""
    changes: dict[str, Change] = {}
    """Those that not every observer has got, by session, in the order of their numbers."""
    observers: dict[Session, int] = {}
    """The cursor of each."""
    refused: bool = False
    """Whether an observer did not read when changes were sent last."""


class Members:
    """The members of one node, and its observers of all members. `rules` gives the topic rules of now."""

    def __init__(self, port: Presence, rules: Callable[[], Rules], loop: asyncio.AbstractEventLoop) -> None:
        self.count = 0
        """Members on this node."""
        self._port = port
        self._rules = rules
        self._loop = loop
        self._watched: dict[str, Watched] = {}
        self._timer: asyncio.Handle | None = None
        self._renewal: asyncio.Handle | None = None
        self._pass: Iterator[None] | None = None
        """The sending that is under way."""
        self._spent = 0.0
        """Seconds that it has taken so far."""
        self._dirty: dict[str, None] = {}
        """The topics with changes that were not sent."""

    def start(self) -> None:
        """Begin to be told of changes, and to renew the lease."""
        self._port.start(self._changed)
        self._renew()

    def stop(self) -> None:
        """Send nothing any more."""
        for handle in (self._timer, self._renewal):
            if handle is not None:
                handle.cancel()
        self._watched.clear()
        self._dirty.clear()
        self._pass = None

    # The use cases. Each raises CommandError where it refuses a command.

    def check(self, session: Session, command: messages.Subscribe) -> None:
        """Raise CommandError if a subscription may not have what it asks for by `presence` or `info`."""
        name = "info" if command.presence is None else "presence"
        if is_pattern(command.topic):
            raise messages.BadCommand("bad_command", f"`{name}` needs a topic, and `{command.topic}` is a pattern")
        if not self._rules().presence(command.topic):
            raise _no_presence(command.topic)
        if command.presence:
            check_right(session.rights, "presence", command.topic)
        if command.info is not None and len(bytes(command.info)) > MAX_INFO:
            raise CommandError("limit", f"`info` may have at most {MAX_INFO} bytes")

    def join(self, session: Session, command: messages.Subscribe, done: Callable[[Unavailable | None], None]) -> None:
        """List a session as a member of a topic that it subscribes to, if the topic has presence."""
        topic = command.topic
        if is_pattern(topic) or not self._rules().presence(topic):
            done(None)
            return
        known = (session.memberships or {}).get(topic)
        info = bytes(command.info) if command.info is not None else None if known is None else known.info
        member = Member(session.id, None if session.identity is None else session.identity.name, info)
        if member == known:
            self._joined(session, command, done, None)
            return
        if session.memberships is None:
            session.memberships = {}
        session.memberships[topic] = member
        self.count += known is None
        self._port.join(topic, member, partial(self._joined, session, command, done))

    def leave(self, session: Session, topic: str) -> None:
        """A session is not subscribed to a topic any more."""
        if session.memberships is None or session.memberships.pop(topic, None) is None:
            return
        self.count -= 1
        self._unwatch(session, topic)
        self._port.leave(topic, session.id, _ignore)

    def leave_all(self, session: Session) -> None:
        """A session is closed."""
        for topic in list(session.memberships or ()):
            self.leave(session, topic)

    def is_observer(self, session: Session, topic: str) -> bool:
        """Whether a session is told of changes of a topic."""
        watched = self._watched.get(topic)
        return watched is not None and session in watched.observers

    def update(self, session: Session) -> None:
        """A session has another identity."""
        name = None if session.identity is None else session.identity.name
        for topic, member in list((session.memberships or {}).items()):
            if member.identity != name and session.memberships is not None:
                renamed = session.memberships[topic] = msgspec.structs.replace(member, identity=name)
                self._port.join(topic, renamed, _ignore)

    def read(self, session: Session, topic: str, cursor: str | None, limit: int, done: Done[MemberPage]) -> None:
        """Read the members of a topic, from a cursor on, as many as fit into a message."""
        check_topic(topic)
        check_right(session.rights, "presence", topic)
        if not self._rules().presence(topic):
            raise _no_presence(topic)
        room = session.node.limits.max_size

        def answer(result: MemberPage | Unavailable) -> None:
            nonlocal limit
            if isinstance(result, Unavailable):
                done(CommandError("unavailable", result.message))
            elif len(result.members) > 1 and _size(result) > room:
                limit = len(result.members) // 2
                self._port.members(topic, cursor, limit, answer)
            else:
                done(result)

        self._port.members(topic, cursor, limit, answer)

    # Details.

    def _joined(
        self,
        session: Session,
        command: messages.Subscribe,
        done: Callable[[Unavailable | None], None],
        result: Unavailable | None,
    ) -> None:
        topic = command.topic
        is_member = topic in (session.memberships or {})
        if result is None and is_member and command.presence is not None:
            if command.presence:
                watched = self._watched.setdefault(topic, Watched())
                watched.observers.setdefault(session, watched.newest)
            else:
                self._unwatch(session, topic)
        done(result)

    def _unwatch(self, session: Session, topic: str) -> None:
        watched = self._watched.get(topic)
        if watched is not None and watched.observers.pop(session, None) is not None and not watched.observers:
            del self._watched[topic]
            self._dirty.pop(topic, None)

    def _renew(self) -> None:
        if self._port.lease is not None:
            self._port.renew()
            self._renewal = self._loop.call_later(self._port.lease / 3, self._renew)

    def _changed(self, topic: str, member: Member, here: bool) -> None:
        """A member has joined, was replaced or has left (the port calls this)."""
        watched = self._watched.get(topic)
        if watched is None:
            return
        watched.newest += 1
        before = watched.changes.pop(member.session, None)
        born = before.born if before is not None else watched.newest if here else 0
        watched.changes[member.session] = Change(watched.newest, born, member, here)
        self._dirty[topic] = None
        if self._timer is None and self._pass is None:
            self._timer = self._loop.call_later(MIN_PAUSE, self._begin_pass)

    # Sending.

    def _begin_pass(self) -> None:
        self._spent = 0.0
        self._pass = self._send_all()
        self._go_on()

    def _go_on(self) -> None:
        """Send more of the changes, for a bounded time."""
        began = time.perf_counter()
        sending, self._pass, self._timer = self._pass, None, None
        if sending is not None and self._send_for(sending, began + SLICE):
            self._pass = sending
            self._timer = self._loop.call_soon(self._go_on)
        self._spent += time.perf_counter() - began
        if self._pass is None and self._dirty:
            refused = all(watched.refused for topic in self._dirty if (watched := self._watched.get(topic)) is not None)
            pause = max(RETRY if refused else MIN_PAUSE, self._spent * (1 - SHARE) / SHARE)
            self._timer = self._loop.call_later(pause, self._begin_pass)

    @staticmethod
    def _send_for(sending: Iterator[None], until: float) -> bool:
        """Take steps until a time. Whether there may be more."""
        return any(time.perf_counter() > until for _ in sending)

    def _send_all(self) -> Iterator[None]:
        """Send the changes of every topic to its observers, a step for each observer."""
        topics, self._dirty = self._dirty, {}
        for topic in topics:
            watched = self._watched.get(topic)
            if watched is not None:
                yield from self._send(topic, watched)

    def _send(self, topic: str, watched: Watched) -> Iterator[None]:
        changes = Pieces(topic, list(watched.changes.values()))
        watched.refused = False
        oldest = changes.newest
        for session in list(watched.observers):
            cursor = watched.observers.get(session)
            if cursor is None:
                continue
            if cursor < changes.newest:
                reached, frames = changes.after(cursor, session.id)
                if not frames or session.connection.queue_frames(frames):
                    cursor = watched.observers[session] = reached
                else:
                    watched.refused = True
                    if len(changes) > MAX_KEPT:
                        session.connection.close(CloseCode.NOT_READING, CloseCode.NOT_READING.reason)
                yield
            oldest = min(oldest, cursor)
        for change in changes:
            if change.number > oldest:
                break
            if watched.changes.get(change.member.session) is change:
                del watched.changes[change.member.session]
        if watched.changes and watched is self._watched.get(topic):
            self._dirty[topic] = None


class Pieces:
    """The changes of a topic at one moment, as frames: those behind a cursor are encoded once for all who are there."""

    def __init__(self, topic: str, changes: list[Change]) -> None:
        self._topic = topic
        self._changes = changes
        self._numbers = [change.number for change in changes]
        self._sessions = {change.member.session for change in changes}
        self._frames: dict[int, bytes] = {}
        self._known: dict[int, tuple[int, bytes]] = {}
        self.newest = self._numbers[-1] if changes else 0

    def __len__(self) -> int:
        return len(self._changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self._changes)

    def after(self, cursor: int, session: str) -> tuple[int, bytes]:
        """Give the frames of the changes behind a cursor, without those of one session, and how far they reach."""
        if session in self._sessions:
            return self._join(cursor, session)
        if cursor not in self._known:
            self._known[cursor] = self._join(cursor)
        return self._known[cursor]

    def _join(self, cursor: int, without: str | None = None) -> tuple[int, bytes]:
        frames: list[bytes] = []
        size = 0
        for place in range(bisect_right(self._numbers, cursor), len(self._changes)):
            change = self._changes[place]
            if change.member.session == without or (not change.here and change.born > cursor):
                continue  # that it came was never told
            encoded = self._frame(place)
            size += len(encoded)
            if frames and size > WRITE:
                return self._numbers[place - 1], b"".join(frames)
            frames.append(encoded)
        return self.newest, b"".join(frames)

    def _frame(self, place: int) -> bytes:
        encoded = self._frames.get(place)
        if encoded is None:
            change = self._changes[place]
            member = change.member
            encode = messages.encode_join if change.here else messages.encode_leave
            encoded = frame(TEXT, encode(self._topic, member.session, member.identity, member.info))
            self._frames[place] = encoded
        return encoded


TEXT: Final = 1
"""The opcode of a text message (RFC 6455, section 5.2)."""
MEMBER_COST: Final = 64
"""Bytes of a member in an answer, beside its names and its `info`."""


def _size(page: MemberPage) -> int:
    return sum(
        MEMBER_COST + len(each.session) + 4 * len(each.identity or "") + len(each.info or b"") for each in page.members
    )


def _no_presence(topic: str) -> CommandError:
    return CommandError("no_presence", f"`{topic}` has no presence")


def _ignore(result: Unavailable | None) -> None:
    """A member that the port could not list, or take from the list, is gone with the lease."""
