"""The durable engine of one node: history in a SQLite file, written by a thread of its own.

The thread takes what has gathered, carries it out in one transaction, and commits (group commit); while the disk
writes, more gathers. The event loop delivers the events of a transaction, and answers their publishers, after the
commit. Topics without history do not pass through it: they are as local as with the memory engine.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from broker.config import Limits
from broker.engines.base import (
    Deliver,
    Engine,
    EngineStats,
    Event,
    HistoryDone,
    InterestDone,
    LocateDone,
    Lost,
    Position,
    PositionDone,
    PublishDone,
    Unavailable,
)
from broker.engines.memory import MemoryEngine
from broker.engines.store import Durability, Store, explain
from broker.rules import Retention

log = structlog.get_logger(__name__)

MAX_WAITING: Final = 20_000
"""Calls that may wait for the thread. Beyond it they get Unavailable."""
MAX_WAITING_BYTES: Final = 64 * 2**20
"""The same for the data of their events."""
TRANSACTION: Final = 0.005
"""Seconds after which a transaction takes no more calls."""
SWEEP: Final = 5.0
"""Seconds between two looks for what has grown too old."""


class Call(msgspec.Struct, eq=False):
    """Something that the thread does for the loop."""

    work: Callable[[Store], Any]
    done: Callable[[Any], None]
    event: Event | None = None
    """Of a publish."""
    result: Any = None


class SqliteEngine(Engine):
    """History in a file. `publish`, `history`, `position` and `locate` are answered by the thread."""

    def __init__(self, path: Path, limits: Limits | None = None, durability: Durability = "full") -> None:
        """Open the file. Raises StoreError where it cannot be used."""
        limits = limits or Limits()
        self._store = Store(path, limits, durability)
        self._local = MemoryEngine(limits)
        """For topics without history."""
        self._deliver: Deliver | None = None
        self._waiting: deque[Call] = deque()
        self._under_way = 0
        self._bytes = 0
        self._wake = threading.Event()
        self._stopping = False
        self._is_broken = False
        self._longest_dedup = 0.0
        self._thread = threading.Thread(target=self._run, name="sqlite", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.committing: Callable[[], None] | None = None
        """Called in the thread before each commit, for tests."""

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        await self._local.start(deliver, lost)
        self._thread.start()

    async def stop(self) -> None:
        """Commit what waits, and close the file."""
        self._stopping = True
        self._wake.set()
        if self._loop is not None:
            await self._loop.run_in_executor(None, self._thread.join)
            await asyncio.sleep(0)  # the answers of the thread were scheduled before it ended
        self._deliver = None
        await self._local.stop()
        self._store.close()

    def configure(self, limits: Limits) -> None:
        self._local.configure(limits)
        self._store.limits = limits

    def is_local(self, topic: str, retention: Retention) -> bool:
        return not retention.events

    def stats(self) -> EngineStats:
        return EngineStats(self._store.topics, self._store.bytes, 0, self._local.stats().dedups)

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        if not retention.events:
            self._local.publish(event, retention, done)
            return
        size = len(bytes(event.data))
        if self._bytes + size > MAX_WAITING_BYTES:
            done(Unavailable("too much waits for the disk"))
            return
        self._bytes += size
        self._longest_dedup = max(self._longest_dedup, retention.dedup_age)

        def answer(result: Position | Unavailable) -> None:
            self._bytes -= size
            done(result)

        self._ask(Call(lambda store: store.publish(event, retention, time.time()), answer, event))

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        """Nothing to do: every event is delivered to the one node that there is."""
        done(None)

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        self._ask(Call(lambda store: store.history(topic, since, limit), done))

    def locate(self, topic: str, last: int, done: LocateDone) -> None:
        self._ask(Call(lambda store: store.locate(topic, last), done))

    def position(self, topic: str, done: PositionDone) -> None:
        self._ask(Call(lambda store: store.position(topic), done))

    def _ask(self, call: Call) -> None:
        if self._under_way >= MAX_WAITING:
            call.done(Unavailable("too much waits for the disk"))
        elif self._stopping:
            call.done(Unavailable("the broker is shutting down"))
        else:
            self._under_way += 1
            self._waiting.append(call)
            self._wake.set()

    def _answer(self, calls: list[Call]) -> None:
        """On the loop: deliver the events of a transaction, and answer."""
        self._under_way -= len(calls)
        for call in calls:
            result, event = call.result, call.event
            if event is not None and isinstance(result, Position) and not result.duplicate and self._deliver:
                self._deliver(Event(event.topic, event.data, event.key, result.offset, event.token))
            call.done(result)

    # The thread.

    def _run(self) -> None:
        swept = time.monotonic()
        while True:
            self._wake.wait(SWEEP)
            self._wake.clear()
            while self._waiting:
                self._finish(self._transact())
            if time.monotonic() - swept >= SWEEP:
                swept = time.monotonic()
                self._sweep()
            if self._stopping and not self._waiting:
                return

    def _transact(self) -> list[Call]:
        """Carry out what has gathered. Either all that writes is durable, or all of it gets Unavailable."""
        calls: list[Call] = []
        until = time.monotonic() + TRANSACTION
        try:
            self._store.begin()
            while self._waiting and (not calls or time.monotonic() < until):
                call = self._waiting.popleft()
                calls.append(call)
                call.result = call.work(self._store)
            if self.committing is not None:
                self.committing()
            self._store.commit()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the callers are told
            self._fail(error, calls)
        else:
            if self._is_broken:
                self._is_broken = False
                log.info("store works again", path=str(self._store.path))
        return calls

    def _fail(self, error: Exception, calls: list[Call]) -> None:
        problem = explain(error) if isinstance(error, sqlite3.Error) else repr(error)
        if not self._is_broken:
            self._is_broken = True
            log.error("store failed", path=str(self._store.path), problem=problem)
        try:
            self._store.rollback()
        except sqlite3.Error:
            log.error("store not rolled back", path=str(self._store.path))
        if not calls and self._waiting:
            calls.append(self._waiting.popleft())  # the transaction did not even begin
        for call in calls:
            call.result = Unavailable(f"the store failed: {problem}")

    def _finish(self, calls: list[Call]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._answer, calls)

    def _sweep(self) -> None:
        try:
            self._store.sweep(time.time(), self._longest_dedup or 86_400.0)
        except Exception as error:  # noqa: BLE001 -- the thread must go on
            self._fail(error, [])
