"""Every metric, and that it moves when it should; and that the docs, the dashboard and the alerts know them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from websockets.exceptions import InvalidStatus

from broker.admin.prometheus import FAMILIES, PREFIX, MetricsCollector
from broker.config import Limits, TopicRule
from broker.engines.memory import MemoryEngine
from broker.health import HealthMonitor
from broker.metrics import KNOWN_CODES, Metrics
from broker.net.handshake import DENIED
from broker.net.http import REFUSAL_REASONS
from broker.net.limiter import ConnectionLimiter
from broker.node import Node
from tests.engines.late import LateServer
from tests.fixtures_node import Harness, serving
from tests.net.harness import until

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "metrics.md"


class Broker:
    """What the metrics read, in the process of the test."""

    engine = "memory"

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.node: Node = harness.node
        self.limiter: ConnectionLimiter = harness.handshakes.limiter
        self.health = HealthMonitor(asyncio.get_running_loop(), harness.node.context, lambda level: None)
        self.started = time.time()
        self.draining = False
        self.certificate_end: float | None = None
        self._registry = CollectorRegistry()
        self._registry.register(MetricsCollector(self))

    def value(self, name: str, **labels: str) -> float:
        """A sample as it is now; 0 if there is none."""
        found = self._registry.get_sample_value(PREFIX + name, labels)
        return 0.0 if found is None else found


@asynccontextmanager
async def measured(**limits: Any) -> AsyncIterator[Broker]:
    engine = MemoryEngine(Limits(**limits))
    rules = [TopicRule("kept.*", history=10), TopicRule("room.*", presence=True)]
    async with serving(engine, topics=rules, **limits) as harness:
        broker = Broker(harness)
        broker.health.start()
        try:
            yield broker
        finally:
            broker.health.stop()


async def slow(broker: Broker, **fields: Any) -> None:
    """A subscriber of `a` that reads nothing, and so much published that it is behind."""
    deaf = await broker.harness.deaf()
    await deaf.tell("subscribe", topic="a", id=1, **fields)
    await deaf.until(b'"op":"ok"')
    publisher = await broker.harness.connect()
    for _ in range(100):
        await publisher.ask("publish", topic="a", data="x" * 20_000)


async def connections(broker: Broker) -> None:
    client = await broker.harness.connect()
    assert broker.value("connections") == 1
    await client.close()
    await until(lambda: broker.value("connections") == 0)


async def certificate_expiry_time_seconds(broker: Broker) -> None:
    assert broker._registry.get_sample_value(PREFIX + "certificate_expiry_time_seconds") is None
    broker.certificate_end = 1.5e9
    assert broker.value("certificate_expiry_time_seconds") == 1.5e9


async def connections_max(broker: Broker) -> None:
    assert broker.value("connections_max") == 1000


async def connections_opened(broker: Broker) -> None:
    for count in (1, 2):
        await (await broker.harness.connect()).close()
        assert broker.value("connections_opened_total") == count


async def connections_refused(broker: Broker) -> None:
    broker.harness.handshakes.close()
    with pytest.raises(InvalidStatus):
        await broker.harness.connect()
    assert broker.value("connections_refused_total", reason="draining") == 1


async def sessions_closed(broker: Broker) -> None:
    for code, label in ((1000, "1000"), (4242, "other")):
        client = await broker.harness.connect()
        await client.socket.close(code)
        await until(lambda label=label: broker.value("sessions_closed_total", code=label) == 1)  # type: ignore[misc]


async def commands(broker: Broker) -> None:
    client = await broker.harness.connect()
    for _ in range(3):  # the first by the slow path, the others by the fast one
        await client.ask("publish", topic="a", data=1)
    await client.ask("ping")
    await client.send("nonsense")
    await client.next()
    assert broker.node.context.fast_publishes == 2
    assert broker.value("commands_total", op="publish") == 3
    assert broker.value("commands_total", op="ping") == 1
    assert broker.value("commands_total", op="invalid") == 1


async def errors(broker: Broker) -> None:
    client = await broker.harness.connect()
    await client.ask("publish", topic="a b", data=1)
    assert broker.value("errors_total", code="bad_topic") == 1
    assert broker.value("errors_total", code="limit") == 0


async def events_published(broker: Broker) -> None:
    client = await broker.harness.connect()
    for _ in range(3):
        await client.ask("publish", topic="a", data=1)
    assert broker.value("events_published_total") == 3


async def events_delivered(broker: Broker) -> None:
    for _ in range(2):
        await broker.harness.subscriber("a")
    await (await broker.harness.connect()).ask("publish", topic="a", data=1)
    assert broker.value("events_delivered_total") == 2


async def events_dropped(broker: Broker) -> None:
    await slow(broker, max_queue=2)
    assert broker.value("events_dropped_total", policy="drop_oldest", reason="overflow") > 50
    assert broker.value("events_dropped_total", policy="drop_newest", reason="overflow") == 0


async def events_queued(broker: Broker) -> None:
    await slow(broker, max_queue=2)
    assert broker.value("events_queued") == 2


async def subscriptions(broker: Broker) -> None:
    client = await broker.harness.subscriber("a", "b")
    assert broker.value("subscriptions") == 2
    await client.ask("unsubscribe", topic="a")
    assert broker.value("subscriptions") == 1


async def subscribers_lagging(broker: Broker) -> None:
    await broker.harness.subscriber("a")
    assert broker.value("subscribers_lagging") == 0
    await slow(broker)
    assert broker.value("subscribers_lagging") == 1
    # However many subscriptions it has; and whoever goes is not any more.
    deaf = broker.harness.clients[1]
    await deaf.tell("subscribe", topic="b", id=2)
    await until(lambda: broker.value("subscriptions") == 3)
    assert broker.value("subscribers_lagging") == 1
    await deaf.close()
    await until(lambda: broker.value("subscribers_lagging") == 0)


async def publishers_parked(broker: Broker) -> None:
    lender = await broker.harness.subscriber("a", "b", overflow="block", max_queue=1, credit=0)
    publishers = [await broker.harness.connect() for _ in range(2)]
    for publisher in publishers:
        await publisher.tell("publish", topic="a", data=1)
        await publisher.tell("publish", topic="a", data=1)
    await until(lambda: broker.value("publishers_parked") == 2)
    await lender.ask("credit", topic="a", add=9)
    await until(lambda: broker.value("publishers_parked") == 0)


async def topics(broker: Broker) -> None:
    await broker.harness.subscriber("a", "b.*")
    await broker.harness.subscriber("a")
    assert broker.value("topics") == 2


async def received_bytes(broker: Broker) -> None:
    client = await broker.harness.connect()
    before = broker.value("received_bytes_total")
    await client.ask("publish", topic="a", data="x" * 1000)
    assert 1000 < broker.value("received_bytes_total") - before < 1100


async def sent_bytes(broker: Broker) -> None:
    client = await broker.harness.subscriber("a")
    before = broker.value("sent_bytes_total")
    await client.tell("publish", topic="a", data="x" * 1000)
    await client.data(1)
    assert 1000 < broker.value("sent_bytes_total") - before < 1100


async def handshake_seconds(broker: Broker) -> None:
    await broker.harness.connect()
    assert broker.value("handshake_seconds_count") == 1
    assert broker.value("handshake_seconds_bucket", le="+Inf") == 1
    assert 0 < broker.value("handshake_seconds_sum") < 10


async def write_seconds(broker: Broker) -> None:
    client = await broker.harness.subscriber("a")
    before = broker.value("write_seconds_count"), broker.value("write_seconds_sum")
    await client.tell("publish", topic="a", data=1)
    await client.data(1)
    assert broker.value("write_seconds_count") > before[0]
    assert broker.value("write_seconds_sum") > before[1]
    assert broker.value("write_seconds_bucket", le="+Inf") == broker.value("write_seconds_count")


async def loop_lag_seconds(broker: Broker) -> None:
    time.sleep(0.4)  # noqa: ASYNC251 -- it is to be late
    await until(lambda: broker.value("loop_lag_seconds_count") > 0)
    assert broker.value("loop_lag_seconds_sum") > 0.1


async def engine_up(broker: Broker) -> None:
    assert broker.value("engine_up", engine="memory") == 1


async def engine_seconds(broker: Broker) -> None:
    server = LateServer()
    async with serving(server.engine()) as harness:
        other = Broker(harness)
        await (await harness.connect()).ask("publish", topic="a", data=1)
        assert other.value("engine_seconds_count") == 1
        assert other.value("engine_seconds_sum") > 0
    # The memory engine is not another process.
    await (await broker.harness.connect()).ask("publish", topic="a", data=1)
    assert broker.value("engine_seconds_count") == 0


async def history_topics(broker: Broker) -> None:
    client = await broker.harness.connect()
    for n in range(3):
        await client.ask("publish", topic=f"kept.{n}", data=1)
    assert broker.value("history_topics") == 3


async def history_bytes(broker: Broker) -> None:
    await (await broker.harness.connect()).ask("publish", topic="kept.a", data="x" * 100_000)
    assert 100_000 < broker.value("history_bytes") < 110_000


async def history_events_evicted(broker: Broker) -> None:
    client = await broker.harness.connect()
    await client.ask("publish", topic="kept.a", data="x" * 1000)
    broker.harness.node.engine.configure(Limits(history_bytes=2000))
    await client.ask("publish", topic="kept.b", data="x" * 1000)
    assert broker.value("history_events_evicted_total") == 1


async def dedups(broker: Broker) -> None:
    client = await broker.harness.connect()
    for dedup in ("x", "y", "x"):
        await client.ask("publish", topic="a", data=1, dedup=dedup)
    assert broker.value("dedups") == 2


async def members(broker: Broker) -> None:
    client = await broker.harness.connect()
    await client.ask("subscribe", topic="room.a")
    await client.ask("subscribe", topic="room.b")
    assert broker.value("members") == 2
    await client.ask("unsubscribe", topic="room.a")
    assert broker.value("members") == 1


async def open_fds(broker: Broker) -> None:
    before = broker.value("open_fds")
    await broker.harness.deaf()
    assert broker.value("open_fds") == before + 2  # the client's is in this process too


async def max_fds(broker: Broker) -> None:
    assert broker.value("max_fds") >= 64


async def memory_bytes(broker: Broker) -> None:
    before = broker.value("memory_bytes")
    ballast = b"x" * 50_000_000
    assert broker.value("memory_bytes") - before > 0.9 * len(ballast)


async def memory_pressure(broker: Broker) -> None:
    assert broker.value("memory_pressure") == 0
    broker.health.max_memory = 1
    await until(lambda: broker.value("memory_pressure") == 2)
    broker.health.max_memory = None
    await until(lambda: broker.value("memory_pressure") == 0)


async def cpu_seconds(broker: Broker) -> None:
    before = broker.value("cpu_seconds_total")
    sum(range(1_000_000))
    assert broker.value("cpu_seconds_total") > before


async def draining(broker: Broker) -> None:
    assert broker.value("draining") == 0
    broker.draining = True
    assert broker.value("draining") == 1


async def start_time_seconds(broker: Broker) -> None:
    assert abs(broker.value("start_time_seconds") - time.time()) < 60


async def build_info(broker: Broker) -> None:
    [metric] = [metric for metric in MetricsCollector(broker).collect() if metric.name == "wsbroker_build_info"]
    assert list(metric.samples[0].labels) == ["version", "python", "engine"]
    assert metric.samples[0].value == 1


MOVES: dict[str, Callable[[Broker], Awaitable[None]]] = {
    move.__name__: move
    for move in (
        connections,
        connections_max,
        connections_opened,
        connections_refused,
        sessions_closed,
        commands,
        errors,
        events_published,
        events_delivered,
        events_dropped,
        events_queued,
        subscriptions,
        subscribers_lagging,
        publishers_parked,
        topics,
        received_bytes,
        sent_bytes,
        handshake_seconds,
        write_seconds,
        loop_lag_seconds,
        engine_up,
        engine_seconds,
        history_topics,
        history_bytes,
        history_events_evicted,
        dedups,
        members,
        open_fds,
        max_fds,
        memory_bytes,
        memory_pressure,
        cpu_seconds,
        draining,
        start_time_seconds,
        certificate_expiry_time_seconds,
        build_info,
    )
}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
async def test_metric_changes_with_its_cause(name: str) -> None:
    async with measured() as broker:
        await MOVES[name](broker)


async def test_metric_names_follow_the_conventions() -> None:
    async with measured() as broker:
        for metric in MetricsCollector(broker).collect():
            assert re.fullmatch(r"wsbroker_[a-z_]+", metric.name)
            assert metric.documentation.endswith(".")
            assert not {"topic", "identity", "session", "key"} & {k for s in metric.samples for k in s.labels}
            for sample in metric.samples:
                assert sample.value >= 0


def test_close_codes_chosen_by_clients_share_one_label() -> None:
    metrics = Metrics()
    for code in range(3000, 5000):
        metrics.close(code)
    assert set(metrics.closed) <= KNOWN_CODES | {0}


# The docs


def row(family: Any) -> tuple[str, str, str, str]:
    name = f"`{PREFIX}{family.name}{'_total' if family.kind == 'counter' else ''}`"
    return name, family.kind, ", ".join(f"`{label}`" for label in family.labels), family.meaning


def test_docs_list_every_metric() -> None:
    rows = re.findall(r"^\| (`wsbroker_.*?`) \| (\w+) \| ?(.*?) ?\| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [row(family) for family in FAMILIES]


def test_docs_list_every_refusal_reason() -> None:
    reasons = set(REFUSAL_REASONS.values()) - {""} | {
        "full",
        "memory",
        "draining",
        "timeout",
        "tls",
        "proxy_protocol",
        "handshake_rate",
    }
    reasons |= {"handshake_rate", *DENIED.values()}
    assert (
        set(re.findall(r"^\| `([a-z_]+)` \| (?!counter|gauge|histogram)", DOCUMENT.read_text(), re.MULTILINE))
        == reasons
    )


KNOWN = {
    PREFIX + family.name + suffix
    for family in FAMILIES
    for suffix in {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[family.kind]
}


def test_dashboard_and_alerts_use_existing_metrics() -> None:
    dashboard = (ROOT / "docs" / "grafana.json").read_text()
    alerts = (ROOT / "docs" / "alerts.yaml").read_text()
    board = json.loads(dashboard)
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 15
    for text in (dashboard, alerts):
        named = set(re.findall(r"\bwsbroker_[a-z_]+", text))
        assert named
        assert named <= KNOWN
