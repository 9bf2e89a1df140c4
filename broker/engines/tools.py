"""What an operator does with the file of the SQLite engine. All but `compact` work beside a running broker."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from broker.config import Limits
from broker.engines.store import VERSION, Store, StoreError, explain


def info(path: Path) -> dict[str, object]:
    """Say what is in the file. Raises StoreError."""
    with _reading(path) as db:
        meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
        topics, events, size = db.execute("SELECT count(*), sum(count), sum(bytes) FROM topics").fetchone()
        return {
            "path": str(path),
            "schema": db.execute("PRAGMA user_version").fetchone()[0],
            "epoch": meta.get("epoch"),
            "durability": meta.get("durability"),
            "topics": topics,
            "events": events or 0,
            "data_bytes": size or 0,
            "dedups": db.execute("SELECT count(*) FROM dedups").fetchone()[0],
            "file_bytes": path.stat().st_size,
        }


def check(path: Path) -> list[str]:
    """Find what is wrong in the file. Raises StoreError where it cannot even be read."""
    with _reading(path) as db:
        problems = [row[0] for row in db.execute("PRAGMA integrity_check").fetchall() if row[0] != "ok"]
        problems += [
            f"topic {name}: {count} events are noted, {found} are there"
            for name, count, found in db.execute(
                "SELECT name, count, (SELECT coalesce(sum(max(1, count)), 0) FROM events WHERE topic = id) AS found "
                "FROM topics "
                "WHERE count != found"
            )
        ]
        problems += [
            f"topic {name}: event {newest} is behind the newest offset, {top}"
            for name, top, newest in db.execute(
                "SELECT name, top, (SELECT max(offset) FROM events WHERE topic = id) AS newest FROM topics "
                "WHERE newest > top"
            )
        ]
        return problems


def compact(path: Path) -> tuple[int, int]:
    """Give free pages back to the file system. Gives the size before and after, in bytes.

    No broker may have the file open. Raises StoreError.
    """
    _must_exist(path)
    before = path.stat().st_size
    store = Store(path, Limits())
    try:
        store.db.execute("VACUUM")
        store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {explain(error)}") from None
    finally:
        store.close()
    return before, path.stat().st_size


def backup(path: Path, target: Path) -> None:
    """Copy the file as it is at one moment. A broker that opens the copy begins every numbering anew.

    Raises StoreError, also if `target` is there.
    """
    if target.exists():
        raise StoreError(f"{target} is there already")
    part = target.with_name(f"{target.name}.part")
    try:
        with _reading(path) as db, closing(sqlite3.connect(part)) as copy:
            db.backup(copy)
            # The broker goes on, so that the offsets behind these are given to other events than after a restore.
            with copy:
                copy.execute("INSERT OR REPLACE INTO meta VALUES ('copy', 'yes')")
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.rename(target)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"{target}: {explain(error) if isinstance(error, sqlite3.Error) else error.strerror}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise StoreError(f"{path} is not there")


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Read the file of a broker that may be running."""
    _must_exist(path)
    try:
        with closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True, isolation_level=None)) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] > VERSION:
                raise StoreError(f"{path}: it was written by a newer version of the broker")
            db.execute("BEGIN")
            yield db
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {explain(error)}") from None
