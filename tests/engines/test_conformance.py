"""Every engine keeps the promises of the port; and the checks notice an engine that does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from broker.engines.base import Done, Engine, Event, HistoryDone, NoHistory, Position, Unavailable
from broker.engines.memory import MemoryEngine
from tests.engines import promises
from tests.engines.late import LateEngine, LateServer
from tests.engines.promises import CHECKS, CHECKS_WITH_A_SERVER, Check, Kind


class Memory(Kind):
    """The default engine: one node, nothing kept, nothing that could fail."""

    def engine(self) -> Engine:
        return MemoryEngine()


class Late(Kind):
    """The double for an engine that is somewhere else."""

    most_nodes = 3
    may_fail = True
    bound = 100

    def __init__(self) -> None:
        self.server = LateServer(keeps=self.keeps, bound=2000)

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


KINDS: list[Callable[[], Kind]] = [Memory, Late, LateWithHistory]


@pytest.fixture(params=KINDS)
async def kind(request: pytest.FixtureRequest) -> Kind:
    found = request.param()
    assert isinstance(found, Kind)
    return found


@pytest.fixture(params=[kind for kind in KINDS if kind is not Memory])
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

    def interest(self, topic: str, on: bool) -> None:
        super().interest(topic, on)
        if not on:
            self.interests.clear()


class Telling(LateEngine):
    """Delivers the event of another node as if it were its own."""

    def deliver(self, event: Event) -> None:
        event.origin = self.server
        super().deliver(event)


class Copying(LateEngine):
    """Delivers a copy to its own node, so that nobody finds the receipt."""

    def deliver(self, event: Event) -> None:
        super().deliver(Event(event.topic, event.data, event.key, event.offset, event.origin))


class Hasty(LateEngine):
    """Says done before it delivers."""

    def publish(self, event: Event, done: Done) -> None:
        done(Position())
        super().publish(event, lambda result: None)


class Forgetful(LateEngine):
    """Answers only every second publish."""

    def publish(self, event: Event, done: Done) -> None:
        super().publish(event, done if self.published % 2 else lambda result: None)


class Repeating(LateEngine):
    """Says done twice."""

    def publish(self, event: Event, done: Done) -> None:
        def twice(result: Position | Unavailable) -> None:
            done(result)
            done(result)

        super().publish(event, twice)


class Lying(LateEngine):
    """Says that it could not, and does."""

    def publish(self, event: Event, done: Done) -> None:
        def lie(result: Position | Unavailable) -> None:
            done(Unavailable("no") if bytes(event.data) == b"1" else result)

        super().publish(event, lie)


class Boundless(LateEngine):
    """Lets any number of publishes wait."""

    def publish(self, event: Event, done: Done) -> None:
        self.server.bound = 1_000_000
        super().publish(event, done)


class Silent(LateEngine):
    """Says nothing of what it missed."""

    def mend(self) -> None:
        self._cut = False


class Undead(LateEngine):
    """Goes on after its end."""

    async def stop(self) -> None:
        await asyncio.sleep(0)


class Impatient(LateEngine):
    """Ends without an answer for those who wait for one."""

    async def stop(self) -> None:
        self._under_way.clear()
        await super().stop()


class Empty(LateEngine):
    """Keeps history, and does not give it out."""

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        done(NoHistory(topic))


@pytest.mark.parametrize(
    ("engine", "check"),
    [
        (Reversed, promises.order),
        (Doubling, promises.once),
        (Deaf, promises.once),
        (Telling, promises.unchanged),
        (Copying, promises.unchanged),
        (Hasty, promises.delivered_then_done),
        (Forgetful, promises.done_once),
        (Repeating, promises.done_once),
        (Lying, promises.refused_means_nothing),
        (Boundless, promises.never_blocks),
        (Silent, promises.no_silent_loss),
        (Undead, promises.ends),
        (Impatient, promises.ends),
        (Impatient, promises.ends_although_the_server_hangs),
        (Empty, promises.history),
    ],
    ids=named,
)
async def test_check_fails_on_an_engine_that_breaks_its_promise(
    engine: type[LateEngine], check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.net.harness.TIMEOUT", 0.3)

    class Broken(LateWithHistory):
        def engine(self) -> Engine:
            return engine(self.server)

    with pytest.raises((AssertionError, TimeoutError)):
        await check(Broken())


def test_each_check_has_an_engine_that_breaks_its_promise() -> None:
    marks = test_check_fails_on_an_engine_that_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    noticed = {check for _, check in marks[0].args[1]}
    assert noticed == {*CHECKS, *CHECKS_WITH_A_SERVER}
