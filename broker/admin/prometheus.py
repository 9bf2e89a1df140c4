"""The metrics. All numbers are counted elsewhere; they are read when somebody asks for them."""

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
from broker.health import HealthMonitor, most_descriptors, open_descriptors
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
    Family("connections", "gauge", "Clients that are connected."),
    Family("connections_max", "gauge", "Clients that there is room for."),
    Family("connections_opened", "counter", "Clients that connected."),
    Family("connections_refused", "counter", "Connections that did not become a client's.", ("reason",)),
    Family("sessions_closed", "counter", "Clients that left or were sent away, by close code.", ("code",)),
    Family("commands", "counter", "Commands that came, by op; `invalid` are those that could not be read.", ("op",)),
    Family("errors", "counter", "Commands that were answered with an error, by its code.", ("code",)),
    Family("events_published", "counter", "Events that were published."),
    Family("events_delivered", "counter", "Events that were handed to a subscriber's socket."),
    Family(
        "events_dropped",
        "counter",
        "Events that a subscriber lost, by its overflow policy and the reason in the gap.",
        ("policy", "reason"),
    ),
    Family("events_queued", "gauge", "Events that wait for slow subscribers."),
    Family("subscriptions", "gauge", "Subscriptions."),
    Family("subscribers_lagging", "gauge", "Clients for whom something waits that they cannot take now."),
    Family(
        "publishers_parked", "gauge", "Clients that are not read while an event of theirs waits for room (`block`)."
    ),
    Family("topics", "gauge", "Different topics and patterns that are subscribed to."),
    Family("received_bytes", "counter", "Bytes from clients, without those of TLS."),
    Family("sent_bytes", "counter", "Bytes to clients, without those of TLS."),
    Family("handshake_seconds", "histogram", "From accepting a client to the answer to its handshake."),
    Family(
        "write_seconds",
        "histogram",
        "From the first event or answer of a turn of the event loop until all of the turn were handed to the sockets.",
    ),
    Family("loop_lag_seconds", "histogram", "How late the event loop is, measured four times a second."),
    Family("engine_up", "gauge", "Whether the engine answers.", ("engine",)),
    Family("engine_seconds", "histogram", "From a publish to its answer, where the engine is another process."),
    Family("open_fds", "gauge", "Descriptors that are open."),
    Family("max_fds", "gauge", "Descriptors that may be open."),
    Family("memory_bytes", "gauge", "Resident memory of the process."),
    Family("memory_level", "gauge", "0: memory is fine; 1: nobody new is let in; 2: publishers are slowed down."),
    Family("cpu_seconds", "counter", "CPU time of the process."),
    Family("draining", "gauge", "1 while clients are sent away."),
    Family("start_time_seconds", "gauge", "When the broker was ready, in seconds since 1970."),
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
    """Where the numbers are: `broker.daemon.Daemon`."""

    node: Node
    limiter: ConnectionLimiter
    health: HealthMonitor
    started: float

    @property
    def engine(self) -> str:
        """The engine's name."""

    @property
    def draining(self) -> bool:
        """Whether clients are sent away."""


class MetricsCollector(Collector):
    """Reads everything at each scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked for before there is somebody to answer."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Give each family with its values as they are now."""
        found = self._values()
        histograms = self._histograms()
        for family in FAMILIES:
            name = PREFIX + family.name
            if family.kind == "histogram":
                yield histogram(name, family.meaning, histograms[family.name])
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(name, family.meaning, labels=family.labels)
            value = found[family.name]
            for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
                metric.add_metric(labels, number)
            yield metric

    def _values(self) -> dict[str, float | Values]:
        source = self._source
        node, limiter, context, metrics = source.node, source.limiter, source.node.context, source.node.metrics
        usage = resource.getrusage(resource.RUSAGE_SELF)
        most = most_descriptors()
        open_now = open_descriptors()
        commands: dict[tuple[str, ...], float] = {(op or "invalid",): count for op, count in metrics.commands.items()}
        commands["publish",] = commands.get(("publish",), 0) + context.fast_publishes
        return {
            "connections": context.connections,
            "connections_max": limiter.capacity.connections,
            "connections_opened": metrics.connected,
            "connections_refused": {(reason,): count for reason, count in limiter.reasons.items()},
            "sessions_closed": {(str(int(code)) if code else "other",): n for code, n in metrics.closed.items()},
            "commands": commands,
            # All of them from the start: one that comes up for the first time is then seen as an increase.
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
            "open_fds": most if open_now is None else open_now,
            "max_fds": most,
            "memory_bytes": source.health.memory,
            "memory_level": source.health.level,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "draining": source.draining,
            "start_time_seconds": source.started,
            "build_info": {(__version__, platform.python_version(), source.engine): 1},
        }

    def _histograms(self) -> dict[str, Histogram]:
        source = self._source
        writes = Histogram(source.node.context.write_times[0])
        _, writes.counts, writes.sum = source.node.context.write_times
        return {
            "handshake_seconds": source.node.metrics.handshakes,
            "write_seconds": writes,
            "loop_lag_seconds": source.health.lag,
            "engine_seconds": source.node.metrics.engine,
        }


def histogram(name: str, meaning: str, found: Histogram) -> Metric:
    """Give it as Prometheus wants it, with each bucket holding those before it."""
    buckets, count = [], 0
    for bound, number in zip((*map(format_bound, found.bounds), "+Inf"), found.counts, strict=True):
        count += number
        buckets.append((bound, float(count)))
    metric = HistogramMetricFamily(name, meaning)
    metric.add_metric([], buckets, found.sum)
    return metric


def format_bound(seconds: float) -> str:
    return f"{seconds:.6g}"
