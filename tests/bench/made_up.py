"""Runs that never were, with the figures that a test wants."""

from bench.figures import Run
from bench.measure import Flushed, Flushing, Load, Opened, Opening, Published, Publishing
from broker.cli.measure import Latency

LOAD = Publishing(subscribers=1000, window=16)
OPENING = Opening(connections=5000)


def published(
    peer: str,
    rate: float,
    load: Load = LOAD,
    load_cpu: float = 0.5,
    other_cpu: float = 0.0,
    p99: float = 1500.0,
    samples: tuple[tuple[float, int], ...] = (),
    repetition: int = 0,
    server_cpu: float = 0.98,
    unsent: int = 0,
    seconds: float = 1.0,
) -> Run:
    """A run with this many deliveries a second."""
    latency = Latency(p50=900.0, p90=950.0, p99=p99, p999=p99 + 100, max=p99 + 200)
    stalled = load.stalled if isinstance(load, Publishing) else 0
    result = Published(
        subscribers=1000,
        topics=1,
        window=16,
        event_bytes=173,
        seconds=seconds,
        publishes=int(rate / 1000),
        deliveries=int(rate),
        deliveries_per_second=rate,
        total_publishes=int(rate / 1000),
        total_deliveries=int(rate),
        server_cpu=server_cpu,
        load_cpu=load_cpu,
        other_cpu=other_cpu,
        server_us_per_delivery=0.4,
        server_rss=50_000_000,
        publishes_per_write=16.0,
        deliveries_per_read=16.0,
        done_us=latency,
        delivery_us=latency,
        unsent=unsent,
        stalled=stalled,
        samples=samples,
        server_rss_before=50_000_000,
    )
    return Run(peer, load, result, repetition)


def opened(peer: str, rss: float, load: Load = OPENING, connect_us: float = 100.0) -> Run:
    """A run with connections of this size."""
    result = Opened(
        connections=5000,
        base=500,
        seconds=1.0,
        connects_per_second=5000.0,
        server_cpu=0.9,
        load_cpu=0.3,
        other_cpu=0.0,
        server_us_per_connect=connect_us,
        server_rss_base=40_000_000,
        server_rss=60_000_000,
        rss_per_connection=rss,
        connect_us=Latency(p50=10.0, p90=20.0, p99=30.0, p999=40.0, max=50.0),
    )
    return Run(peer, load, result)


def flushed(peer: str, done_us: float, load: Load) -> Run:
    """A run in which all subscribers have an event after so many microseconds."""
    result = Flushed(
        subscribers=1000,
        event_bytes=173,
        seconds=1.0,
        publishes=100,
        server_cpu=1.5,
        load_cpu=0.1,
        other_cpu=0.0,
        server_us_per_delivery=4.5,
        done_us=Latency(p50=done_us, p90=done_us + 1, p99=done_us + 2, p999=done_us + 3, max=done_us + 4),
    )
    return Run(peer, load, result)


def run_of(peer: str, load: Load, number: int = 0) -> Run:
    """A run under any load."""
    if isinstance(load, Publishing):
        return published(peer, 100.0 + number, load, samples=((0.1, 50_000_000), (0.2, 51_000_000)))
    if isinstance(load, Flushing):
        return flushed(peer, 2000.0 if load.threads else 1000.0, load)
    return opened(peer, 2000.0, load)
