"""The file of the SQLite engine: its schema, and what one transaction does. It belongs to one thread.

Every topic with history has a row with its numbering: `epoch`, `top` (the newest offset), `floor` (up to which offset
events may be missing that no newer one superseded). Rows of topics that are written in a transaction are held in memory
until it ends, so that a topic costs one update however many events it got.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from broker.config import Limits
from broker.engines.base import Event, HistoryPage, NoHistory, Position, Unavailable
from broker.rules import Retention

VERSION: Final = 1
"""Of the schema, in `PRAGMA user_version`. A file of a newer one is not opened."""
SAME_BOOT: Final = 1.0
"""Seconds by which the start of the machine may be reckoned differently each time. If its clock is set by more, it
looks as if it had gone down: then a numbering begins anew without need."""
MAX_CACHED: Final = 10_000
"""Topics whose rows are held in memory."""
Durability = Literal["full", "normal"]

SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL, top INTEGER NOT NULL,
    floor INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL,
    age REAL, tombstone_age REAL, compact INTEGER NOT NULL
);
CREATE TABLE events (
    topic INTEGER NOT NULL, offset INTEGER NOT NULL, published REAL NOT NULL, size INTEGER NOT NULL, key TEXT,
    data BLOB NOT NULL,
    PRIMARY KEY (topic, offset)
) WITHOUT ROWID;
CREATE TABLE keys (
    topic INTEGER NOT NULL, key TEXT NOT NULL, offset INTEGER NOT NULL, PRIMARY KEY (topic, key)
) WITHOUT ROWID;
CREATE TABLE dedups (
    topic TEXT NOT NULL, dedup TEXT NOT NULL, published REAL NOT NULL, epoch TEXT NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (topic, dedup)
) WITHOUT ROWID;
CREATE INDEX dedups_by_time ON dedups (published);
"""


class StoreError(Exception):
    """The file cannot be used. The message says why, and what to do."""


class Topic(msgspec.Struct, array_like=True):
    """The row of one topic, as the transaction under way has it."""

    id: int
    name: str
    epoch: str
    top: int
    floor: int
    count: int
    bytes: int
    age: float | None
    tombstone_age: float
    compact: bool
    events: int = 0
    """How many events its rule keeps; 0: not published to since it was read."""
    max_bytes: int | None = None
    counted: int = 0
    """What of `bytes` is in `Store.bytes`."""


class Store:
    """An open file. Every method but `close` raises sqlite3.Error where the file does not obey."""

    def __init__(self, path: Path, limits: Limits, durability: Durability = "full") -> None:
        """Open the file, or make it, for this process alone. Raises StoreError."""
        self.path = path
        self.durability = durability
        self.limits = limits
        self.topics = 0
        """Those that have a row."""
        self.bytes = 0
        """Of the data and keys of all kept events."""
        self._topics: dict[str, Topic] = {}
        self._changed: dict[str, Topic] = {}
        self._added = 0
        """Topics that the transaction under way has made."""
        self._rows: list[tuple[int, int, float, int, str | None, bytes]] = []
        self._lock = _lock(path)
        try:
            self.db = _open(path, durability)
            self.epoch = self._begin()
            self.topics, self.bytes = self.db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM topics").fetchone()
        except sqlite3.Error as error:
            os.close(self._lock)
            raise StoreError(f"{path}: {explain(error)}") from None
        except StoreError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Note that nothing was lost, and close the file."""
        try:
            with self.db:
                self._set("boot", "")
            self.db.close()
        finally:
            os.close(self._lock)

    # Transactions.

    def begin(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Write what was published, go by the retention, and make it durable."""
        self._settle()
        self.db.executemany(
            "UPDATE topics SET top = ?, floor = ?, count = ?, bytes = ?, age = ?, tombstone_age = ?, compact = ? "
            "WHERE id = ?",
            [
                (each.top, each.floor, each.count, each.bytes, each.age, each.tombstone_age, each.compact, each.id)
                for each in self._changed.values()
            ],
        )
        self.db.execute("COMMIT")
        for topic in self._changed.values():
            self.bytes += topic.bytes - topic.counted
            topic.counted = topic.bytes
        self.topics += self._added
        self._added = 0
        self._changed.clear()

    def rollback(self) -> None:
        """Forget the transaction under way, if the file has not done so already."""
        self._topics.clear()
        self._changed.clear()
        self._rows.clear()
        self._added = 0
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    # Within a transaction.

    def publish(self, event: Event, retention: Retention, now: float) -> Position | Unavailable:
        """Number an event and keep it, or find where an earlier one with its `dedup` is. `now` in seconds since 1970.

        At the totals of the limits nothing is kept.
        """
        if event.dedup is not None:
            earlier = self.db.execute(
                "SELECT epoch, offset FROM dedups WHERE topic = ? AND dedup = ? AND published >= ?",
                (event.topic, event.dedup, now - retention.dedup_age),
            ).fetchone()
            if earlier is not None:
                return Position(earlier[0], earlier[1], duplicate=True)
        if self.bytes > self.limits.history_bytes:
            return Unavailable("the history has as many bytes as limits.history_bytes allows")
        if self.topics + self._added >= self.limits.history_topics and self._find(event.topic) is None:
            return Unavailable("there are as many topics with history as limits.history_topics allows")
        topic = self._topic(event.topic)
        self._agree(topic, retention)
        topic.top += 1
        topic.count += 1
        data = bytes(event.data)
        size = len(data) + (0 if event.key is None else len(event.key.encode()))
        topic.bytes += size
        self._rows.append((topic.id, topic.top, now, size, event.key, data))
        if topic.compact and event.key is not None:
            self._supersede(topic, event.key)
        if event.dedup is not None:
            self.db.execute(
                "INSERT OR REPLACE INTO dedups VALUES (?, ?, ?, ?, ?)",
                (event.topic, event.dedup, now, topic.epoch, topic.top),
            )
        return Position(topic.epoch, topic.top)

    def sweep(self, now: float, longest_dedup: float) -> None:
        """Drop what has grown too old: events, tombstones, dedups. A transaction of its own."""
        self.begin()
        aged = self.db.execute(
            "SELECT name FROM topics WHERE age IS NOT NULL AND count > 0 OR compact AND count > 0"
        ).fetchall()
        for (name,) in aged:
            topic = self._topic(name)
            if topic.age is not None:
                self._drop_older(topic, now - topic.age)
            if topic.compact:
                self._drop_tombstones(topic, now - topic.tombstone_age)
        self.db.execute("DELETE FROM dedups WHERE published < ?", (now - longest_dedup,))
        self.db.execute(
            "DELETE FROM dedups WHERE (topic, dedup) IN (SELECT topic, dedup FROM dedups ORDER BY published DESC "
            "LIMIT -1 OFFSET ?)",
            (self.limits.dedup_entries,),
        )
        self.commit()

    # Reading.

    def position(self, name: str) -> Position:
        topic = self._find(name)
        return Position(self.epoch, 0) if topic is None else Position(topic.epoch, topic.top)

    def locate(self, name: str, last: int) -> tuple[Position, Position]:
        """Find the position behind which the `last` newest events are, and the newest one."""
        topic = self._find(name)
        if topic is None:
            return Position(self.epoch, 0), Position(self.epoch, 0)
        self._settle()
        found = self.db.execute(
            "SELECT min(offset) FROM (SELECT offset FROM events WHERE topic = ? ORDER BY offset DESC LIMIT ?)",
            (topic.id, min(last, 2**62)),
        ).fetchone()[0]
        top = Position(topic.epoch, topic.top)
        return Position(topic.epoch, topic.top if found is None else found - 1), top

    def history(self, name: str, since: Position | None, limit: int) -> HistoryPage | NoHistory:
        """Read events: the oldest behind `since`, or the newest without it."""
        topic = self._find(name)
        if topic is None:
            return NoHistory(name)
        self._settle()
        offset = 0 if since is None else since.offset or 0
        same = since is None or since.epoch in (None, topic.epoch)
        if since is None:
            offset, complete = self.locate(name, limit)[0].offset or 0, True
        else:
            complete = same and topic.floor <= offset <= topic.top
        if not same or offset > topic.top:
            offset = 0
        rows = self.db.execute(
            "SELECT offset, key, data FROM events WHERE topic = ? AND offset > ? ORDER BY offset LIMIT ?",
            (topic.id, offset, limit + 1),
        ).fetchall()
        events = [Event(name, data, key, at) for at, key, data in rows[:limit]]
        first = self.db.execute("SELECT min(offset) FROM events WHERE topic = ?", (topic.id,)).fetchone()[0]
        first = topic.top + 1 if first is None else first
        return HistoryPage(events, topic.epoch, first, topic.top, complete=complete, more=len(rows) > limit)

    # Details.

    def _begin(self) -> str:
        """Note that the file is in use; give the epoch in which new topics begin.

        Under the durability `normal` the end of the log may be lost if the machine went down. Then offsets would be
        given a second time, so every numbering begins anew, in another epoch.
        """
        boot = str(boot_time())
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            known = dict(self.db.execute("SELECT name, value FROM meta").fetchall())
            epoch = known.get("epoch")
            before = known.get("boot", "")  # empty: it was closed
            went_down = before != "" and abs(float(before) - float(boot)) > SAME_BOOT
            lost = known.get("durability") == "normal" and went_down
            if epoch is None or lost:
                epoch = secrets.token_hex(6)
                self._set("epoch", epoch)
                self.db.execute("UPDATE topics SET epoch = ?", (epoch,))
                self.db.execute("DELETE FROM dedups")
            self._set("boot", boot)
            self._set("durability", self.durability)
        return epoch

    def _set(self, name: str, value: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _find(self, name: str) -> Topic | None:
        topic = self._topics.get(name)
        if topic is None:
            row = self.db.execute("SELECT * FROM topics WHERE name = ?", (name,)).fetchone()
            if row is None:
                return None
            if len(self._topics) >= MAX_CACHED:
                self._topics = dict(self._changed)
            topic = self._topics[name] = msgspec.convert([*row, 0, None, row[6]], Topic, strict=False)
        return topic

    def _topic(self, name: str) -> Topic:
        """Give the row of a topic that is about to change, which is made if it is not there."""
        topic = self._find(name)
        if topic is None:
            row = self.db.execute(
                "INSERT INTO topics (name, epoch, top, floor, count, bytes, tombstone_age, compact) "
                "VALUES (?, ?, 0, 0, 0, 0, 0, 0) RETURNING id",
                (name, self.epoch),
            ).fetchone()
            self._added += 1
            topic = self._topics[name] = Topic(row[0], name, self.epoch, 0, 0, 0, 0, None, 0.0, compact=False)
        self._changed[name] = topic
        return topic

    def _agree(self, topic: Topic, retention: Retention) -> None:
        """Go by this retention from now on."""
        topic.events, topic.max_bytes = retention.events, retention.bytes
        topic.age, topic.tombstone_age = retention.age, retention.tombstone_age
        if topic.compact == retention.compact:
            return
        topic.compact = retention.compact
        self._write_rows()
        self.db.execute("DELETE FROM keys WHERE topic = ?", (topic.id,))
        if topic.compact:
            self.db.execute(
                "INSERT INTO keys SELECT topic, key, max(offset) FROM events WHERE topic = ? AND key NOT NULL "
                "GROUP BY key",
                (topic.id,),
            )
            self.db.execute(
                "DELETE FROM events WHERE topic = ? AND key NOT NULL AND offset NOT IN "
                "(SELECT offset FROM keys WHERE topic = ?)",
                (topic.id, topic.id),
            )
            self._recount(topic)

    def _supersede(self, topic: Topic, key: str) -> None:
        """The newest event is the newest of its key: the one before it goes."""
        before = self.db.execute("SELECT offset FROM keys WHERE topic = ? AND key = ?", (topic.id, key)).fetchone()
        self.db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", (topic.id, key, topic.top))
        if before is None:
            return
        if self._rows and any(row[:2] == (topic.id, before[0]) for row in self._rows):
            self._write_rows()
        gone = self.db.execute(
            "DELETE FROM events WHERE topic = ? AND offset = ? RETURNING size", (topic.id, before[0])
        ).fetchone()
        if gone is not None:
            topic.count -= 1
            topic.bytes -= gone[0]

    def _settle(self) -> None:
        """Bring the file to what the transaction has done so far, but for the rows of the topics."""
        self._write_rows()
        for topic in self._changed.values():
            self._trim(topic)

    def _write_rows(self) -> None:
        if self._rows:
            self.db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", self._rows)
            self._rows.clear()

    def _trim(self, topic: Topic) -> None:
        """Drop the oldest events beyond the number and the bytes that are kept; the newest stays."""
        if topic.events and topic.count > topic.events:
            self._drop_oldest(topic, topic.count - topic.events)
        while topic.max_bytes is not None and topic.bytes > topic.max_bytes and topic.count > 1:
            over = topic.bytes - topic.max_bytes
            rows = self.db.execute(
                "SELECT size FROM events WHERE topic = ? ORDER BY offset LIMIT ?", (topic.id, topic.count - 1)
            )
            count = 0
            for (size,) in rows:
                count += 1
                over -= size
                if over <= 0:
                    break
            rows.close()
            self._drop_oldest(topic, count)

    def _drop_oldest(self, topic: Topic, count: int) -> None:
        last = self.db.execute(
            "SELECT offset FROM events WHERE topic = ? ORDER BY offset LIMIT 1 OFFSET ?", (topic.id, count - 1)
        ).fetchone()
        if last is not None:
            self._drop_through(topic, last[0])

    def _drop_older(self, topic: Topic, before: float) -> None:
        last = self.db.execute(
            "SELECT max(offset) FROM (SELECT offset, published FROM events WHERE topic = ? ORDER BY offset) "
            "WHERE published < ?",
            (topic.id, before),
        ).fetchone()[0]
        if last is not None:
            self._drop_through(topic, last)

    def _drop_through(self, topic: Topic, offset: int) -> None:
        """Drop the events up to an offset; they are missing from now on."""
        count, size = self.db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM events WHERE topic = ? AND offset <= ?", (topic.id, offset)
        ).fetchone()
        self.db.execute("DELETE FROM events WHERE topic = ? AND offset <= ?", (topic.id, offset))
        if topic.compact:
            self.db.execute("DELETE FROM keys WHERE topic = ? AND offset <= ?", (topic.id, offset))
        topic.count -= count
        topic.bytes -= size
        topic.floor = max(topic.floor, offset)

    def _drop_tombstones(self, topic: Topic, before: float) -> None:
        """Drop the removals of keys that have been kept for long enough."""
        gone = self.db.execute(
            "DELETE FROM events WHERE topic = ? AND key NOT NULL AND data = ? AND published < ? "
            "RETURNING offset, size, key",
            (topic.id, b"null", before),
        ).fetchall()
        for offset, size, key in gone:
            self.db.execute("DELETE FROM keys WHERE topic = ? AND key = ? AND offset = ?", (topic.id, key, offset))
            topic.count -= 1
            topic.bytes -= size
            topic.floor = max(topic.floor, offset)

    def _recount(self, topic: Topic) -> None:
        topic.count, topic.bytes = self.db.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM events WHERE topic = ?", (topic.id,)
        ).fetchone()


def boot_time() -> float:
    """Give when the machine started, in seconds since 1970. (The id of a boot is in a part of /proc that a hardened
    service does not see.)"""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _lock(path: Path) -> int:
    """Take the file for this process: two brokers would give the same offset twice. The lock ends with the process."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        hint = "the folder must exist, and the broker must be able to write there"
        raise StoreError(f"{path}: {error.strerror}: {hint}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(f"{path}: another broker has it open; each broker needs a file of its own") from None
    return descriptor


def _open(path: Path, durability: Durability) -> sqlite3.Connection:
    # The thread that opens it need not be the one that uses it; only one does at a time.
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            found = f"schema {version}, this one has {VERSION}"
            raise StoreError(f"{path}: it was written by a newer version of the broker ({found})")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {durability.upper()}")
        db.execute("PRAGMA wal_autocheckpoint = 4000")
        if version == 0:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StoreError(f"{path}: it is a database of another program")
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def explain(error: sqlite3.Error) -> str:
    """Say what an error of SQLite means for who runs the broker."""
    code = getattr(error, "sqlite_errorname", "") or ""
    for prefix, meaning in MEANINGS:
        if code.startswith(prefix):
            return meaning
    return str(error)


MEANINGS: Final[Iterable[tuple[str, str]]] = (
    ("SQLITE_FULL", "the disk is full"),
    ("SQLITE_READONLY", "the file, or its file system, is read-only"),
    ("SQLITE_CANTOPEN", "the file cannot be opened: is its folder there, and may the broker write to it?"),
    ("SQLITE_CORRUPT", "the file is damaged; restore a backup, or move it away to begin anew"),
    ("SQLITE_NOTADB", "the file is no SQLite database, or it is damaged"),
    ("SQLITE_IOERR", "the disk does not read or write"),
)
