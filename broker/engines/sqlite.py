"""The durable engine of one node: history in a SQLite file, written by a thread of its own.

The thread takes what has gathered, carries it out in one transaction, and commits (group commit); while the disk
writes, more gathers. The event loop delivers the events of a transaction, and answers their publishers, after the
commit. Topics without history do not pass through it: they are as local as with the memory engine.
"""

from __future__ import annotations

import asyncio
import sqlite3
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from broker._speedups import Keeper, PendingBatch
from broker.config import Limits
from broker.engines.base import (
    Deliver,
    DeliverBatch,
    Engine,
    EngineStats,
    Event,
    HistoryDone,
    InterestDone,
    LocateDone,
    Lost,
    Position,
    PositionDone,
    Presence,
    PublishDone,
    RefuseBatch,
    Unavailable,
)
from broker.engines.memory import MemoryEngine
from broker.engines.store import Durability, Store, StoreError, explain
from broker.retention import MAX_DEDUP_AGE
from broker.rules import Retention

log = structlog.get_logger(__name__)

MAX_WAITING: Final = 20_000
"""Calls that may wait for the thread. Beyond it they get Unavailable."""
MAX_WAITING_BYTES: Final = 64 * 2**20
"""The same for the data of their events."""
ANSWERING: Final = 0.004
"""Seconds of one turn of the loop in which results are delivered and answered."""
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
    is_read: bool = False
    """Whether it only reads, so that what writes need not fail with it."""


class Batch(msgspec.Struct, eq=False):
    """Publishes of the fast path, for one transaction."""

    batch: PendingBatch
    is_refused: bool = False
    """Whether some of them are, because of the totals."""
    error: Unavailable | None = None
    """Why none of them was kept."""


class SqliteEngine(Engine):
    """History in a file. `publish`, `history`, `position` and `locate` are answered by the thread."""

    def __init__(self, path: Path, limits: Limits | None = None, durability: Durability = "full") -> None:
        """Open the file. Raises StoreError where it cannot be used."""
        limits = limits or Limits()
        self._store = Store(path, limits, durability)
        self._local = MemoryEngine(limits)
        """For topics without history."""
        self._deliver: Deliver | None = None
        self._waiting: deque[Call | Batch] = deque()
        self._finished: deque[Call | Batch] = deque()
        """What the loop has to answer."""
        self._lock = threading.Lock()
        """Held while something is taken to be carried out, so that it is taken in its order."""
        self._deliver_batch: DeliverBatch | None = None
        self._refuse_batch: RefuseBatch | None = None
        self._under_way = 0
        self._bytes = 0
        self._wake = threading.Event()
        self._keeper = Keeper(self._wake.set, MAX_WAITING, MAX_WAITING_BYTES)
        self._stopping = False
        self._is_broken = False
        self._unreadable = ""
        """Why something could not be read, for the log: once."""
        self._longest_dedup = MAX_DEDUP_AGE if self._store.has_dedups() else 0.0
        self._thread = threading.Thread(target=self._run, name="sqlite", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.committing: Callable[[], None] | None = None
        """Called in the thread before each commit, for tests."""

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        await self._local.start(deliver, lost)
        for topic, dedup, age in self._store.plain_dedups(time.time()):
            self._local.remember_dedup(topic, dedup, age)
        self._thread.start()

    async def stop(self) -> None:
        """Commit what waits, and close the file."""
        self._stopping = True
        self._wake.set()
        if self._loop is not None:
            await self._loop.run_in_executor(None, self._thread.join)
            await asyncio.sleep(0)  # the answers of the thread were scheduled before it ended
            while self._finished:  # noqa: ASYNC110 -- a few turns of the loop
                await asyncio.sleep(0)
        self._deliver = None
        await self._local.stop()
        try:
            self._store.close()
        except StoreError as error:
            log.error("store not closed", path=str(self._store.path), problem=str(error))

    def configure(self, limits: Limits) -> None:
        self._local.configure(limits)
        self._store.limits = limits

    def is_local(self, topic: str, retention: Retention) -> bool:
        return not retention.events

    def stats(self) -> EngineStats:
        return EngineStats(self._store.topics, self._store.bytes, 0, self._local.stats().dedups)

    def presence(self) -> Presence:
        """The members of this process: they end with it."""
        return self._local.presence()

    def accept_batches(self, deliver: DeliverBatch, refuse: RefuseBatch) -> None:
        self._deliver_batch, self._refuse_batch = deliver, refuse

    def keeper(self, topic: str, retention: Retention) -> Keeper | None:
        """Events of compacted topics go one by one: each replaces another one."""
        return None if retention.compact or not retention.events or self._deliver_batch is None else self._keeper

    def publish(self, event: Event, retention: Retention, done: PublishDone) -> None:
        if not retention.events:
            self._local.publish(event, retention, done if event.dedup is None else self._noting(event, retention, done))
            return
        size = len(bytes(event.data))
        if self._bytes + self._keeper.waiting_bytes + size > MAX_WAITING_BYTES:
            done(Unavailable("too much waits for the disk"))
            return
        self._count_bytes(size)
        self._longest_dedup = max(self._longest_dedup, retention.dedup_age)

        def answer(result: Position | Unavailable) -> None:
            self._count_bytes(-size)
            done(result)

        self._ask(Call(lambda store: store.publish(event, retention), answer, event))

    def _count_bytes(self, size: int) -> None:
        """So much more waits; the fast path may have the rest."""
        self._bytes += size
        self._keeper.most_bytes = max(0, MAX_WAITING_BYTES - self._bytes)

    def _noting(self, event: Event, retention: Retention, done: PublishDone) -> PublishDone:
        """Give what has the `dedup` of an event written that is not kept, before its publisher is answered.

        The event was delivered by then, to keep the order of its topic. So if the disk does not obey, it is remembered
        in this process alone.
        """

        def note(position: Position | Unavailable) -> None:
            if isinstance(position, Unavailable) or position.duplicate:
                done(position)
                return
            self._longest_dedup = max(self._longest_dedup, retention.dedup_age)
            self._ask(Call(lambda store: store.publish(event, retention), lambda _: done(position)))

        return note

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        """Nothing to do: every event is delivered to the one node that there is."""
        done(None)

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        self._ask(Call(lambda store: store.history(topic, since, limit), done, is_read=True))

    def locate(self, topic: str, last: int, done: LocateDone) -> None:
        self._ask(Call(lambda store: store.locate(topic, last), done, is_read=True))

    def position(self, topic: str, done: PositionDone) -> None:
        self._ask(Call(lambda store: store.position(topic), done, is_read=True))

    def _ask(self, call: Call) -> None:
        if self._under_way + self._keeper.waiting >= MAX_WAITING:
            call.done(Unavailable("too much waits for the disk"))
        elif self._stopping:
            call.done(Unavailable("the broker is shutting down"))
        else:
            self._under_way += 1
            with self._lock:
                before = self._keeper.take()
                if before is not None:
                    self._waiting.append(Batch(before))
                self._waiting.append(call)
            self._wake.set()

    def _answer(self, work: list[Call | Batch]) -> None:
        """On the loop: the next transaction is done."""
        begun = bool(self._finished)
        self._finished += work
        if not begun:
            self._answer_some()

    def _answer_some(self) -> None:
        """Deliver the events of transactions, and answer, in their order and for a bounded time."""
        assert self._loop is not None
        until = time.perf_counter() + ANSWERING
        while self._finished:
            work = self._finished[0]
            try:
                is_done = self._answer_batch(work) if isinstance(work, Batch) else self._answer_call(work)
            except Exception:
                log.exception("delivery failed")
                is_done = not isinstance(work, Batch)
            if is_done:
                self._finished.popleft()
            if time.perf_counter() > until and self._finished:
                self._loop.call_soon(self._answer_some)
                return

    def _answer_call(self, call: Call) -> bool:
        self._under_way -= 1
        result, event = call.result, call.event
        try:
            if event is not None and isinstance(result, Position) and not result.duplicate and self._deliver:
                self._deliver(Event(event.topic, event.data, event.key, result.offset, event.token))
        finally:
            call.done(result)
        return True

    def _answer_batch(self, work: Batch) -> bool:
        """Whether all of it is answered now."""
        assert self._deliver_batch is not None
        assert self._refuse_batch is not None
        if work.error is None and not self._deliver_batch(work.batch):
            return False
        if work.error is not None or work.is_refused:
            self._refuse_batch(work.batch, work.error)
        self._keeper.done(work.batch)
        return True

    # The thread.

    def _take(self) -> Call | Batch | None:
        """Take what has waited longest."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            batch = self._keeper.take()
        return None if batch is None else Batch(batch)

    def _run(self) -> None:
        swept, left = time.monotonic(), False
        work: Call | Batch | None = None
        while True:
            self._wake.wait(0 if left or work is not None else SWEEP)
            self._wake.clear()
            while (work := self._take()) is not None:
                self._finish(self._transact(work))
                if time.monotonic() - swept >= SWEEP:
                    break  # also under load that never ends
            if left or time.monotonic() - swept >= SWEEP:
                swept, left = time.monotonic(), self._sweep()
            if self._stopping and work is None and not self._waiting:
                return

    def _transact(self, first: Call | Batch) -> list[Call | Batch]:
        """Carry out what has gathered. Either all that writes is durable, or all of it gets Unavailable."""
        done: list[Call | Batch] = []
        until = time.monotonic() + TRANSACTION
        work: Call | Batch | None = first
        try:
            self._store.begin(time.time())
            while work is not None:
                done.append(work)
                if isinstance(work, Call):
                    work.result = self._read(work) if work.is_read else work.work(self._store)
                else:
                    work.is_refused = self._store.publish_batch(work.batch)
                work = self._take() if time.monotonic() < until else None
            if self.committing is not None:
                self.committing()
            self._store.commit()
        except Exception as error:  # noqa: BLE001 -- whatever it is, the callers are told
            self._fail(error, done or [first])
            return done or [first]
        if self._is_broken:
            self._is_broken = False
            log.info("store works again", path=str(self._store.path))
        return done

    def _read(self, call: Call) -> Any:
        """Carry out a call that reads. A part of the file that is damaged is a matter of who reads it alone."""
        try:
            return call.work(self._store)
        except (sqlite3.DatabaseError, struct.error, UnicodeDecodeError) as error:
            if not self._store.db.in_transaction:
                raise  # SQLite has given up the transaction: nobody's publish is in it any more
            problem = explain(error) if isinstance(error, sqlite3.Error) else "a part of the file is damaged"
            if problem != self._unreadable:
                self._unreadable = problem
                log.error("history not read", path=str(self._store.path), problem=problem)
            return Unavailable(f"the history cannot be read: {problem}")

    def _fail(self, error: Exception, done: list[Call | Batch]) -> None:
        problem = explain(error) if isinstance(error, sqlite3.Error) else repr(error)
        if not self._is_broken:
            self._is_broken = True
            log.error("store failed", path=str(self._store.path), problem=problem)
        try:
            self._store.rollback()
        except sqlite3.Error:
            log.error("store not rolled back", path=str(self._store.path))
        for work in done:
            failed = Unavailable(f"the store failed: {problem}")
            if isinstance(work, Batch):
                work.error = failed
            else:
                work.result = failed

    def _finish(self, done: list[Call | Batch]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._answer, done)

    def _sweep(self) -> bool:
        """Drop some of what has grown too old. Returns whether there is more."""
        try:
            return self._store.sweep(time.time(), self._longest_dedup or MAX_DEDUP_AGE)
        except Exception as error:  # noqa: BLE001 -- the thread must go on
            self._fail(error, [])
            return False
