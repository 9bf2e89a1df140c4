"""Fan-out: the windows, the sizes of the audience and of the payload, each swept while the others stand still."""

from bench.measure import Publishing
from bench.peers import BROKER, FLOOR, NATS, PEERS, SOCKETIFY, Peer
from bench.scenarios.base import GOAL, PUBLISHING, Plot, Scenario, deliveries

WINDOWS = (1, 4, 16, 64)
SUBSCRIBERS = (1, 100, 10_000)  # and 1,000, with the windows
PAYLOADS = (16, 1024, 16 * 1024)  # and 128, with the windows


def at(window: int, subscribers: int = 1000, payload: int = 128) -> Publishing:
    """One cell. With 64 under way, or 10,000 subscribers, some servers take a second from a publish to its last
    delivery: the first ones come before it is measured, and a few while it is."""
    long = window * subscribers > 50_000
    return Publishing(
        subscribers=subscribers,
        window=window,
        payload=payload,
        warmup=0.9 if long else 0.2,
        seconds=1.2 if long else 0.5,
    )


def repetitions(load: Publishing, peer: Peer) -> int:
    """The windows are what goals are about, with these four."""
    if (load.subscribers, load.payload) != (1000, 128) or peer not in (BROKER, FLOOR, NATS, SOCKETIFY):
        return 1
    return 3 if load.window == 4 else GOAL


FANOUT = Scenario(
    "fanout",
    "Fan-out",
    "One publisher publishes to one topic. The plots show the throughput for different windows (1,000 subscribers, 128 "
    "bytes), for different numbers of subscribers (window 16), and for different payloads (window 4).",
    (
        *(at(window) for window in WINDOWS),
        *(at(16, subscribers) for subscribers in SUBSCRIBERS),
        *(at(4, payload=payload) for payload in PAYLOADS),
    ),
    tuple(PEERS.values()),
    PUBLISHING,
    deliveries,
    repetitions=repetitions,
    plots=(
        Plot(
            "windows",
            "1 publisher, 1,000 subscribers, 128 bytes",
            "lines",
            "deliveries/s",
            deliveries,
            lambda load: (load.subscribers, load.payload) == (1000, 128),
            lambda load: load.window,
            "publishes under way (window)",
            metric="deliveries per second over the window",
            logarithmic=True,
        ),
        Plot(
            "subscribers",
            "1 publisher, window 16 (publishes under way), 128 bytes",
            "lines",
            "deliveries/s",
            deliveries,
            lambda load: (load.window, load.payload) == (16, 128),
            lambda load: load.subscribers,
            "subscribers",
            metric="deliveries per second over the number of subscribers",
            logarithmic=True,
        ),
        Plot(
            "payloads",
            "1 publisher, 1,000 subscribers, window 4 (publishes under way)",
            "lines",
            "MB/s to all subscribers",
            lambda result: result.deliveries_per_second * result.event_bytes / 1e6,
            lambda load: (load.window, load.subscribers) == (4, 1000),
            lambda load: load.payload,
            "bytes of payload",
            metric="megabytes per second to all subscribers, over the payload",
            logarithmic=True,
        ),
    ),
)
