"""Open loops, stalled subscribers, and what the load program tells on its way."""

import asyncio
import json
from collections.abc import Iterable

import pytest
from websockets.asyncio.server import ServerConnection

from bench.measure import Publishing
from bench.peers import FLOOR, Talk, event
from tests.bench.loading import load, relay, send_to_each


async def test_an_open_loop_publishes_at_its_rate() -> None:
    async with relay() as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=4, topics=2, rate=400, warmup=0, duration=0.5
        )
    assert (status, complaint) == (0, "")
    result = json.loads(output)
    assert (result["rate"], result["window"]) == (400, 0)
    # The times are those of the plan: no more than it, and what was late is counted as such.
    assert result["total_publishes"] == server.published
    assert 150 <= result["total_publishes"] + result["unsent"] <= 240


async def test_latencies_of_an_open_loop_count_from_the_intended_time() -> None:
    """A server that stands still for 0.3 s makes all late that should have been sent meanwhile."""
    stood_still = False

    async def stand_still(subscribers: Iterable[ServerConnection], message: str) -> None:
        nonlocal stood_still
        if not stood_still:
            stood_still = True
            await asyncio.sleep(0.3)
        await send_to_each(subscribers, message)

    async with relay(stand_still) as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=1, rate=100, warmup=0, duration=0.6, patience=5
        )
    assert (status, complaint) == (0, "")
    latency = json.loads(output)["delivery_us"]
    # Of some 60 events 30 came late, by 0 to 300 ms, evenly: a closed loop would have seen a single one.
    assert latency["max"] >= 290_000
    assert latency["p90"] >= 150_000


async def test_reports_how_much_the_server_does_not_take() -> None:
    stats = True

    async def stand(subscribers: Iterable[ServerConnection], message: str) -> None:
        nonlocal stats
        if stats:
            stats = False
            await asyncio.sleep(0.6)
        await send_to_each(subscribers, message)

    async with relay(stand) as server:
        # 16 kB each, so that all buffers of the kernel's are full before the end.
        big = event(Talk(16_000))
        status, output, complaint = await load(
            "publish", server.port, subscribers=1, rate=5000, warmup=0, duration=0.4, publish=big, event=big
        )
    assert (status, complaint) == (0, "")
    result = json.loads(output)
    assert result["unsent"] > 0
    assert result["total_publishes"] == server.published < 2000


async def test_stalled_subscribers_subscribe_and_do_not_read() -> None:
    received = 0

    async def send(subscribers: Iterable[ServerConnection], message: str) -> None:
        nonlocal received
        for subscriber in subscribers:
            received += 1
            subscriber.transport.write(b"\x81\x7e" + len(message).to_bytes(2, "big") + message.encode())

    async with relay(send) as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=2, stalled=3, window=4, warmup=0, duration=0.2, sample=0.05
        )
        assert (status, complaint) == (0, "")
        result = json.loads(output)
        assert len(server.subscribers["t00000"]) == 5
        assert received == 5 * result["total_publishes"]
    assert result["stalled"] == 3
    assert result["total_deliveries"] == 2 * result["total_publishes"]
    assert len(result["samples"]) >= 3
    assert all(rss > 1_000_000 for _, rss in result["samples"])
    assert [seconds for seconds, _ in result["samples"]] == sorted(seconds for seconds, _ in result["samples"])


async def test_ends_when_the_server_takes_too_much_memory() -> None:
    async with relay() as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=2, window=4, warmup=0, duration=60, sample=0.01, most_memory=1
        )
    assert (status, complaint) == (0, "")
    result = json.loads(output)
    assert result["seconds"] < 50
    assert [rss > 1_000_000 for _, rss in result["samples"]] == [True]
    assert result["total_publishes"] == server.published


async def test_reports_progress() -> None:
    async with relay() as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=2, window=2, warmup=0.1, duration=0.2, progress=0.02
        )
    assert (status, complaint) == (0, "")
    *lines, last = map(json.loads, output.splitlines())
    shown = [line["progress"] for line in lines]
    assert (
        {"warmup", "measuring"}
        <= {each["phase"] for each in shown}
        <= {
            "connecting",
            "warmup",
            "measuring",
            "draining",
        }
    )
    assert shown[-1]["deliveries"] <= last["total_deliveries"]
    assert [each["deliveries"] for each in shown] == sorted(each["deliveries"] for each in shown)
    assert any(0 < each["p50_us"] <= each["p99_us"] for each in shown)


async def sleep(subscribers: Iterable[ServerConnection], message: str) -> None:
    await asyncio.sleep(0.05)
    await send_to_each(subscribers, message)


async def test_waiting_does_not_count_as_busy_time() -> None:
    """It never sleeps (--spin), and yet it is idle while a slow server has its time."""
    async with relay(sleep) as server:
        status, output, complaint = await load(
            "publish", server.port, subscribers=1, window=1, warmup=0, duration=0.4, spin=1
        )
    assert (status, complaint) == (0, "")
    result = json.loads(output)
    assert 0 <= result["load_cpu"] < 0.2
    assert 0 <= result["server_cpu"] < 0.5


def test_reading_counts_as_busy_time() -> None:
    """Beside a server with next to nothing to do for each delivery. A read of a socket takes more than half a
    microsecond on any machine."""
    result = Publishing(subscribers=200, window=1, warmup=0.05, seconds=0.2).run(FLOOR)
    assert result.load_cpu * result.seconds > result.deliveries * 0.5e-6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"subscribers": 3, "topics": 2}, "must be a multiple"),
        ({"subscribers": 0}, "and not 0"),
        ({"subscribers": 100_001, "topics": 100_001}, "--topics is at most 100000"),
        ({"subscribers": 1, "window": 0}, "--window of 1 or more, or a --rate"),
        ({"subscribers": "many"}, "--subscribers: many is not a whole number"),
        ({"rate": "-1"}, "--rate: -1 is not a number"),
        ({"framing": "xml"}, "--framing is text, stream or raw"),
        ({"header": "no colon"}, "--header is one line"),
        ({"unheard-of": 1}, "is no option"),
        ({"opening": 0}, "--opening is at least 1"),
        ({"subscribers": 1, "publish": ""}, "--publish and --event"),
    ],
)
async def test_unsupported_options_are_refused(options: dict[str, float | str], expected: str) -> None:
    status, output, complaint = await load("publish", 9, **options)
    assert (status, output) == (1, b"")
    assert expected in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost:80", "unix:", "::1:80", "127.0.0.1:80x"])
async def test_invalid_address_is_refused(address: str) -> None:
    status, _, complaint = await load("open", address, connections=1)
    assert (status, complaint.count("\n")) == (1, 1)


async def test_connect_time_is_measured() -> None:
    async with relay() as server:
        status, output, complaint = await load("open", server.port, connections=30, base=10, settle=0, opening=20)
    assert (status, complaint) == (0, "")
    latency = json.loads(output)["connect_us"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
