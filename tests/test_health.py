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

from broker import health
from broker.health import MEMORY_EVENTS, TICK, HealthMonitor, max_descriptors, open_descriptors
from tests.admin.test_server import descriptors, get
from tests.fixtures_daemon import TIMEOUT, launched, mute
from tests.fixtures_node import Harness, masked, serving
from tests.net.harness import until

STOOD = "event loop blocked"


@asynccontextmanager
async def watched(harness: Harness, levels: list[int] | None = None) -> AsyncIterator[HealthMonitor]:
    """A watch over the loop of the test."""
    found = HealthMonitor(
        asyncio.get_running_loop(), harness.node.context, (lambda level: None) if levels is None else levels.append
    )
    found.start()
    try:
        yield found
    finally:
        found.stop()


async def warning(harness: Harness, hold_up: Any) -> dict[str, Any]:
    """What is logged when the loop is held up."""
    async with watched(harness) as found:
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


async def test_blocking_call_is_logged_with_its_stack() -> None:
    async with serving() as harness:
        entry = await warning(harness, waiting)
        assert entry["cause"] == "blocking call"
        assert entry["where"].startswith("waiting (test_health.py:")


async def test_busy_call_is_logged_with_its_stack() -> None:
    async with serving() as harness:
        entry = await warning(harness, working)
        assert entry["cause"] == "busy call"
        assert "working (test_health.py:" in entry["where"]


async def test_long_fan_out_is_logged_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "BLOCKED_AFTER", 0.001)  # what this test can bring about in a moment
    async with serving() as harness:
        clients = [await harness.subscriber("a") for _ in range(40)]
        audience = harness.node.hub.audience("a")
        for client in clients:
            client.socket.transport.pause_reading()  # they are in the same loop, and would hold it up too

        async def attempt() -> dict[str, Any]:
            async with watched(harness) as found:
                with capture_logs() as logs:
                    ticks = sum(found.lag.counts)
                    time.sleep(TICK)  # noqa: ASYNC251 -- from now on the tick is late
                    for _ in range(100):
                        audience.publish("a", b'{"op":"event"}')
                        harness.node.context.flush()
                    await until(lambda: sum(found.lag.counts) > ticks)
            return dict(next((entry for entry in logs if entry["event"] == STOOD), {}))

        # On a busy machine others may run just then.
        for _ in range(20):
            if (entry := await attempt()).get("cause") == "fan-out":
                break
        assert entry["cause"] == "fan-out"
        assert entry["write_seconds"] > 0
        assert entry["deliveries"] == 100 * len(clients)
        for client in clients:
            client.socket.transport.resume_reading()


async def test_blocking_call_before_a_write_is_logged_as_the_cause() -> None:
    async with serving() as harness:
        client = await harness.connect()
        connection = harness.session(client).connection
        async with watched(harness) as found:
            with capture_logs() as logs:
                ticks = sum(found.lag.counts)
                # In one turn of the loop: something to write comes up, something waits, and it is written.
                asyncio.get_running_loop().call_soon(waiting)
                connection.answer(b'{"op":"pong"}')
                await until(lambda: sum(found.lag.counts) > ticks)
        [entry] = [entry for entry in logs if entry["event"] == STOOD]
        assert entry["cause"] == "blocking call"
        assert entry["where"].startswith("waiting (test_health.py:")


async def test_hanging_loop_is_logged_by_the_watchdog_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HANGS_AFTER", 0.4)
    async with serving() as harness, watched(harness):
        with capture_logs() as logs:

            def forever() -> None:
                while not any(entry["event"] == "event loop hangs" for entry in logs):
                    time.sleep(0.01)
                time.sleep(0.3)  # it is told once

            forever()
        [entry] = [entry for entry in logs if entry["event"] == "event loop hangs"]
        assert "forever (test_health.py:" in entry["where"]
        assert entry["seconds"] > 0.4


async def test_stopped_process_is_told_from_a_hanging_loop() -> None:
    async with launched("--listen", "127.0.0.1:0") as daemon:
        await daemon.started()
        daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(1)
        daemon.signal(signal.SIGCONT)
        line = await daemon.until(STOOD)
        assert "cause='process not scheduled'" in line
        assert re.search(r"seconds=(0\.[789]|1\.)", line)


async def test_loop_warnings_are_rate_limited() -> None:
    async with serving() as harness, watched(harness) as found:
        with capture_logs() as logs:
            for _ in range(2):
                ticks = sum(found.lag.counts)
                time.sleep(0.6 + TICK)  # noqa: ASYNC251 -- it is to be late
                await until(lambda ticks=ticks: sum(found.lag.counts) > ticks)  # type: ignore[misc]
        assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [STOOD]


# Memory


@pytest.mark.parametrize(
    ("memory", "levels"),
    [
        ([0, 89, 90, 99, 100], [0, 0, 1, 1, 2]),
        # A bound that was reached is kept until it is left for good.
        ([90, 89, 86, 85, 89], [1, 1, 1, 0, 0]),
        ([100, 99, 96, 94, 99, 100], [2, 2, 2, 1, 1, 2]),
        ([100, 86, 100, 85], [2, 1, 2, 0]),
    ],
)
async def test_memory_pressure_has_hysteresis(
    memory: list[int], levels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as harness:
        found = HealthMonitor(asyncio.get_running_loop(), harness.node.context, lambda level: None)
        found.max_memory = 100
        seen = []
        for now in memory:
            monkeypatch.setattr(HealthMonitor, "memory", now)
            found._check_memory()
            seen.append(found.level)
        assert seen == levels


async def test_memory_pressure_levels_follow_the_bounds() -> None:
    async with serving() as harness:
        levels: list[int] = []
        async with watched(harness, levels) as found:
            with capture_logs() as logs:
                for bound, level in ((found.memory * 100 // 95, 1), (1, 2), (None, 0)):
                    found.max_memory = bound
                    await until(lambda level=level: found.level == level)  # type: ignore[misc]
        assert levels == [1, 2, 0]
        assert [entry["event"] for entry in logs if entry["event"] in MEMORY_EVENTS] == [
            MEMORY_EVENTS[1],
            MEMORY_EVENTS[2],
            MEMORY_EVENTS[0],
        ]


async def test_memory_limit_refuses_connections_and_throttles_publishers(tmp_path: Any) -> None:
    file = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched("--admin", "127.0.0.1:0", folder=tmp_path, config=file) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            # Less than it has already.
            daemon.configure(file + "[limits]\nmax_memory = 16777216\n")
            daemon.signal(signal.SIGHUP)
            await daemon.until(MEMORY_EVENTS[2])
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
            await daemon.until(MEMORY_EVENTS[0])
            async with connect(daemon.url) as other:
                await other.recv()


async def test_freed_memory_ends_the_memory_pressure(tmp_path: Any) -> None:
    file = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\nmax_queue = 60000\nmax_outbox = 1000000000\n'
    async with launched("--admin", "127.0.0.1:0", folder=tmp_path, config=file) as daemon:
        await daemon.started()
        before = resident(daemon.process.pid)
        async with connect(daemon.url, max_queue=1) as deaf, mute(daemon.addresses[0]) as busy:
            await deaf.send('{"op":"subscribe","id":1,"topic":"a"}')
            await deaf.recv()
            await deaf.recv()
            deaf.transport.pause_reading()
            # Between the events is what stays: small things that keep the heap from shrinking by itself.
            event = masked(b'{"op":"publish","topic":"a","data":"' + b"x" * 1500 + b'"}')
            for n in range(500):
                busy.write(event * 100 + masked(b'{"op":"subscribe","topic":"b.%d"}' % n))
                await busy.drain()
            await until(lambda: resident(daemon.process.pid) > before + 60_000_000)
            full = resident(daemon.process.pid)
            bound = (before + full) // 2
            daemon.configure(file + f"max_memory = {bound}\n")
            daemon.signal(signal.SIGHUP)
            await daemon.until(MEMORY_EVENTS[2])
            assert (await get(daemon.admin, "/readyz")).json["reason"] == "out of memory"
            deaf.transport.abort()
            await daemon.until(MEMORY_EVENTS[0])
            assert resident(daemon.process.pid) < bound
            assert (await get(daemon.admin, "/readyz")).status == 200
            async with connect(daemon.url) as other:
                await other.recv()
                for n in range(100):  # it would take ten seconds
                    await other.send(json.dumps({"op": "publish", "id": n, "topic": "b", "data": n}))
                async with asyncio.timeout(5):
                    for n in range(100):
                        assert json.loads(await other.recv())["id"] == n


def resident(pid: int) -> int:
    """Memory of a process, in bytes (proc(5), statm)."""
    with open(f"/proc/{pid}/statm") as statm:  # noqa: PTH123 -- a file of the kernel's
        return int(statm.read().split()[1]) * resource.getpagesize()


# Descriptors


def test_open_descriptors_are_counted() -> None:
    before = open_descriptors()
    assert before is not None
    file = os.open(os.devnull, os.O_RDONLY)
    assert open_descriptors() == before + 1
    os.close(file)
    assert before < max_descriptors()


async def test_broker_with_64_descriptors_serves_some_clients_and_refuses_others() -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    arguments = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    async with launched(*arguments, before=few) as daemon:
        await daemon.started()
        capacity = int(daemon.log[-1].split("max_connections=")[1].split()[0])
        assert capacity == 16
        clients = [await connect(daemon.url, proxy=None) for _ in range(capacity)]
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
        assert cpu(daemon.process.pid) - before < 0.1  # a loop that spins would have taken up what it can
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
            while len(clients) < capacity:
                try:
                    clients.append(await connect(daemon.url, proxy=None))
                except (InvalidStatus, ConnectionError):
                    continue
        for client in clients:
            await client.close()
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


async def test_connected_clients_are_served_without_free_descriptors() -> None:
    async with launched("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0") as daemon:
        await daemon.started()
        host, _, port = daemon.addresses[0].rpartition(":")
        async with connect(daemon.url) as client:
            await client.recv()
            # From now on the process may open nothing more: the lowest number that is free is over the limit.
            _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
            open_now = descriptors(daemon.process.pid)
            most = min(set(range(len(open_now) + 1)) - open_now)
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (most, hard))
            closed = [await asyncio.open_connection(host, int(port)) for _ in range(5)]
            for reader, _ in closed:
                assert await asyncio.wait_for(reader.read(), TIMEOUT) == b""
            before = cpu(daemon.process.pid)
            for n in range(5):
                await asyncio.sleep(0.1)
                await client.send(json.dumps({"op": "ping", "id": n}))
                assert json.loads(await client.recv())["id"] == n
            assert cpu(daemon.process.pid) - before < 0.2
            assert (await get(daemon.admin, "/livez")).status == 200
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
            async with asyncio.timeout(TIMEOUT):
                async with connect(daemon.url) as other:
                    await other.recv()
            for _, writer in closed:
                writer.transport.abort()


def cpu(pid: int) -> float:
    """CPU time of a process, in seconds (proc(5), stat)."""
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 -- a file of the kernel's
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
