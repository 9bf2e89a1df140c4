"""What a scenario is: the loads, the peers that take part, the columns of its table, its plots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.figures import Run, Value, duration, micros, rate, share
from bench.measure import Load, Opened, Published
from bench.peers import Peer


@dataclass(frozen=True)
class Column:
    """A column of figures."""

    heading: str
    value: Value
    write: Callable[[float], str]


@dataclass(frozen=True)
class Plot:
    """A picture of a scenario: `lines` over what `x` takes from a load, `bars` for each load, `pairs` of two loads for
    each server, `samples` over time."""

    name: str
    """Of the file, behind the scenario's."""
    title: str
    kind: Literal["lines", "bars", "pairs", "samples"]
    axis: str
    """What is shown, with its unit."""
    value: Value = lambda result: 0.0
    chosen: Callable[[Any], bool] = lambda load: True
    """Which of the scenario's loads are in it."""
    x: Callable[[Any], float] = lambda load: 0.0
    x_axis: str = ""
    logarithmic: bool = False
    label: Callable[[Any], str] = str
    """Of a load, where there are bars of several."""
    metric: str = ""
    """What is shown, in words for the title. Empty: as `axis`."""


@dataclass(frozen=True)
class Scenario:
    """A question that is put to several servers. `text` says what is done, for readers of the figures."""

    name: str
    title: str
    text: str
    loads: tuple[Load, ...]
    peers: tuple[Peer, ...]
    columns: tuple[Column, ...]
    compared: Value
    """What the servers are compared by."""
    repetitions: Callable[[Any, Peer], int] = lambda load, peer: 2
    """How often a peer is measured under a load: five times for what a goal is about, fewer for the rest."""
    alternate: bool = False
    """Its loads are compared with each other, so that they too take turns."""
    less_is_better: bool = False
    plots: tuple[Plot, ...] = ()
    remarks: Callable[[Sequence[Run]], list[str]] = lambda runs: []
    """What there is to say about the figures beyond the table."""


def deliveries(result: Published) -> float:
    """What throughput is compared by."""
    return result.deliveries_per_second


# Repetitions of what a goal is about.
GOAL = 5

# The columns of most scenarios that publish.
PUBLISHING = (
    Column("deliveries/s", deliveries, rate),
    Column("server µs each", lambda result: result.server_us_per_delivery, micros),
    Column("server CPU", lambda result: result.server_cpu, share),
    Column("load CPU", lambda result: result.load_cpu, share),
    Column("done p50", lambda result: result.done_us.p50, duration),
    Column("p99", lambda result: result.done_us.p99, duration),
)


def delivery_p99(result: Published) -> float:
    """What latency is compared by, in microseconds."""
    return result.delivery_us.p99


def connects_per_second(result: Opened) -> float:
    """How fast connections are taken."""
    return result.connects_per_second


def connect_cpu(result: Opened) -> float:
    """The server's CPU time of a connect, in microseconds."""
    return result.server_us_per_connect


def connection_rss(result: Opened) -> float:
    """The memory of a connection in bytes."""
    return result.rss_per_connection


def connect_p50(result: Opened) -> float:
    """From connect() until the connection is ready, in microseconds; 0 where the load program did not measure it."""
    return result.connect_us.p50 if result.connect_us else 0.0


def connect_p99(result: Opened) -> float:
    """The same for the slowest of a hundred."""
    return result.connect_us.p99 if result.connect_us else 0.0
