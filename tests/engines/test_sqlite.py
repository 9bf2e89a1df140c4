"""The SQLite engine: what it keeps over a restart, and what happens when the file does not obey."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from broker.config import Limits, TopicRule
from broker.engines import tools
from broker.engines.base import HistoryPage, Position, Unavailable
from broker.engines.sqlite import Call, SqliteEngine
from broker.engines.store import Durability, Store, StoreError, boot_time
from broker.rules import Retention
from tests.engines.promises import KEEP, Node
from tests.fixtures_broker import start_broker
from tests.fixtures_node import serving
from tests.net.harness import until

KILLS = int(os.environ.get("KILLS", "20"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


@asynccontextmanager
async def started(path: Path, durability: Durability = "full", **limits: Any) -> AsyncIterator[Node]:
    node = Node(SqliteEngine(path, Limits(**limits), durability), 0, KEEP)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


async def publish(node: Node, topic: str, *data: Any, **fields: Any) -> Any:
    for each in data:
        node.publish(topic, each, **fields)
    await node.answered()
    return node.answers[-1][1]


async def read(node: Node, topic: str, since: Position | None = None) -> list[tuple[Any, ...]]:
    page = await node.result("history", topic, since, 1000)
    assert isinstance(page, HistoryPage)
    return [(event.offset, event.key, json.loads(bytes(event.data))) for event in page.events]


async def test_history_numbering_and_dedups_outlive_the_broker(path: Path) -> None:
    async with started(path) as node:
        first = await publish(node, "a", 1, 2, 3, key="k", dedup=None)
        once = await publish(node, "a", 4, dedup="x")
        await publish(node, "t", 1, key="k", retention=Retention(10, compact=True))
    async with started(path) as node:
        assert await node.result("position", "a") == once
        assert await read(node, "a") == [(1, "k", 1), (2, "k", 2), (3, "k", 3), (4, None, 4)]
        again = await publish(node, "a", 4, dedup="x")
        assert again == Position(once.epoch, once.offset, duplicate=True)
        assert await publish(node, "a", 5) == Position(first.epoch, 5)
        await publish(node, "t", 2, key="k", retention=Retention(10, compact=True))
        assert await read(node, "t") == [(2, "k", 2)]


@pytest.mark.parametrize("keep", [Retention(100, dedup_age=3600), Retention(0, dedup_age=3600)])
async def test_dedup_is_remembered_for_its_age_over_a_restart(
    path: Path, keep: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the topics that are published to since have, and where the sweep comes soon."""
    monkeypatch.setattr("broker.engines.sqlite.SWEEP", 0.01)
    monkeypatch.setattr("broker.engines.memory.SWEEP", 0.01)
    async with started(path) as node:
        assert not (await publish(node, "a", 1, dedup="x", retention=keep)).duplicate
    async with started(path) as node:
        short = Retention(keep.events, dedup_age=0.01)
        for n in range(10):
            await publish(node, "b", n, dedup=str(n), retention=short)
            await asyncio.sleep(0.02)
        assert (await publish(node, "a", 1, dedup="x", retention=keep)).duplicate


async def test_retention_goes_on_under_load_that_never_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engines.sqlite.SWEEP", 0.05)
    transactions, transactions_before_sweep = 0, 0

    def commit_slowly() -> None:
        nonlocal transactions
        transactions += 1
        time.sleep(0.01)

    def take() -> Call | None:
        return None if transactions_before_sweep or transactions >= 300 else Call(lambda _: None, lambda _: None)

    engine = SqliteEngine(path)
    sweep = engine._store.sweep

    def note(now: float, longest: float) -> bool:
        nonlocal transactions_before_sweep
        transactions_before_sweep = transactions_before_sweep or transactions
        return sweep(now, longest)

    engine.committing = commit_slowly
    monkeypatch.setattr(engine, "_take", take)
    monkeypatch.setattr(engine._store, "sweep", note)
    await engine.start(lambda _: None, lambda _: None)
    await until(lambda: transactions_before_sweep > 0)
    await engine.stop()
    assert 0 < transactions_before_sweep < 100


async def test_end_is_logged_where_the_file_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, value: str) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with structlog.testing.capture_logs() as logs:
        async with started(path) as node:
            assert isinstance(node.engine, SqliteEngine)
            monkeypatch.setattr(node.engine._store, "_set", fail)
    assert [each["event"] for each in logs] == ["store not closed"]
    async with started(path):
        pass  # it can be opened again


async def test_page_of_large_events_is_bounded_in_bytes(path: Path) -> None:
    async with started(path, history_bytes=2**30) as node:
        for n in range(12):
            await publish(node, "a", f"{n}" + "x" * 1_000_000)
        seen: list[int] = []
        more = True
        while more:
            page = await node.result("history", "a", Position(None, len(seen)), 1000)
            assert 1 <= len(page.events) <= 5
            assert page.complete
            seen += [event.offset for event in page.events]
            more = page.more
        assert seen == list(range(1, 13))
        newest = await node.result("history", "a", None, 1000)
        assert [event.offset for event in newest.events] == list(range(13 - len(newest.events), 13))
        assert 1 <= len(newest.events) <= 5


async def test_damaged_part_is_a_matter_of_its_readers_alone(path: Path) -> None:
    async with started(path, "normal") as node:
        await publish(node, "bad", 1)
        engine = node.engine
        assert isinstance(engine, SqliteEngine)
        engine._store.db.execute("UPDATE events SET data = x'00'")
        with structlog.testing.capture_logs() as logs:
            for _ in range(2):
                node.publish("good", 1)
                failed = await node.result("history", "bad", Position(None, 0), 10)
                node.publish("good", 2)
                await node.answered()
                assert isinstance(failed, Unavailable)
                assert all(isinstance(answer, Position) for _, answer in node.answers)
        assert [each["event"] for each in logs] == ["history not read"]
        assert [data for _, _, data in await read(node, "good", Position(None, 0))] == [1, 2, 1, 2]


async def test_sweep_writes_nothing_where_nothing_has_grown_too_old(path: Path) -> None:
    async with started(path) as node:
        for n in range(20):
            await publish(node, f"a{n}", 1, retention=Retention(100, age=1000.0))
            await publish(node, f"t{n}", 1, key="k", retention=Retention(100, compact=True))
    store = Store(path, Limits())
    before = store.db.total_changes
    store.sweep(time.time(), 1000.0)
    assert store.db.total_changes == before
    store.sweep(time.time() + 2000.0, 1000.0)
    assert store.db.total_changes >= before + 20
    store.close()


async def test_restored_backup_begins_every_numbering_anew(path: Path) -> None:
    async with started(path) as node:
        before = await publish(node, "a", 1, 2, 3, dedup=None)
        tools.backup(path, path.with_name("copy.db"))
        ahead = await publish(node, "a", 4, 5)
    for file in path.parent.glob("broker.db*"):
        file.unlink()
    path.with_name("copy.db").rename(path)
    async with started(path) as node:
        page = await node.result("history", "a", ahead, 10)
        assert not page.complete
        assert page.epoch != before.epoch
        assert [event.offset for event in page.events] == [1, 2, 3]
        restored = await publish(node, "a", 6)
        assert restored == Position(page.epoch, 4)
    async with started(path) as node:
        assert await node.result("position", "a") == restored, "once"


async def test_what_waits_on_both_paths_is_bounded_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engines.sqlite.MAX_WAITING_BYTES", 10_000)
    engine = SqliteEngine(path, durability="normal")
    async with serving(engine, topics=[TopicRule("log.*", history=1000)], max_inflight=64) as harness:
        client = await harness.connect()
        await client.ask("publish", topic="log.a", data=0)  # from now on there is a route
        engine.committing = lambda: time.sleep(0.2)
        # With a `dedup` a publish takes the slow path.
        for n in range(9):
            await client.tell("publish", topic="log.b", data="x" * 1000, id=f"slow{n}", dedup=str(n))
        for n in range(9):
            await client.tell("publish", topic="log.a", data="x" * 1000, id=f"fast{n}")
        most = 0
        answers: list[dict[str, Any]] = []
        while len(answers) < 18:
            answers.append(await client.next())
            most = max(most, engine._bytes + engine._keeper.waiting_bytes)
        assert most <= 10_000
        assert {answer.get("code") for answer in answers} == {None, "unavailable"}
        assert engine._keeper.most_bytes == engine._bytes + 10_000 == 10_000


async def test_topic_that_becomes_compacted_keeps_the_newest_of_each_key(path: Path) -> None:
    async with started(path) as node:
        for key in ("a", "b", "a", None):
            await publish(node, "t", 1, key=key)
        await publish(node, "t", 2, key="b", retention=Retention(10, compact=True))
        assert [(offset, key) for offset, key, _ in await read(node, "t")] == [(3, "a"), (4, None), (5, "b")]
        page = await node.result("history", "t", Position(None, 0), 10)
        assert page.complete


async def test_retention_by_bytes_and_age(path: Path) -> None:
    async with started(path) as node:
        for n in range(20):
            await publish(node, "a", n, retention=Retention(100, bytes=10))
        assert [offset for offset, _, _ in await read(node, "a")] == [16, 17, 18, 19, 20]
        await publish(node, "b", 1, retention=Retention(100, age=1.0))
        await publish(node, "t", None, key="k", retention=Retention(100, compact=True, tombstone_age=1.0))
    store = Store(path, Limits())
    now = 0.0
    assert not store.sweep(now, 100.0)
    assert store.history("b", None, 10).events  # type: ignore[union-attr]
    while store.sweep(2e10, 100.0):
        pass
    assert store.history("b", None, 10).events == store.history("t", None, 10).events == []  # type: ignore[union-attr]
    assert not store.history("t", Position(None, 0), 10).complete  # type: ignore[union-attr]
    assert store.position("b").offset == 1
    store.close()


async def test_totals_refuse_publishes_and_nothing_else(path: Path) -> None:
    async with started(path, history_topics=2, history_bytes=65536) as node:
        await publish(node, "a", 1)
        await publish(node, "b", "x" * 70_000)
        assert isinstance(await publish(node, "b", 2), Unavailable)
        assert isinstance(await publish(node, "c", 1), Unavailable)
        await publish(node, "plain", 1, retention=Retention())
        assert node.answers[-1][1] == Position()
        assert await read(node, "a") == [(1, None, 1)]


async def test_full_disk_refuses_publishes_until_there_is_room(path: Path) -> None:
    """SQLite's own bound of pages: to it the disk is full."""
    async with started(path) as node:
        await publish(node, "a", 1)
        db = node.engine._store.db  # type: ignore[attr-defined]
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 2}")
        answer = await publish(node, "a", *["x" * 10_000] * 5)
        assert isinstance(answer, Unavailable)
        assert "the disk is full" in answer.message
        before = len(node.delivered)
        await publish(node, "plain", 1, retention=Retention())
        assert len(node.delivered) == before + 1, "what needs no disk is delivered"
        assert (await read(node, "a"))[0] == (1, None, 1)
        db.execute("PRAGMA max_page_count = 1000000")
        taken = {result.offset or 0 for _, result in node.answers if isinstance(result, Position)}
        answer = await publish(node, "a", "again")
        assert answer.offset == max(taken) + 1
        assert [offset for offset, _, _ in await read(node, "a")] == list(range(1, answer.offset + 1))


async def test_failed_transaction_answers_all_of_it_and_keeps_nothing(path: Path) -> None:
    async with started(path) as node:
        await publish(node, "a", 1)

        def fail() -> None:
            node.engine.committing = None  # type: ignore[attr-defined]
            raise sqlite3.OperationalError("no")

        node.engine.committing = fail  # type: ignore[attr-defined]
        answers = node.ask("position", "a")
        node.publish("a", 2)
        await node.answered()
        await until(lambda: bool(answers))
        assert isinstance(node.answers[-1][1], Unavailable)
        assert (await publish(node, "a", 3)).offset == 2
        assert await read(node, "a") == [(1, None, 1), (2, None, 3)]
        assert node.data("a") == ["1", "3"]


async def test_publishes_beyond_the_bound_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engines.sqlite.MAX_WAITING_BYTES", 1000)
    monkeypatch.setattr("broker.engines.sqlite.MAX_WAITING", 20)
    async with started(path) as node:
        node.publish("a", "x" * 2000)
        assert isinstance(node.answers[-1][1], Unavailable)
        for n in range(100):
            node.publish("a", n)
        await node.answered()
        taken = [result for _, result in node.answers if isinstance(result, Position)]
        assert 0 < len(taken) < 100
        assert (await publish(node, "a", "again")).offset == len(taken) + 1


def test_two_brokers_cannot_have_one_file(path: Path) -> None:
    store = Store(path, Limits())
    link = path.with_name("link.db")
    link.symlink_to(path)
    with pytest.raises(StoreError, match="another broker has it open"):
        Store(link, Limits())
    with pytest.raises(StoreError, match="another broker has it open"):
        Store(path, Limits())
    store.close()
    Store(path, Limits()).close()


def test_file_of_a_newer_version_is_not_opened(path: Path) -> None:
    Store(path, Limits()).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match=r"newer version of the broker \(schema 99, this one has 1\)"):
        Store(path, Limits())


def test_file_that_is_no_store_is_not_touched(path: Path) -> None:
    path.write_bytes(b"something else, and long enough to be looked at" * 100)
    with pytest.raises(StoreError, match="no SQLite database"):
        Store(path, Limits())
    assert path.read_bytes().startswith(b"something else")
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(StoreError, match="another program"):
        Store(path, Limits())


def test_damaged_file_is_reported(path: Path) -> None:
    store = Store(path, Limits())
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        Store(path, Limits())


def test_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the folder must exist"):
        Store(tmp_path / "none" / "broker.db", Limits())


@pytest.mark.parametrize(("durability", "begins_anew"), [("full", False), ("normal", True)])
def test_machine_that_went_down_may_begin_the_numbering_anew(
    path: Path, durability: Durability, begins_anew: bool
) -> None:
    store = Store(path, Limits(), durability)
    epoch = store.epoch
    with store.db:
        store._set("boot", str(boot_time() - 1000))  # an earlier one, and it was not closed
    store.db.close()
    os.close(store._lock)
    store = Store(path, Limits(), durability)
    assert (store.epoch != epoch) == begins_anew
    store.close()


async def test_recovery_over_the_wire_from_the_file(path: Path) -> None:
    rules = [TopicRule("log.*", history=1000)]
    async with serving(SqliteEngine(path), topics=rules) as harness:
        client = await harness.subscriber("log.a")
        for n in range(5):
            answer = await client.ask("publish", topic="log.a", data=n)
        assert (answer["offset"], answer["receivers"]) == (5, 1)
        assert await client.data(5) == [0, 1, 2, 3, 4]
    async with serving(SqliteEngine(path), topics=rules) as harness:
        client = await harness.connect()
        since = {"epoch": answer["epoch"], "offset": 3}
        assert (await client.ask("subscribe", topic="log.a", since=since))["recovered"] is True
        assert await client.data(2) == [3, 4]
        assert await client.next() == {"op": "live", "topic": "log.a", "offset": 5}
        await client.ask("publish", topic="log.a", data=5)
        assert await client.data(1) == [5]


async def test_publishers_are_slowed_down_and_then_refused_when_commits_do_not_keep_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is bounded in the fast path too; each publish is answered once, and the kept ones have no hole."""
    monkeypatch.setattr("broker.engines.sqlite.MAX_WAITING", 100)
    engine = SqliteEngine(path, durability="normal")
    engine.committing = lambda: time.sleep(0.05)
    async with serving(engine, topics=[TopicRule("log.*", history=1000)], max_inflight=40) as harness:
        first = await harness.connect()
        await first.ask("publish", topic="log.a", data=0)  # from now on there is a route
        clients = [await harness.connect() for _ in range(5)]
        for n in range(60):
            for number, client in enumerate(clients):
                await client.tell("publish", topic="log.a", data=n, id=n)
                assert engine._keeper.waiting <= 100
                assert harness.session(client).connection.unanswered <= 40, number
        answers = [[await client.next() for _ in range(60)] for client in clients]
        for each in answers:
            assert sorted(answer["id"] for answer in each) == list(range(60))
        kept = [answer["offset"] for each in answers for answer in each if answer["op"] == "ok"]
        assert sorted(kept) == list(range(2, len(kept) + 2))
        refused = [answer for each in answers for answer in each if answer["op"] == "error"]
        assert {answer["code"] for answer in refused} == {"unavailable"}
        assert refused, "five times forty are more than what may wait"
        assert harness.node.context.fast_publishes > 0


async def test_failed_transaction_refuses_the_publishes_of_the_fast_path(path: Path) -> None:
    engine = SqliteEngine(path)
    async with serving(engine, topics=[TopicRule("log.*", history=1000)]) as harness:
        client = await harness.subscriber("log.a")
        await client.ask("publish", topic="log.a", data=0)

        def fail() -> None:
            engine.committing = None
            raise sqlite3.OperationalError("no")

        engine.committing = fail
        answer = await client.ask("publish", topic="log.a", data=1)
        assert (answer["code"], answer["message"], answer["retry"]) == ("unavailable", "the store failed: no", True)
        assert (await client.ask("publish", topic="log.a", data=2))["offset"] == 2
        assert await client.data(2) == [0, 2]
        assert harness.node.context.fast_publishes == 2


async def test_totals_refuse_publishes_of_the_fast_path(path: Path) -> None:
    engine = SqliteEngine(path, Limits(history_bytes=65536))
    async with serving(engine, topics=[TopicRule("log.*", history=1000)], history_bytes=65536) as harness:
        client = await harness.connect()
        assert (await client.ask("publish", topic="log.a", data=0))["op"] == "ok"
        assert (await client.ask("publish", topic="log.a", data="x" * 70_000))["op"] == "ok"
        answer = await client.ask("publish", topic="log.a", data=1)
        assert answer["code"] == "unavailable"
        assert "limits.history_bytes" in answer["message"]
        assert harness.node.context.fast_publishes == 2


# Killed


WINDOW = 200
"""Publishes without an answer, at the most."""


async def ask(socket: ClientConnection, **command: Any) -> dict[str, Any]:
    await socket.send(json.dumps({"id": "q", **command}))
    while True:
        answer: dict[str, Any] = json.loads(await socket.recv())
        if answer.get("id") == "q":
            return answer


async def load(url: str, known: dict[int, str], sent: list[str], kill: Any) -> None:
    """Publish at full speed, note each answer, and kill the broker at a random moment."""
    async with connect(url, proxy=None, compression=None) as socket:
        begun, answers = len(sent), 0

        async def write() -> None:
            while True:
                while len(sent) - begun - answers >= WINDOW:  # noqa: ASYNC110 -- the answers make room
                    await asyncio.sleep(0.001)
                data = f"{len(sent)}"
                sent.append(data)
                await socket.send(json.dumps({"op": "publish", "id": len(sent) - 1, "topic": "log.a", "data": data}))

        writer = asyncio.create_task(write())
        asyncio.get_running_loop().call_later(random.uniform(0.05, 0.5), kill)
        try:
            while True:
                answer = json.loads(await socket.recv())
                if answer["op"] == "ok":
                    answers += 1
                    assert answer["offset"] not in known, "an offset that was given twice"
                    known[answer["offset"]] = sent[answer["id"]]
        except ConnectionClosed:
            pass
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)


async def kept(url: str) -> dict[int, str]:
    """All that is kept of the topic."""
    found: dict[int, str] = {}
    async with connect(url, proxy=None, compression=None, max_size=None) as socket:
        epoch = (await ask(socket, op="history", topic="log.a", last=1))["epoch"]
        while True:
            since = {"epoch": epoch, "offset": max(found, default=0)}
            page = await ask(socket, op="history", topic="log.a", since=since, limit=1000)
            assert page["recovered"] is True
            found |= {event["offset"]: event["data"] for event in page["events"]}
            if not page["more"]:
                return found


@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_what_was_answered_is_there_after_a_kill(tmp_path: Path, durability: str) -> None:
    """`kill -9` at a random moment under load, KILLS times: 20 unless the environment says otherwise."""
    config = tmp_path / "wsbroker.toml"
    config.write_text(
        f"[server]\nengine = 'sqlite://{tmp_path}/broker.db'\ndurability = '{durability}'\nadmin = ''\n"
        "[[topics]]\nmatch = 'log.*'\nhistory = 10000000\n"
    )
    known: dict[int, str] = {}
    sent: list[str] = []
    for _ in range(KILLS // 2 + 1):
        with start_broker("--config", str(config)) as broker:
            if sent:
                found = await kept(broker.url)
                assert sorted(found) == list(range(1, len(found) + 1)), "no holes"
                assert known.items() <= found.items()
                assert len(set(found.values())) == len(found), "no event twice"
                known = found
            await load(broker.url, known, sent, broker.program.kill)
    assert len(known) > 0


class ReliablePublisher:
    """Publishes numbers, each with a `dedup`, and what was not answered once more over the next connection."""

    def __init__(self) -> None:
        self.newest = -1
        self.unanswered: set[int] = set()

    async def publish_until(self, url: str, kill: Any) -> None:
        """Publish at full speed until the broker is killed, at a random moment."""
        async with connect(url, proxy=None, compression=None) as socket:
            writer = asyncio.create_task(self._write(socket))
            asyncio.get_running_loop().call_later(random.uniform(0.05, 0.3), kill)
            try:
                while True:
                    answer = json.loads(await socket.recv())
                    if answer["op"] == "ok":
                        self.unanswered.discard(answer["id"])
            except ConnectionClosed:
                pass
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, socket: ClientConnection) -> None:
        for number in sorted(self.unanswered):
            await socket.send(self._command(number))
        while True:
            while len(self.unanswered) >= WINDOW:  # noqa: ASYNC110 -- the answers make room
                await asyncio.sleep(0.001)
            self.newest += 1
            self.unanswered.add(self.newest)
            await socket.send(self._command(self.newest))

    @staticmethod
    def _command(number: int) -> str:
        command = {"op": "publish", "id": number, "topic": "log.a", "data": number, "dedup": f"d{number}"}
        return json.dumps(command)


async def test_reliable_publisher_has_each_event_exactly_once_over_kills(tmp_path: Path) -> None:
    config = tmp_path / "wsbroker.toml"
    config.write_text(
        f"[server]\nengine = 'sqlite://{tmp_path}/broker.db'\nadmin = ''\n[limits]\ndedup_entries = 1000000\n"
        "[[topics]]\nmatch = 'log.*'\nhistory = 10000000\ndedup_age = 3600\n"
    )
    publisher = ReliablePublisher()
    for _ in range(KILLS // 4 + 1):
        with start_broker("--config", str(config)) as broker:
            await publisher.publish_until(broker.url, broker.program.kill)
    with start_broker("--config", str(config)) as broker:
        found = await kept(broker.url)
    assert sorted(found) == list(range(1, len(found) + 1)), "no holes"
    assert len(set(found.values())) == len(found), "no event twice"
    answered = set(range(publisher.newest + 1)) - publisher.unanswered
    assert answered <= set(map(int, found.values()))
    assert len(answered) > 100
