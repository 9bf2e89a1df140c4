"""The watch: what held the loop up, how much memory there is, and that few descriptors are enough for a few."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from broker import watch
from broker.watch import MEMORY, TICK, Watch, most_descriptors, open_descriptors
from tests.admin.test_server import get
from tests.fixtures_daemon import TIMEOUT, launched
from tests.fixtures_node import House, serving
from tests.net.house import until

STOOD = "the event loop stood still"


@asynccontextmanager
async def watched(house: House, levels: list[int] | None = None) -> AsyncIterator[Watch]:
    """A watch over the loop of the test."""
    found = Watch(
        asyncio.get_running_loop(), house.node.reactor, (lambda level: None) if levels is None else levels.append
    )
    found.start()
    try:
        yield found
    finally:
        found.stop()


async def warning(house: House, hold_up: Any) -> dict[str, Any]:
    """What is logged when the loop is held up."""
    async with watched(house) as found:
        with capture_logs() as logs:
            ticks = sum(found.lag.counts)
            hold_up()
            await until(lambda: sum(found.lag.counts) > ticks)
        [entry] = [entry for entry in logs if entry["event"] == STOOD]
        assert entry["seconds"] > 0.5
        return dict(entry)


def waiting() -> None:
    time.sleep(1 + TICK)


def working() -> None:
    until = time.monotonic() + 1 + TICK
    while time.monotonic() < until:
        sum(range(1000))


async def test_a_call_that_waits_is_named() -> None:
    async with serving() as house:
        entry = await warning(house, waiting)
        assert entry["cause"] == "a call that waits"
        assert entry["where"].startswith("waiting (test_watch.py:")


async def test_a_call_that_works_is_named() -> None:
    async with serving() as house:
        entry = await warning(house, working)
        assert entry["cause"] == "a call that works"
        assert "working (test_watch.py:" in entry["where"]


async def test_a_fan_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LATE", 0.02)  # what this test can bring about in a moment
    event = b'{"op":"event","topic":"a","data":"' + b"x" * 5000 + b'"}'
    async with serving(max_queue=100, max_outbox=2**30) as house:
        subscribers = [await house.subscriber("a") for _ in range(50)]
        audience = house.node.hub.audience("a")
        async with watched(house):
            with capture_logs() as logs:
                for _ in range(50):
                    for _ in range(1000):
                        audience.publish("a", event)
                    await asyncio.sleep(0.01)
                    if any(entry["event"] == STOOD for entry in logs):
                        break
        [entry] = [entry for entry in logs if entry["event"] == STOOD]
        assert entry["cause"] == "fan-out"
        assert entry["writing"] > 0.01
        assert entry["deliveries"] >= 0
        for client in subscribers:
            client.socket.transport.abort()


async def test_a_process_that_was_stopped_is_told_from_one_that_hangs() -> None:
    async with launched("--listen", "127.0.0.1:0") as daemon:
        await daemon.started()
        daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(1)
        daemon.signal(signal.SIGCONT)
        line = await daemon.until(STOOD)
        assert "cause='the process did not run'" in line
        assert re.search(r"seconds=(0\.[789]|1\.)", line)


async def test_it_warns_now_and_then_only() -> None:
    async with serving() as house, watched(house) as found:
        with capture_logs() as logs:
            for _ in range(2):
                ticks = sum(found.lag.counts)
                time.sleep(0.6 + TICK)  # noqa: ASYNC251 -- it is to be late
                await until(lambda ticks=ticks: sum(found.lag.counts) > ticks)  # type: ignore[misc]
        assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [STOOD]


# Memory


async def test_the_levels_of_memory() -> None:
    async with serving() as house:
        levels: list[int] = []
        async with watched(house, levels) as found:
            with capture_logs() as logs:
                for bound, level in ((found.memory * 100 // 95, 1), (1, 2), (None, 0)):
                    found.max_memory = bound
                    await until(lambda level=level: found.level == level)  # type: ignore[misc]
        assert levels == [1, 2, 0]
        assert [entry["event"] for entry in logs if entry["event"] in MEMORY] == [MEMORY[1], MEMORY[2], MEMORY[0]]


async def test_without_memory_nobody_is_let_in_and_publishers_are_slowed_down(tmp_path: Any) -> None:
    file = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched("--admin", "127.0.0.1:0", folder=tmp_path, config=file) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            # Less than it has already.
            daemon.configure(file + "[limits]\nmax_memory = 16777216\n")
            daemon.signal(signal.SIGHUP)
            await daemon.until(MEMORY[2])
            with pytest.raises(InvalidStatus) as refused:
                await connect(daemon.url).__aenter__()
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["Retry-After"]
            assert (await get(daemon.admin, "/readyz")).json["reason"] == "out of memory"
            assert (
                'wsbroker_connections_refused_total{reason="memory"} 1.0' in (await get(daemon.admin, "/metrics")).body
            )
            loop = asyncio.get_running_loop()
            began = loop.time()
            for n in range(5):
                await client.send(json.dumps({"op": "publish", "id": n, "topic": "a", "data": n}))
            for _ in range(5):
                assert json.loads(await client.recv())["op"] == "ok"
            assert loop.time() - began > 0.3  # four times a tenth of a second, with no bound above
            daemon.configure(file)
            daemon.signal(signal.SIGHUP)
            await daemon.until(MEMORY[0])
            async with connect(daemon.url) as other:
                await other.recv()


# Descriptors


def test_descriptors_are_counted() -> None:
    before = open_descriptors()
    assert before is not None
    file = os.open(os.devnull, os.O_RDONLY)
    assert open_descriptors() == before + 1
    os.close(file)
    assert before < most_descriptors()


async def test_sixty_four_descriptors_are_enough_for_some_and_the_others_are_told() -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    arguments = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    async with launched(*arguments, before=few) as daemon:
        await daemon.started()
        room = int(daemon.log[-1].split("max_connections=")[1].split()[0])
        assert room == 16
        clients = [await connect(daemon.url, proxy=None) for _ in range(room)]
        for _ in range(20):
            with pytest.raises(InvalidStatus) as refused:
                await connect(daemon.url, proxy=None).__aenter__()
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["Retry-After"]
        # Silent ones take up what is left beside them. It does not spin, and answers its operators.
        host, _, port = daemon.addresses[0].rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
        before = cpu(daemon.process.pid)
        await asyncio.sleep(0.5)
        assert cpu(daemon.process.pid) - before < 0.25
        metrics = (await get(daemon.admin, "/metrics")).body
        full = re.search(r'wsbroker_connections_refused_total\{reason="full"\} (\d+)', metrics)
        assert full is not None
        assert int(full[1]) >= 20
        assert "wsbroker_max_fds 64.0" in metrics
        for _, writer in silent:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in silent), return_exceptions=True)
        # Recovered: a place that becomes free is taken.
        await clients.pop().close()
        async with asyncio.timeout(TIMEOUT):
            while len(clients) < room:
                try:
                    clients.append(await connect(daemon.url, proxy=None))
                except (InvalidStatus, ConnectionError):
                    continue
        for client in clients:
            await client.close()
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


def cpu(pid: int) -> float:
    """CPU time of a process, in seconds (proc(5), stat)."""
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 -- a file of the kernel's
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
