"""Prometheus metrics. Numbers are counted elsewhere and read at each scrape."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Protocol

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from broker import __version__
from broker.errors import ERRORS
from broker.health import HealthMonitor, max_descriptors, open_descriptors
from broker.metrics import Histogram
from broker.net.limiter import ConnectionLimiter
from broker.node import Node


class Family(msgspec.Struct, frozen=True):
    """A row of the table of metrics."""

    name: str
    """Without the prefix `wsbroker_`, and without `_total` for a counter."""
    kind: str
    """`counter`, `gauge` or `histogram`."""
    meaning: str
    labels: tuple[str, ...] = ()


FAMILIES: Final = (
    Family("connections", "gauge", "Established connections."),
    Family("connections_max", "gauge", "Limit of connections."),
    Family("connections_opened", "counter", "Connections established since the start."),
    Family(
        "connections_refused", "counter", "Connections refused before they were established, by reason.", ("reason",)
    ),
    Family("sessions_closed", "counter", "Connections closed, by close code.", ("code",)),
    Family("commands", "counter", "Commands received, by op; `invalid` could not be parsed.", ("op",)),
    Family("errors", "counter", "Commands answered with an error, by error code.", ("code",)),
    Family("events_published", "counter", "Events published."),
    Family("events_delivered", "counter", "Events written to the sockets of subscribers."),
    Family(
        "events_dropped",
        "counter",
        "Events dropped for a subscriber, by overflow policy and by the reason in the gap.",
        ("policy", "reason"),
    ),
    Family("events_queued", "gauge", "Events queued for slow subscribers."),
    Family("subscriptions", "gauge", "Live subscriptions."),
    Family(
        "subscribers_lagging",
        "gauge",
        "Connections with queued data: their socket is full, or a subscription has no credit.",
    ),
    Family(
        "publishers_parked",
        "gauge",
        "Connections that the broker does not read, because one of their events is parked (`block`).",
    ),
    Family("topics", "gauge", "Different topics and patterns that have subscribers."),
    Family("received_bytes", "counter", "Bytes received from clients, without TLS overhead."),
    Family("sent_bytes", "counter", "Bytes sent to clients, without TLS overhead."),
    Family("handshake_seconds", "histogram", "Time from accepting a connection to the answer to its handshake."),
    Family(
        "write_seconds",
        "histogram",
        "Time from the first event or answer in a turn of the event loop to the last write in this turn.",
    ),
    Family("loop_lag_seconds", "histogram", "Delay of the event loop, sampled four times a second."),
    Family("engine_up", "gauge", "1 while the engine is available.", ("engine",)),
    Family(
        "engine_seconds", "histogram", "Time from a publish to the engine's answer, if the engine is another process."
    ),
    Family("history_topics", "gauge", "Topics with history, those without an event left too."),
    Family("history_bytes", "gauge", "Bytes that the history takes up, as `limits.history_bytes` counts them."),
    Family(
        "history_events_evicted",
        "counter",
        "Kept events dropped because of `limits.history_bytes` or `limits.history_topics`, before their time.",
    ),
    Family("dedups", "gauge", "Values of `dedup` that are remembered."),
    Family("members", "gauge", "Members of topics with presence, on this node."),
    Family("open_fds", "gauge", "Open file descriptors."),
    Family("max_fds", "gauge", "Limit of open file descriptors."),
    Family("memory_bytes", "gauge", "Resident memory of the process."),
    Family("memory_pressure", "gauge", "0: normal; 1: new connections are refused; 2: publishers are throttled."),
    Family("cpu_seconds", "counter", "CPU time of the process."),
    Family("draining", "gauge", "1 while the broker drains or retires."),
    Family("start_time_seconds", "gauge", "When the broker became ready, in seconds since 1970."),
    Family(
        "certificate_expiry_time_seconds",
        "gauge",
        "When the certificate expires, in seconds since 1970; only with TLS.",
    ),
    Family("build_info", "gauge", "Always 1.", ("version", "python", "engine")),
)

PREFIX: Final = "wsbroker_"

Values = (
    Mapping[tuple[str, ...], float]
    | Mapping[tuple[str], float]
    | Mapping[tuple[str, str], float]
    | Mapping[tuple[str, str, str], float]
)


class Source(Protocol):
    """The source of the metrics: `broker.daemon.Daemon`."""

    node: Node
    limiter: ConnectionLimiter
    health: HealthMonitor
    started: float

    @property
    def engine(self) -> str:
        """The engine's name."""

    @property
    def certificate_end(self) -> float | None:
        """When the certificate expires, in seconds since 1970."""

    @property
    def draining(self) -> bool:
        """Whether the broker drains or retires."""


class MetricsCollector(Collector):
    """Reads everything at each scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        """Skip the collection that a registry does at registration: the node may not exist yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Give each family with its values as they are now."""
        values = self._collect_values()
        histograms = self._collect_histograms()
        for family in FAMILIES:
            name = PREFIX + family.name
            if family.kind == "histogram":
                yield convert_histogram(name, family.meaning, histograms[family.name])
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(name, family.meaning, labels=family.labels)
            value = values[family.name]
            for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
                metric.add_metric(labels, number)
            yield metric

    def _collect_values(self) -> dict[str, float | Values]:
        source = self._source
        node, limiter, context, metrics = source.node, source.limiter, source.node.context, source.node.metrics
        usage = resource.getrusage(resource.RUSAGE_SELF)
        max_open = max_descriptors()
        open_now = open_descriptors()
        engine = node.engine.stats()
        commands: dict[tuple[str, ...], float] = {(op or "invalid",): count for op, count in metrics.commands.items()}
        commands["publish",] = commands.get(("publish",), 0) + context.fast_publishes
        return {
            "connections": context.connections,
            "connections_max": limiter.capacity.connections,
            "connections_opened": metrics.connected,
            "connections_refused": {(reason,): count for reason, count in limiter.reasons.items()},
            "sessions_closed": {(str(int(code)) if code else "other",): n for code, n in metrics.closed.items()},
            "commands": commands,
            # Every code from the start, so that Prometheus sees the first error of a code as an increase.
            "errors": {(code,): metrics.errors[code] for code in ERRORS},
            "events_published": context.published,
            "events_delivered": context.delivered,
            "events_dropped": context.dropped_events,
            "events_queued": context.queued,
            "subscriptions": context.subscriptions,
            "subscribers_lagging": context.lagging_connections,
            "publishers_parked": context.parked_publishers,
            "topics": node.hub.filters,
            "received_bytes": context.bytes_in,
            "sent_bytes": context.bytes_out,
            "engine_up": {(source.engine,): 1},
            "history_topics": engine.topics,
            "history_bytes": engine.bytes,
            "history_events_evicted": engine.events_evicted,
            "dedups": engine.dedups,
            "members": node.members.count,
            "open_fds": max_open if open_now is None else open_now,
            "max_fds": max_open,
            "memory_bytes": source.health.memory,
            "memory_pressure": source.health.level,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "draining": source.draining,
            "start_time_seconds": source.started,
            "certificate_expiry_time_seconds": {} if source.certificate_end is None else source.certificate_end,
            "build_info": {(__version__, platform.python_version(), source.engine): 1},
        }

    def _collect_histograms(self) -> dict[str, Histogram]:
        source = self._source
        writes = Histogram(source.node.context.write_times[0])
        _, writes.counts, writes.sum = source.node.context.write_times
        return {
            "handshake_seconds": source.node.metrics.handshakes,
            "write_seconds": writes,
            "loop_lag_seconds": source.health.lag,
            "engine_seconds": source.node.metrics.engine,
        }


def convert_histogram(name: str, meaning: str, histogram: Histogram) -> Metric:
    """Convert to a Prometheus histogram, with cumulative buckets."""
    buckets, count = [], 0
    for bound, number in zip((*map(format_bound, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        count += number
        buckets.append((bound, float(count)))
    metric = HistogramMetricFamily(name, meaning)
    metric.add_metric([], buckets, histogram.sum)
    return metric


def format_bound(seconds: float) -> str:
    return f"{seconds:.6g}"
