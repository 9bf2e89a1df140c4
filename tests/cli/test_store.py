"""`wsbroker store`, beside a broker that has the file open and without one."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest

from broker.config import Limits
from broker.engines.base import Event, HistoryPage, Position
from broker.engines.store import Store
from broker.rules import Retention
from tests.fixtures_command import Result, wsbroker


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "wsbroker.toml"
    file.write_text(f"[server]\nengine = 'sqlite://{tmp_path}/broker.db'\n")
    return file


def filled(folder: Path, events: int = 3) -> Store:
    store = Store(folder / "broker.db", Limits())
    store.begin(0.0)
    for n in range(events):
        store.publish(Event("a", b"%d" % n, "k"), Retention(1000))
    store.commit()
    return store


def left_behind(folder: Path) -> list[Path]:
    """Parts of copies."""
    return list(folder.glob("*.part"))


async def run(config: Path, *arguments: str) -> Result:
    return await wsbroker("store", *arguments, "--config", str(config))


async def test_info_and_check_work_beside_a_broker(config: Path, tmp_path: Path) -> None:
    store = filled(tmp_path)
    result = await run(config, "info", "--json")
    found = json.loads(result.out)
    assert (result.status, found["topics"], found["events"], found["data_bytes"]) == (0, 1, 3, 6)
    assert (found["schema"], found["epoch"], found["durability"]) == (1, store.epoch, "full")
    assert re.search(r"^events +3$", (await run(config, "info")).out, re.MULTILINE)
    assert await run(config, "check") == Result(0, f"{tmp_path}/broker.db is good.\n", "")
    store.close()


async def test_check_says_what_is_wrong(config: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "broker.db", Limits())
    for n in range(3):  # a row for each
        store.begin(0.0)
        store.publish(Event("a", b"%d" % n), Retention(1000))
        store.commit()
    store.close()
    with sqlite3.connect(tmp_path / "broker.db") as db:
        db.execute("DELETE FROM events WHERE offset = 2")
        db.execute("UPDATE topics SET top = 2")
    db.close()
    result = await run(config, "check")
    assert result.status == 1
    assert "topic a: 3 events are noted, 2 are there" in result.err
    assert "topic a: event 3 is behind the newest offset, 2" in result.err


async def test_backup_of_a_file_in_use_can_be_restored(config: Path, tmp_path: Path) -> None:
    store = filled(tmp_path)
    target = tmp_path / "copy.db"
    assert (await run(config, "backup", str(target))).status == 0
    store.begin(0.0)
    store.publish(Event("a", b"later"), Retention(1000))
    store.commit()
    again = await run(config, "backup", str(target))
    assert (again.status, again.err) == (1, f"wsbroker: {target} is there already\n")
    known = store.position("a")
    store.close()
    restored = Store(target, Limits())
    assert restored.position("a") == Position(restored.epoch, 3)
    page = restored.history("a", known, 10)
    assert isinstance(page, HistoryPage)
    assert (len(page.events), page.complete) == (3, False), "the client knows an event that the backup does not have"
    restored.close()
    assert left_behind(tmp_path) == []


async def test_compact_shrinks_a_file_that_no_broker_has(config: Path, tmp_path: Path) -> None:
    store = filled(tmp_path, 5000)
    refused = await run(config, "compact")
    assert (refused.status, "another broker has it open" in refused.err) == (1, True)
    store.begin(0.0)
    store.publish(Event("a", b"last"), Retention(1))
    store.commit()
    store.close()
    before = (tmp_path / "broker.db").stat().st_size
    assert (await run(config, "compact")).status == 0
    assert (tmp_path / "broker.db").stat().st_size < before / 2


@pytest.mark.parametrize("command", [["info"], ["check"], ["compact"], ["backup", "x"]])
async def test_file_that_is_not_there_is_reported(config: Path, tmp_path: Path, command: list[str]) -> None:
    result = await run(config, *command)
    assert (result.status, result.out) == (1, "")
    assert f"{tmp_path}/broker.db is not there" in result.err
    assert not (tmp_path / "broker.db").exists()


async def test_engine_without_a_file_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "memory.toml"
    file.write_text("")
    result = await run(file, "info")
    assert (result.status, result.err) == (78, "wsbroker: server.engine is memory: there is no file\n")
