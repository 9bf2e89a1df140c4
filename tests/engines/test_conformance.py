"""Every engine keeps the promises of the port; and the checks notice an engine that does not."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from broker.engines.base import (
    Engine,
    Event,
    HistoryDone,
    HistoryPage,
    InterestDone,
    LocateDone,
    NoHistory,
    Position,
    PositionDone,
    PublishDone,
    Unavailable,
)
from broker.engines.memory import MemoryEngine
from broker.engines.sqlite import SqliteEngine
from broker.rules import Retention
from tests.engines import promises
from tests.engines.late import EPOCH, LateEngine, LateServer
from tests.engines.promises import CHECKS, CHECKS_WITH_A_SERVER, Check, Kind


class Memory(Kind):
    """The default engine without history: one node, nothing that could fail."""

    def engine(self) -> Engine:
        return MemoryEngine()


class MemoryWithHistory(Memory):
    """The same, and it keeps what is published."""

    keeps = True


class Sqlite(Kind):
    """The durable engine, with a file of its own."""

    keeps = True

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()

    def engine(self) -> Engine:
        return SqliteEngine(Path(self.folder.name) / "broker.db")

    def end(self) -> None:
        self.folder.cleanup()


class Late(Kind):
    """The double for an engine that is somewhere else."""

    most_nodes = 3
    may_fail = True
    bound = 100

    def __init__(self) -> None:
        self.server = LateServer(bound=2000)

    def engine(self) -> Engine:
        return LateEngine(self.server)

    def hang(self) -> None:
        self.server.bound = self.bound
        self.server.hang()

    def go_on(self) -> None:
        self.server.go_on()

    def cut(self, engine: Engine) -> None:
        assert isinstance(engine, LateEngine)
        engine.cut()

    def mend(self, engine: Engine) -> None:
        assert isinstance(engine, LateEngine)
        engine.mend()


class LateWithHistory(Late):
    """The same, and it keeps what is published."""

    keeps = True


KINDS: list[Callable[[], Kind]] = [Memory, MemoryWithHistory, Sqlite, Late, LateWithHistory]


@pytest.fixture(params=KINDS)
async def kind(request: pytest.FixtureRequest) -> AsyncIterator[Kind]:
    found = request.param()
    assert isinstance(found, Kind)
    yield found
    found.end()


@pytest.fixture(params=[kind for kind in KINDS if kind not in (Memory, MemoryWithHistory, Sqlite)])
async def kind_with_a_server(request: pytest.FixtureRequest) -> Kind:
    found = request.param()
    assert isinstance(found, Kind)
    assert found.may_fail
    return found


def named(check: Check | type) -> str:
    return str(getattr(check, "__name__", check))


@pytest.mark.parametrize("check", CHECKS, ids=named)
async def test_engine_keeps_the_promise(kind: Kind, check: Check) -> None:
    await check(kind)


@pytest.mark.parametrize("check", CHECKS_WITH_A_SERVER, ids=named)
async def test_engine_keeps_the_promise_during_failures(kind_with_a_server: Kind, check: Check) -> None:
    await check(kind_with_a_server)


# Engines that break a promise


class Reversed(LateEngine):
    """Delivers two events in the wrong order."""

    held: Event | None = None

    def deliver(self, event: Event) -> None:
        if self.held is None and bytes(event.data).endswith(b"50]"):
            self.held = event
            return
        super().deliver(event)
        if self.held is not None and self.held.topic == event.topic:
            super().deliver(self.held)
            self.held = Event("", b"")


class Doubling(LateEngine):
    """Delivers an event for each interest that matches."""

    def deliver(self, event: Event) -> None:
        for _ in self.interests:
            super().deliver(event)


class Deaf(LateEngine):
    """Forgets an interest as soon as another one ends."""

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        super().interest(filter, on, done)
        if not on:
            self.interests.clear()


class Anonymous(LateEngine):
    """Does not pass the token on, so that nobody finds the publish of an event."""

    def deliver(self, event: Event) -> None:
        super().deliver(msgspec.structs.replace(event, token=None))


class Keyless(LateEngine):
    """Loses the key on the way."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        super().publish(msgspec.structs.replace(event, key=None), retention, done)


class Hasty(LateEngine):
    """Says done before it delivers."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        done(Position())
        super().publish(event, retention, lambda result: None)


class Tardy(LateEngine):
    """Delivers an event of its own node some turns after its `done`."""

    def deliver(self, event: Event) -> None:
        asyncio.get_running_loop().call_later(0.02, super().deliver, event)


class Forgetful(LateEngine):
    """Answers only every second publish."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        super().publish(event, retention, done if self.published % 2 else lambda result: None)


class Repeating(LateEngine):
    """Says done twice."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        def twice(result: Position | Unavailable) -> None:
            done(result)
            done(result)

        super().publish(event, retention, twice)


class Careless(LateEngine):
    """Keeps an event only some time after `done`."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        top = self.server.tops.get(event.topic, 0) + len(self.under_way) + 1
        asyncio.get_running_loop().call_later(0.2, super().publish, event, retention, lambda result: None)
        done(Position(EPOCH, top))


class Hoarding(LateEngine):
    """Keeps everything, whatever the retention says."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        super().publish(event, Retention(events=1_000_000), done)


class Lying(LateEngine):
    """Says that it could not, and does."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        def lie(result: Position | Unavailable) -> None:
            done(Unavailable("no") if bytes(event.data) == b"1" else result)

        super().publish(event, retention, lie)


class Blocking(LateEngine):
    """Waits for the server inside a call."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        while self.server.hung:
            time.sleep(0.01)
        super().publish(event, retention, done)


class Boundless(LateEngine):
    """Lets any number of publishes wait."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        self.server.bound = 1_000_000
        super().publish(event, retention, done)


class Silent(LateEngine):
    """Says nothing of what it missed."""

    def mend(self) -> None:
        self.is_cut = False


class SilentAboutPatterns(LateEngine):
    """Says only of topics that it missed something."""

    def mend(self) -> None:
        patterns = [name for name in self.interests if "*" in name]
        kept = {name: self.interests.pop(name) for name in patterns}
        super().mend()
        self.interests |= kept


class Undead(LateEngine):
    """Goes on after its end."""

    async def stop(self) -> None:
        await asyncio.sleep(0)


class Impatient(LateEngine):
    """Ends without an answer to the calls that wait for one."""

    async def stop(self) -> None:
        self.under_way.clear()
        await super().stop()


class Eager(LateEngine):
    """Says that an interest is complete before it has any effect."""

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        done(None)
        asyncio.get_running_loop().call_later(0.05, super().interest, filter, on, lambda result: None)


class Mute(LateEngine):
    """Forgets to say that an interest is complete."""

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        super().interest(filter, on, lambda result: None)


class Stammering(LateEngine):
    """Says twice that an interest is complete."""

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        def twice(result: Unavailable | None) -> None:
            done(result)
            done(result)

        super().interest(filter, on, twice)


class Muddled(LateEngine):
    """Carries out the calls for one filter in another order than they came."""

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        super().interest(filter, on, done)
        self._asks.rotate(1)


class Stubborn(LateEngine):
    """Says that it could not begin an interest, and has begun it."""

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        if self.is_cut:
            self.interests[filter] = True
        super().interest(filter, on, done)


class Empty(LateEngine):
    """Keeps history, and does not give it out."""

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        done(NoHistory(topic))


class Rosy(LateEngine):
    """Says of every page that nothing is missing before it."""

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        def embellish(result: HistoryPage | NoHistory | Unavailable) -> None:
            page = isinstance(result, HistoryPage)
            done(msgspec.structs.replace(result, complete=True) if page else result)

        super().history(topic, since, limit, embellish)


class Curt(LateEngine):
    """Says of every page that it is the last."""

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        def cut_short(result: HistoryPage | NoHistory | Unavailable) -> None:
            page = isinstance(result, HistoryPage)
            done(msgspec.structs.replace(result, more=False) if page else result)

        super().history(topic, since, limit, cut_short)


class Stale(LateEngine):
    """Remembers the first position that it was asked for."""

    known: Position | Unavailable | None = None

    def position(self, topic: str, done: PositionDone) -> None:
        def remember(result: Position | Unavailable) -> None:
            self.known = self.known or (result if result != Position() else None)
            done(self.known or result)

        super().position(topic, remember)


class Misplacing(LateEngine):
    """Finds the beginning of the newest events one too late."""

    def locate(self, topic: str, last: int, done: LocateDone) -> None:
        def late(result: tuple[Position, Position] | Unavailable) -> None:
            if not isinstance(result, Unavailable):
                result = Position(EPOCH, (result[0].offset or 0) + 1), result[1]
            done(result)

        super().locate(topic, last, late)


class Uncompacted(LateEngine):
    """Keeps older events of a key."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        super().publish(event, msgspec.structs.replace(retention, compact=False), done)


class Echoing(LateEngine):
    """Publishes again what is repeated."""

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        super().publish(msgspec.structs.replace(event, dedup=None), retention, done)


@pytest.mark.parametrize(
    ("engine", "check"),
    [
        (Reversed, promises.order),
        (Doubling, promises.once),
        (Deaf, promises.once),
        (Anonymous, promises.equal),
        (Keyless, promises.equal),
        (Forgetful, promises.done_once),
        (Repeating, promises.done_once),
        (Careless, promises.done_means_kept),
        (Hoarding, promises.done_means_kept),
        (Lying, promises.refused_means_nothing),
        (Hasty, promises.delivered_before_done),
        (Tardy, promises.delivered_before_done),
        (Blocking, promises.never_blocks),
        (Boundless, promises.bounded),
        (Silent, promises.no_silent_loss),
        (SilentAboutPatterns, promises.no_silent_loss),
        (Undead, promises.ends),
        (Impatient, promises.ends),
        (Impatient, promises.ends_although_the_server_hangs),
        (Eager, promises.interest_is_complete),
        (Mute, promises.interest_is_complete),
        (Stammering, promises.interest_is_complete),
        (Muddled, promises.interest_is_complete),
        (Stubborn, promises.refused_interest_changes_nothing),
        (Empty, promises.history),
        (Rosy, promises.history),
        (Curt, promises.history),
        (Stale, promises.position),
        (Misplacing, promises.locate),
        (Uncompacted, promises.compacted),
        (Echoing, promises.idempotent),
    ],
    ids=named,
)
async def test_check_fails_on_an_engine_that_breaks_its_promise(
    engine: type[LateEngine], check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.net.harness.TIMEOUT", 0.3)
    monkeypatch.setattr(promises, "PATIENCE", 1.0)  # some cannot be stopped either

    class Broken(LateWithHistory):
        def engine(self) -> Engine:
            return engine(self.server)

    with pytest.raises((AssertionError, TimeoutError)):
        await check(Broken())


def test_each_check_has_an_engine_that_breaks_its_promise() -> None:
    marks = test_check_fails_on_an_engine_that_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    noticed = {check for _, check in marks[0].args[1]}
    assert noticed == {*CHECKS, *CHECKS_WITH_A_SERVER}
