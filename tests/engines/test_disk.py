"""What the disk may do to the file of the SQLite engine: a power cut, a torn log, no room, no permission to write."""

from __future__ import annotations

import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from websockets.sync.client import ClientConnection, connect

from broker.config import Limits
from broker.engines import tools
from broker.engines.base import Event, HistoryPage, Position
from broker.engines.sqlite import MAX_WAITING_BYTES
from broker.engines.store import Store
from broker.rules import Retention
from tests.fixtures_broker import LISTENING, ROOT, start_broker, start_program

OFFERED = int(os.environ.get("OFFERED", "80"))
"""Publishes of each publisher to a slow disk."""
KEEP = Retention(10_000_000)
NAME = "broker.db"


def configured(folder: Path, at: Path, **server: str) -> Path:
    """A configuration whose file is in the folder `at`."""
    file = folder / "wsbroker.toml"
    more = "".join(f"{name} = '{value}'\n" for name, value in server.items())
    rules = "[[topics]]\nmatch = 'log.*'\nhistory = 10000000\n[[topics]]\nmatch = 'once'\ndedup_age = 3600\n"
    file.write_text(f"[server]\nengine = 'sqlite://{at}/{NAME}'\nadmin = ''\n{more}{rules}")
    return file


def ask(client: ClientConnection, **command: object) -> dict[str, object]:
    client.send(json.dumps({"id": 1, **command}))
    while (answer := json.loads(client.recv())).get("id") != 1:
        pass
    return dict(answer)


def offsets(path: Path) -> dict[int, object]:
    """All that a file has of the topic, by offset. It must be sound, and have no holes."""
    store = Store(path, Limits(history_bytes=2**40))
    try:
        page = store.history("log.a", Position(None, 0), 10_000_000)
        found = {}
        if isinstance(page, HistoryPage):
            found = {event.offset or 0: json.loads(bytes(event.data)) for event in page.events}
            assert page.top == max(found, default=0)
    finally:
        store.close()
    assert tools.check(path) == []
    assert sorted(found) == list(range(1, len(found) + 1))
    return found


# A power cut


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that copies each file when it is synced."""
    library = tmp_path_factory.mktemp("syncs") / "syncs.so"
    source = Path(__file__).with_name("syncs.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def state(copies: Path, log: list[str], at: int, target: Path) -> Path:
    """What the disk has after so many syncs: the newest copy of each file. The database in it."""
    target.mkdir()
    newest: dict[str, str] = {}
    for number, name, *names in (line.split() for line in log[:at]):
        if name == ".":
            newest = {name: number for name, number in newest.items() if name in names}
        else:
            newest[name] = number
    for name, number in newest.items():
        if not name.endswith("-shm"):
            shutil.copy(copies / f"{name}.{number}", target / name)
    return target / NAME


def test_power_cut_at_any_sync_loses_nothing_that_was_answered(tmp_path: Path, shim: Path) -> None:
    """Durability `full`: whatever was never synced is lost, and no answered event is among it."""
    here, copies = tmp_path / "data", tmp_path / "copies"
    here.mkdir()
    copies.mkdir()
    environ = {"LD_PRELOAD": str(shim), "SYNCS_FROM": str(here), "SYNCS_TO": str(copies)}
    answered: dict[int, tuple[int, list[int]]] = {}
    config = configured(tmp_path, here)
    with start_broker("--config", str(config), environ=environ) as broker, connect(broker.url, proxy=None) as client:
        client.recv()
        for n in range(100):
            for each in range(4):
                data = [n, each, "x" * random.randrange(3000)]
                client.send(json.dumps({"op": "publish", "id": 4 * n + each, "topic": "log.a", "data": data}))
                sent = data
            for _ in range(4):
                answer = json.loads(client.recv())
                assert answer["op"] == "ok"
                synced = len((copies / "log").read_text().splitlines())
                answered[answer["offset"]] = synced, [n, answer["id"] - 4 * n]
        assert sent[0] == 99
        broker.program.kill()
    log = (copies / "log").read_text().splitlines()
    assert len(log) > 50, "it syncs"
    for at in sorted({random.randrange(4, len(log)) for _ in range(40)} | {len(log)}):
        found = offsets(state(copies, log, at, tmp_path / f"state{at}"))
        for offset, (synced, expected) in answered.items():
            if synced <= at:
                assert found[offset][:2] == expected, f"event {offset}, answered after {synced} syncs, at {at}"  # type: ignore[index]


def test_power_cut_is_noticed_where_syncs_are_missing(tmp_path: Path, shim: Path) -> None:
    """The planted fault: under `normal` a commit is not synced, so an answered event is lost, and the check sees it."""
    here, copies = tmp_path / "data", tmp_path / "copies"
    here.mkdir()
    copies.mkdir()
    environ = {"LD_PRELOAD": str(shim), "SYNCS_FROM": str(here), "SYNCS_TO": str(copies)}
    config = configured(tmp_path, here, durability="normal")
    with start_broker("--config", str(config), environ=environ) as broker, connect(broker.url, proxy=None) as client:
        client.recv()
        last = ask(client, op="publish", topic="log.a", data=1)["offset"]
        broker.program.kill()
    log = (copies / "log").read_text().splitlines()
    assert last not in offsets(state(copies, log, len(log), tmp_path / "state"))


# A slow disk


def flood(url: str, count: int, size: int) -> collections.Counter[str]:
    """Publish so many events of this size without waiting for an answer; counts the answers by `op` or error code."""
    answers: collections.Counter[str] = collections.Counter()
    with connect(url, proxy=None, compression=None, ping_interval=None) as client:
        client.recv()

        def read() -> None:
            for _ in range(count):
                answer = json.loads(client.recv())
                answers[answer.get("code") or answer["op"]] += 1

        reading = threading.Thread(target=read)
        reading.start()
        for n in range(count):
            client.send(json.dumps({"op": "publish", "id": n, "topic": "log.a", "data": "x" * size}))
        reading.join()
    return answers


def test_memory_is_bounded_while_the_disk_is_slow(tmp_path: Path, shim: Path) -> None:
    """Publishers are slowed down and then told `unavailable`, and what waits takes up no more than its bound."""
    here = tmp_path / "data"
    here.mkdir()
    environ = {"LD_PRELOAD": str(shim), "SYNCS_DELAY": "100"}
    config = configured(tmp_path, here)
    publishers, size = 30, 60_000  # each may have 64 publishes unanswered
    with start_broker("--config", str(config), environ=environ) as broker:
        status = Path(f"/proc/{broker.program.pid}/status")
        before = peak(status)
        with ThreadPoolExecutor(publishers) as threads:
            answers = sum(
                threads.map(lambda _: flood(broker.url, OFFERED, size), range(publishers)), collections.Counter[str]()
            )
        grown = peak(status) - before
    assert set(answers) == {"ok", "unavailable"}, answers
    assert answers.total() == publishers * OFFERED
    # What waits, what is packed for the transaction, and what SQLite has of it: no more, however long it lasts.
    assert grown < 3.5 * MAX_WAITING_BYTES, "however much is offered"


def peak(status: Path) -> int:
    """The most memory that a process has had, in bytes."""
    (kibi,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(kibi) * 1024


# A torn log


def test_torn_log_keeps_a_prefix_of_the_commits(tmp_path: Path) -> None:
    """The end of the write-ahead log is cut or overwritten: the file opens with the transactions before it, whole."""
    path = tmp_path / NAME
    store = Store(path, Limits())
    for n in range(60):
        store.begin(time.time())
        for each in range(5):
            store.publish(Event("log.a", json.dumps([n, each, "x" * 100]).encode()), KEEP)
        store.commit()
    files = {name: (tmp_path / name).read_bytes() for name in (NAME, f"{NAME}-wal")}
    store.close()
    lengths = set()
    for n in range(60):
        target = tmp_path / f"torn{n}"
        target.mkdir()
        wal = bytearray(files[f"{NAME}-wal"])
        at = random.randrange(40_000, len(wal))
        if n % 2:
            del wal[at:]
        else:
            wal[at : at + 64] = random.randbytes(64)
        (target / NAME).write_bytes(files[NAME])
        (target / f"{NAME}-wal").write_bytes(wal)
        found = offsets(target / NAME)
        assert len(found) % 5 == 0, "a part of a transaction"
        assert [data[:2] for data in found.values()] == [[n // 5, n % 5] for n in range(len(found))]  # type: ignore[index]
        lengths.add(len(found))
    assert len(lengths) > 10, "they were torn at different places"


# No room, no permission


@pytest.mark.needs("snippets")
def test_real_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    """A file system of 2 MiB: publishes are refused, topics without history go on, and space makes it work again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = configured(tmp_path, disk)
    script = (
        f"mount -t tmpfs -o size=2m none {disk} && head -c 1m /dev/zero > {disk}/ballast && "
        f"(while [ ! -e {tmp_path}/room ]; do sleep 0.05; done; rm {disk}/ballast) & "
        f"while [ ! -e {disk}/ballast ]; do sleep 0.05; done; "
        f"exec {sys.executable} -m broker serve --listen 127.0.0.1:0 --config {config}"
    )
    code = "import os, sys; os.execvp('unshare', ['unshare', '-rm', 'sh', '-c', sys.argv[1]])"
    with start_program("-c", code, script) as program:
        port = program.wait_for(LISTENING)["port"]
        with connect(f"ws://127.0.0.1:{port}/", proxy=None) as client:
            client.recv()
            taken = 0
            while (answer := ask(client, op="publish", topic="log.a", data="x" * 20_000))["op"] == "ok":
                taken += 1
            assert answer["code"] == "unavailable"
            assert answer["retry"] is True
            assert "the disk is full" in str(answer["message"])
            assert taken > 5
            assert ask(client, op="publish", topic="plain", data=1)["op"] == "ok"
            page = ask(client, op="history", topic="log.a", last=1)
            assert page["offset"] == taken
            (tmp_path / "room").touch()
            for _ in range(200):
                answer = ask(client, op="publish", topic="log.a", data="again")
                if answer["op"] == "ok":
                    break
                time.sleep(0.05)
            assert answer["offset"] == taken + 1
        program.terminate()
        assert program.wait() == 0
        assert "store works again" in program.output


@pytest.mark.needs("snippets")
def test_read_only_file_system_is_a_clear_failure_of_the_start(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    Store(disk / NAME, Limits()).close()
    config = configured(tmp_path, disk)
    script = (
        f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk} && "
        f"exec {sys.executable} -m broker serve --listen 127.0.0.1:0 --config {config}"
    )
    finished = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 1, finished.stderr
    assert "Read-only file system" in finished.stderr
    assert "the broker must be able to write there" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.needs("snippets")
def test_file_system_that_becomes_read_only_refuses_publishes_and_goes_on_reading(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    config = configured(tmp_path, disk)
    script = (
        f"mount -t tmpfs none {disk} && (while [ ! -e {tmp_path}/freeze ]; do sleep 0.05; done; "
        f"mount -o remount,ro {disk} || mount -o remount,bind,ro {disk}; touch {tmp_path}/frozen) & "
        f"while ! mountpoint -q {disk}; do sleep 0.05; done; "
        f"exec {sys.executable} -m broker serve --listen 127.0.0.1:0 --config {config}"
    )
    code = "import os, sys; os.execvp('unshare', ['unshare', '-rm', 'sh', '-c', sys.argv[1]])"
    with start_program("-c", code, script) as program:
        port = program.wait_for(LISTENING)["port"]
        with connect(f"ws://127.0.0.1:{port}/", proxy=None) as client:
            client.recv()
            assert ask(client, op="publish", topic="log.a", data=1)["offset"] == 1
            (tmp_path / "freeze").touch()
            while not (tmp_path / "frozen").exists():
                time.sleep(0.02)
            answer = ask(client, op="publish", topic="log.a", data="x" * 100_000)
            # A file system with files open for writing may refuse to become read-only; then nothing is lost.
            if answer["op"] == "error":
                assert answer["code"] == "unavailable"
            assert ask(client, op="publish", topic="plain", data=1)["op"] == "ok"
            page = ask(client, op="history", topic="log.a", last=10)
            assert page["events"][0] == {"offset": 1, "data": 1}  # type: ignore[index]
        program.terminate()
        program.wait()


def test_damaged_part_of_the_file_is_told_of_where_it_is_read(tmp_path: Path) -> None:
    config = configured(tmp_path, tmp_path)
    with start_broker("--config", str(config)) as broker, connect(broker.url, proxy=None) as client:
        client.recv()
        for n in range(100):
            assert ask(client, op="publish", topic="log.a", data="x" * 9000)["op"] == "ok", n
    content = bytearray((tmp_path / NAME).read_bytes())
    half = len(content) // 2 // 4096 * 4096
    content[half:] = b"\xff" * (len(content) - half)
    (tmp_path / NAME).write_bytes(content)
    with start_broker("--config", str(config)) as broker, connect(broker.url, proxy=None) as client:
        client.recv()
        answer = ask(client, op="history", topic="log.a", since={"epoch": "e", "offset": 0}, limit=1000)
        assert (answer["code"], answer["retry"]) == ("unavailable", True)
        assert "the file is damaged; restore a backup" in str(answer["message"])
        assert ask(client, op="publish", topic="plain", data=1)["op"] == "ok"
        assert "store failed" in broker.program.output


# `dedup` without history


def test_dedup_on_a_topic_without_history_outlives_a_kill(tmp_path: Path) -> None:
    config = configured(tmp_path, tmp_path)
    with start_broker("--config", str(config)) as broker, connect(broker.url, proxy=None) as client:
        client.recv()
        first = ask(client, op="publish", topic="once", data=1, dedup="a")
        assert first == {"op": "ok", "id": 1, "receivers": 0, "queued": 0, "dropped": 0}
        broker.program.kill()
    with start_broker("--config", str(config)) as broker, connect(broker.url, proxy=None) as client:
        client.recv()
        again = ask(client, op="publish", topic="once", data=1, dedup="a")
        assert again["duplicate"] is True
        assert "offset" not in again
        assert "duplicate" not in ask(client, op="publish", topic="once", data=1, dedup="b")
