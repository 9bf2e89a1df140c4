"""The file of the SQLite engine: its schema, and what one transaction does. It belongs to one thread.

Every topic with history has a row with its numbering: `epoch`, `top` (the newest offset), `floor` (up to which offset
events may be missing that no newer one superseded). Rows of topics that are written in a transaction are held in memory
until it ends, so that a topic costs one update however many events it got.

A row of `events` has one event of a compacted topic, or a *pack*: events of one topic and one transaction, with
consecutive offsets, of which the row has the last one. A row costs SQLite some microseconds, an event in a pack next to
nothing.

Invariant: the offsets of a topic that was never compacted have no holes. So of such a topic the newest N events are
those behind `top - N`, and what is before them may be in the file for a while.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from broker._speedups import PendingBatch
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
PACK_EVENTS: Final = 256
"""Events in one pack, at the most."""
PACK_BYTES: Final = 65_536
"""Bytes of their data and keys, at the most, but one event at least."""
SLACK: Final = 1024
"""Events beyond what is kept of a topic before they are deleted: a deletion for each transaction would cost more."""
PER_SWEEP: Final = 200
"""Rows that one transaction of the retention deletes, at the most."""
Durability = Literal["full", "normal"]

Entries = bytes
ENTRY: Final = struct.Struct("<iI")
"""An event in a pack: the bytes of its key (-1: it has none) and those of its data; both follow."""

SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL, top INTEGER NOT NULL,
    floor INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL,
    age REAL, tombstone_age REAL, compact INTEGER NOT NULL
);
CREATE TABLE events (
    topic INTEGER NOT NULL, offset INTEGER NOT NULL, count INTEGER NOT NULL, published REAL NOT NULL,
    size INTEGER NOT NULL, key TEXT, data BLOB NOT NULL,
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


PAGE_BYTES: Final = 4 * 2**20
"""Bytes of data from which on a page of history has no further row."""


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
    pack: list[Entries] = []
    """Entries that the transaction under way has not written yet."""
    packed: int = 0
    """How many events they are."""
    pack_size: int = 0
    """Bytes of their data and keys."""

    @property
    def hidden(self) -> int:
        """Up to which offset events do not count any more, whether or not they are in the file."""
        return max(self.floor, self.top - self.events) if self.events and not self.compact else self.floor


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
        self._swept = 0
        """The last topic that the retention has looked at; 0: it begins with the first one."""
        self._now = 0.0
        """When the events of the transaction under way were published."""
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
        """Note that nothing was lost, and close the file. Raises StoreError where it cannot be noted."""
        try:
            with self.db:
                self._set("boot", "")
        except sqlite3.Error as error:  # the next start takes it for one that was not closed
            raise StoreError(f"{self.path}: {explain(error)}") from None
        finally:
            self.db.close()
            os.close(self._lock)

    # Transactions.

    def begin(self, now: float) -> None:
        """Begin a transaction. `now` is in seconds since 1970."""
        self._now = now
        self.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Write what was published, go by the retention, and make it durable."""
        self._settle()
        self.db.executemany(
            "UPDATE topics SET top = ?, floor = ?, count = ?, bytes = ?, age = ?, tombstone_age = ?, compact = ? "
            "WHERE id = ?",
            [
                (each.top, each.hidden, each.count, each.bytes, each.age, each.tombstone_age, each.compact, each.id)
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
        self._added = 0
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    # Within a transaction.

    def publish(self, event: Event, retention: Retention) -> Position | Unavailable:
        """Number an event and keep it, or find where an earlier one with its `dedup` is.

        At the totals of the limits nothing is kept.
        """
        if event.dedup is not None:
            earlier = self._find_dedup(event.topic, event.dedup, retention)
            if earlier is not None:
                return earlier
        if not retention.events:  # only its `dedup` is remembered
            self._note_dedup(event.topic, event.dedup, NOWHERE)
            return NOWHERE
        topic = self.topic_for(event.topic, retention)
        if isinstance(topic, Unavailable):
            return topic
        data = bytes(event.data)
        key = None if event.key is None else event.key.encode()
        size = len(data) + len(key or b"")
        if topic.compact:
            self._keep_one(topic, event.key, data, size)
        else:
            self.append(topic, pack_entry(key, data), 1, size)
        position = Position(topic.epoch, topic.top)
        self._note_dedup(event.topic, event.dedup, position)
        return position

    def topic_for(self, name: str, retention: Retention) -> Topic | Unavailable:
        """Give the topic to which events are about to be appended; nothing at the totals of the limits."""
        if self.bytes > self.limits.history_bytes:
            return Unavailable("the history has as many bytes as limits.history_bytes allows")
        if self.topics + self._added >= self.limits.history_topics and self._find(name) is None:
            return Unavailable("there are as many topics with history as limits.history_topics allows")
        topic = self._topic(name)
        self._agree(topic, retention)
        return topic

    def append(self, topic: Topic, entries: bytes, count: int, size: int) -> None:
        """Append events to a topic that is not compacted: `count` entries, with `size` bytes of data and keys."""
        topic.pack.append(entries)
        topic.packed += count
        topic.pack_size += size
        topic.top += count
        topic.count += count
        topic.bytes += size
        most = PACK_BYTES if topic.max_bytes is None else min(PACK_BYTES, topic.max_bytes // 16)
        if topic.packed >= PACK_EVENTS or topic.pack_size >= most:
            self._write_pack(topic)

    def publish_batch(self, batch: PendingBatch) -> bool:
        """Number and keep the publishes of a batch. Returns whether some were refused."""
        is_refused = False

        def take(name: str, retention: Retention) -> object:
            nonlocal is_refused
            topic = self.topic_for(name, retention)
            if isinstance(topic, Unavailable):
                is_refused = True
                return topic
            self._write_pack(topic)
            return topic, topic.top, topic.epoch

        for topic, entries, count, size in batch.number(take, PACK_EVENTS, PACK_BYTES):
            self.append(topic, entries, count, size)
        return is_refused

    def plain_dedups(self, now: float) -> list[tuple[str, str, float]]:
        """Give the `dedup` values of topics without history, oldest first: (topic, dedup, age in seconds)."""
        rows = self.db.execute("SELECT topic, dedup, published FROM dedups WHERE offset = 0 ORDER BY published")
        return [(topic, dedup, max(0.0, now - published)) for topic, dedup, published in rows]

    def has_dedups(self) -> bool:
        """Whether the file remembers publishes by their `dedup`."""
        return self.db.execute("SELECT 1 FROM dedups LIMIT 1").fetchone() is not None

    def sweep(self, now: float, longest_dedup: float) -> bool:
        """Drop some of what has grown too old: events, tombstones, dedups. A transaction of its own. Returns whether
        there may be more."""
        self.begin(now)
        left = False
        aged = self.db.execute(
            "SELECT id, name FROM topics WHERE id > ? AND count > 0 AND (age IS NOT NULL OR compact) "
            "ORDER BY id LIMIT ?",
            (self._swept, PER_SWEEP),
        ).fetchall()
        for number, name in aged:
            topic = self._find(name)
            if topic is None:
                continue
            before = topic.count, topic.floor
            self._swept = number - 1
            if topic.age is not None:
                left |= self._drop_older(topic, now - topic.age)
            if topic.compact:
                left |= self._drop_tombstones(topic, now - topic.tombstone_age)
            if (topic.count, topic.floor) != before:
                self._changed[name] = topic
            if left:
                break
            self._swept = number
        if not left and len(aged) < PER_SWEEP:
            self._swept = 0
        left |= len(aged) == PER_SWEEP
        left |= (
            self.db.execute(
                "DELETE FROM dedups WHERE (topic, dedup) IN "
                "(SELECT topic, dedup FROM dedups WHERE published < ? ORDER BY published LIMIT ?)",
                (now - longest_dedup, PER_SWEEP),
            ).rowcount
            == PER_SWEEP
        )
        left |= (
            self.db.execute(
                "DELETE FROM dedups WHERE (topic, dedup) IN (SELECT topic, dedup FROM dedups ORDER BY published LIMIT "
                "max(0, min(?, (SELECT count(*) FROM dedups) - ?)))",
                (PER_SWEEP, self.limits.dedup_entries),
            ).rowcount
            == PER_SWEEP
        )
        self.commit()
        return left

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
        top = Position(topic.epoch, topic.top)
        begin, left = topic.top, last
        rows = self.db.execute(
            "SELECT offset, count FROM events WHERE topic = ? AND offset > ? ORDER BY offset DESC",
            (topic.id, topic.hidden),
        )
        for offset, count in rows:
            begin = offset - min(left, max(1, count))
            left -= max(1, count)
            if left <= 0:
                break
        rows.close()
        return Position(topic.epoch, max(begin, min(topic.hidden, topic.top))), top

    def history(self, name: str, since: Position | None, limit: int) -> HistoryPage | NoHistory:
        """Read events: the oldest behind `since`, or the newest without it; at most `limit`, and no more rows than
        have PAGE_BYTES together."""
        topic = self._find(name)
        if topic is None:
            return NoHistory(name)
        self._settle()
        hidden = topic.hidden
        offset = 0 if since is None else since.offset or 0
        same = since is None or since.epoch in (None, topic.epoch)
        first = self._first(topic)
        if since is None:
            return HistoryPage(self._newest(topic, limit), topic.epoch, first, topic.top, complete=True, more=False)
        complete = same and hidden <= offset <= topic.top
        if not same or offset > topic.top:
            offset = 0
        events: list[Event] = []
        size, more = 0, False
        rows = self.db.execute(
            "SELECT offset, count, key, data FROM events WHERE topic = ? AND offset > ? ORDER BY offset",
            (topic.id, max(offset, hidden)),
        )
        for last, count, key, data in rows:
            if count == 0:
                events.append(Event(name, data, key, last))
            else:
                events += unpack_events(name, data, last - count + 1, max(offset, hidden), limit + 1 - len(events))
            size += len(data)
            if len(events) > limit or size >= PAGE_BYTES:
                more = len(events) > limit or rows.fetchone() is not None
                break
        rows.close()
        return HistoryPage(events[:limit], topic.epoch, first, topic.top, complete=complete, more=more)

    def _newest(self, topic: Topic, limit: int) -> list[Event]:
        """Read the newest events, the oldest of them first."""
        parts: list[list[Event]] = []
        size = found = 0
        rows = self.db.execute(
            "SELECT offset, count, key, data FROM events WHERE topic = ? AND offset > ? ORDER BY offset DESC",
            (topic.id, topic.hidden),
        )
        for last, count, key, data in rows:
            if count == 0:
                parts.append([Event(topic.name, data, key, last)])
            else:
                parts.append(unpack_events(topic.name, data, last - count + 1, topic.hidden, count))
            size += len(data)
            found += len(parts[-1])
            if found >= limit or size >= PAGE_BYTES:
                break
        rows.close()
        return [event for part in reversed(parts) for event in part][-limit:]

    def _first(self, topic: Topic) -> int:
        """Give the offset of the oldest event that is kept; behind the top where none is."""
        row = self.db.execute(
            "SELECT offset, count FROM events WHERE topic = ? AND offset > ? ORDER BY offset LIMIT 1",
            (topic.id, topic.hidden),
        ).fetchone()
        if row is None:
            return topic.top + 1
        return int(row[0]) if row[1] == 0 else max(row[0] - row[1], topic.hidden) + 1

    # Details.

    def _begin(self) -> str:
        """Note that the file is in use; give the epoch in which new topics begin.

        Under the durability `normal` the end of the log may be lost if the machine went down. Then offsets would be
        given a second time, so every numbering begins anew, in another epoch. So it is with a backup, behind which
        offsets were given too.
        """
        boot = str(boot_time())
        self.db.execute("PRAGMA synchronous = FULL")  # or a power cut could undo the mark, and not be noticed
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            known = dict(self.db.execute("SELECT name, value FROM meta").fetchall())
            epoch = known.get("epoch")
            before = known.get("boot", "")  # empty: it was closed
            went_down = before != "" and abs(float(before) - float(boot)) > SAME_BOOT
            lost = known.get("durability") == "normal" and went_down
            if epoch is None or lost or "copy" in known:
                epoch = secrets.token_hex(6)
                self._set("epoch", epoch)
                self.db.execute("UPDATE topics SET epoch = ?", (epoch,))
                self.db.execute("DELETE FROM dedups")
            self.db.execute("DELETE FROM meta WHERE name = 'copy'")
            self._set("boot", boot)
            self._set("durability", self.durability)
        self.db.execute(f"PRAGMA synchronous = {self.durability.upper()}")
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
        if topic.events == retention.events and topic.compact == retention.compact and topic.age == retention.age:
            topic.max_bytes, topic.tombstone_age = retention.bytes, retention.tombstone_age
            return
        if topic.events and not topic.compact:
            topic.floor = topic.hidden  # what is not kept any more does not come back
        topic.events, topic.max_bytes = retention.events, retention.bytes
        topic.age, topic.tombstone_age = retention.age, retention.tombstone_age
        if topic.compact == retention.compact:
            return
        self._write_pack(topic)
        topic.compact = retention.compact
        self.db.execute("DELETE FROM keys WHERE topic = ?", (topic.id,))
        if topic.compact:
            self._begin_compaction(topic)

    def _begin_compaction(self, topic: Topic) -> None:
        """Take the packs of a topic apart, and keep the newest event of each key."""
        packs = self.db.execute(
            "SELECT offset, count, published, data FROM events WHERE topic = ? AND count > 0", (topic.id,)
        ).fetchall()
        for last, count, published, data in packs:
            events = unpack_events(topic.name, data, last - count + 1, topic.floor, count)
            self.db.execute("DELETE FROM events WHERE topic = ? AND offset = ?", (topic.id, last))
            self.db.executemany(
                INSERT,
                [
                    (topic.id, event.offset, 0, published, _size(event), event.key, bytes(event.data))
                    for event in events
                ],
            )
        self.db.execute(
            "INSERT INTO keys SELECT topic, key, max(offset) FROM events WHERE topic = ? AND key NOT NULL GROUP BY key",
            (topic.id,),
        )
        self.db.execute(
            "DELETE FROM events WHERE topic = ? AND key NOT NULL AND offset NOT IN "
            "(SELECT offset FROM keys WHERE topic = ?)",
            (topic.id, topic.id),
        )
        self._recount(topic)

    def _keep_one(self, topic: Topic, key: str | None, data: bytes, size: int) -> None:
        """Append an event to a compacted topic. The one before it of the same key goes."""
        topic.top += 1
        topic.count += 1
        topic.bytes += size
        self.db.execute(INSERT, (topic.id, topic.top, 0, self._now, size, key, data))
        if key is None:
            return
        before = self.db.execute("SELECT offset FROM keys WHERE topic = ? AND key = ?", (topic.id, key)).fetchone()
        self.db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", (topic.id, key, topic.top))
        if before is None:
            return
        gone = self.db.execute(
            "DELETE FROM events WHERE topic = ? AND offset = ? RETURNING size", (topic.id, before[0])
        ).fetchone()
        if gone is not None:
            topic.count -= 1
            topic.bytes -= gone[0]

    def _find_dedup(self, topic: str, dedup: str, retention: Retention) -> Position | None:
        earlier = self.db.execute(
            "SELECT epoch, offset FROM dedups WHERE topic = ? AND dedup = ? AND published >= ?",
            (topic, dedup, self._now - retention.dedup_age),
        ).fetchone()
        if earlier is None:
            return None
        epoch, offset = earlier if earlier[1] else (None, None)
        return Position(epoch, offset, duplicate=True)

    def _note_dedup(self, topic: str, dedup: str | None, position: Position) -> None:
        if dedup is not None:
            self.db.execute(
                "INSERT OR REPLACE INTO dedups VALUES (?, ?, ?, ?, ?)",
                (topic, dedup, self._now, position.epoch or "", position.offset or 0),
            )

    def _settle(self) -> None:
        """Bring the file to what the transaction has done so far, but for the rows of the topics."""
        for topic in self._changed.values():
            self._write_pack(topic)
            self._trim(topic)

    def _write_pack(self, topic: Topic) -> None:
        if topic.packed:
            pack = topic.pack[0] if len(topic.pack) == 1 else b"".join(topic.pack)
            self.db.execute(INSERT, (topic.id, topic.top, topic.packed, self._now, topic.pack_size, None, pack))
            topic.pack, topic.packed, topic.pack_size = [], 0, 0

    def _trim(self, topic: Topic) -> None:
        """Drop the oldest events beyond the number and the bytes that are kept; the newest stays."""
        if topic.compact:
            if topic.events and topic.count > topic.events:
                self._drop_first(topic, topic.count - topic.events)
        elif topic.hidden - topic.floor >= min(SLACK, max(1, topic.events)):
            self._drop_through(topic, topic.hidden)
        while topic.max_bytes is not None and topic.bytes > topic.max_bytes and topic.count > 1:
            over = topic.bytes - topic.max_bytes
            rows = self.db.execute(
                "SELECT offset, size FROM events WHERE topic = ? AND offset < ? ORDER BY offset", (topic.id, topic.top)
            )
            last = 0
            for offset, size in rows:
                last = offset
                over -= size
                if over <= 0:
                    break
            rows.close()
            if not last:
                return
            self._drop_through(topic, last)

    def _drop_first(self, topic: Topic, count: int) -> None:
        """Drop the oldest events of a compacted topic."""
        last = self.db.execute(
            "SELECT offset FROM events WHERE topic = ? ORDER BY offset LIMIT 1 OFFSET ?", (topic.id, count - 1)
        ).fetchone()
        if last is not None:
            self._drop_through(topic, last[0])

    def _drop_older(self, topic: Topic, before: float) -> bool:
        """Drop some rows of events that are older. Returns whether there are more."""
        rows = self.db.execute(
            "SELECT offset, published FROM events WHERE topic = ? ORDER BY offset LIMIT ?", (topic.id, PER_SWEEP)
        ).fetchall()
        old = [offset for offset, published in rows if published < before]
        if old:
            self._drop_through(topic, old[-1])
        return len(old) == PER_SWEEP

    def _drop_through(self, topic: Topic, offset: int) -> None:
        """Drop the events up to an offset; they are missing from now on. A pack goes with its last event."""
        rows = self.db.execute(
            "DELETE FROM events WHERE topic = ? AND offset <= ? RETURNING count, size", (topic.id, offset)
        ).fetchall()
        if topic.compact:
            self.db.execute("DELETE FROM keys WHERE topic = ? AND offset <= ?", (topic.id, offset))
        topic.count -= sum(max(1, count) for count, _ in rows)
        topic.bytes -= sum(size for _, size in rows)
        topic.floor = max(topic.floor, offset)

    def _drop_tombstones(self, topic: Topic, before: float) -> bool:
        """Drop some removals of keys that have been kept for long enough. Returns whether there are more."""
        gone = self.db.execute(
            "DELETE FROM events WHERE topic = ? AND offset IN (SELECT offset FROM events WHERE topic = ? AND key NOT "
            "NULL AND data = ? AND published < ? LIMIT ?) RETURNING offset, size, key",
            (topic.id, topic.id, b"null", before, PER_SWEEP),
        ).fetchall()
        for offset, size, key in gone:
            self.db.execute("DELETE FROM keys WHERE topic = ? AND key = ? AND offset = ?", (topic.id, key, offset))
            topic.count -= 1
            topic.bytes -= size
            topic.floor = max(topic.floor, offset)
        return len(gone) == PER_SWEEP

    def _recount(self, topic: Topic) -> None:
        topic.count, topic.bytes = self.db.execute(
            "SELECT coalesce(sum(max(1, count)), 0), coalesce(sum(size), 0) FROM events WHERE topic = ?", (topic.id,)
        ).fetchone()


INSERT: Final = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)"
NOWHERE: Final = Position()


def pack_entry(key: bytes | None, data: bytes) -> bytes:
    """Encode an event as it stands in a pack."""
    return ENTRY.pack(-1 if key is None else len(key), len(data)) + (key or b"") + data


def unpack_events(topic: str, pack: bytes, first: int, behind: int, limit: int) -> list[Event]:
    """Decode the events of a pack, of which the first one has the offset `first`: at most `limit` of those behind an
    offset. Raises struct.error for what is no pack."""
    events: list[Event] = []
    at, offset = 0, first
    while at < len(pack) and len(events) < limit:
        key_size, data_size = ENTRY.unpack_from(pack, at)
        start = at + ENTRY.size
        at = start + max(0, key_size) + data_size
        if offset > behind:
            key = None if key_size < 0 else pack[start : start + key_size].decode()
            events.append(Event(topic, pack[at - data_size : at], key, offset))
        offset += 1
    return events


def _size(event: Event) -> int:
    return len(bytes(event.data)) + len((event.key or "").encode())


def boot_time() -> float:
    """Give when the machine started, in seconds since 1970. (The id of a boot is in a part of /proc that a hardened
    service does not see.)"""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _lock(path: Path) -> int:
    """Take the file for this process: two brokers would give the same offset twice. The lock ends with the process."""
    try:
        descriptor = os.open(f"{path.resolve()}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
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
