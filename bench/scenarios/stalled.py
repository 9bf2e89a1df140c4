"""Subscribers that stopped reading: what the healthy ones feel of them, and what they make the server hold."""

from collections.abc import Sequence

from bench.figures import Run, duration, rate, share, size
from bench.measure import Published, Publishing
from bench.peers import BROKER, NATS, PICOWS, SOCKETIFY, WEBSOCKETS
from bench.scenarios.base import GOAL, Column, Plot, Scenario, deliveries, delivery_p99
from broker.config import Limits

# At this pace and size the kernel's buffers for a stalled client, and then its queue, are full when the warm-up ends,
# and events are dropped while it is measured.
# Nothing has to be filled where nobody stalls.
WITHOUT = Publishing(subscribers=900, rate=75, payload=2048, warmup=1.0, seconds=3.0)
WITH = Publishing(subscribers=900, rate=75, payload=2048, warmup=4.7, seconds=3.0, stalled=100)

STALLED = Scenario(
    "stalled",
    "Healthy beside stalled subscribers",
    "900 subscribers read 75 events of 2 kB a second: first alone, then beside 100 subscribers that have stopped "
    "reading. The latency is that of the 900. uWebSockets through socketify uses its whole core, also while it waits.",
    (WITHOUT, WITH),
    # picows is like websockets here: both hold whatever a client does not read, without a limit.
    (BROKER, WEBSOCKETS, SOCKETIFY, NATS),
    (
        Column("healthy p50", lambda result: result.delivery_us.p50, duration),
        Column("p99", delivery_p99, duration),
        Column("max", lambda result: result.delivery_us.max, duration),
        Column("unsent", lambda result: result.unsent, lambda value: f"{value:.0f}"),
        Column("server CPU", lambda result: result.server_cpu, share),
        Column("load CPU", lambda result: result.load_cpu, share),
        Column("server RSS", lambda result: result.server_rss, size),
    ),
    delivery_p99,
    repetitions=lambda load, peer: GOAL if peer is BROKER else 1,
    alternate=True,
    less_is_better=True,
    plots=(
        Plot(
            "p99",
            "900 subscribers that read, 75 events of 2 kB per second",
            "pairs",
            "ms, p99",
            lambda result: result.delivery_us.p99 / 1e3,
            label=lambda load: (
                f"{load.stalled} stalled subscribers beside them" if load.stalled else "no stalled subscribers"
            ),
            metric="99th percentile of the time to a delivery",
        ),
    ),
)

# Bytes beside an event's frame for a place in a queue, and for what the broker knows of an event.
PLACE = 64


def growth(result: Published) -> float:
    """How far the server's memory rose above what it was before the first publish, in bytes."""
    return max([rss for _, rss in result.samples] + [result.server_rss]) - result.server_rss_before


def bound(result: Published) -> float:
    """What the limits of the broker's default configuration let the stalled subscribers take, in bytes."""
    limits = Limits()
    queue = min(limits.max_queue * result.event_bytes, limits.max_outbox)
    # One event more may be on its way in the transport.
    return result.stalled * (queue + result.event_bytes + limits.max_queue * PLACE)


def shared(result: Published) -> float:
    """The same where each event is kept once for all who wait for it, and not once for each, in bytes."""
    limits = Limits()
    queue = min(limits.max_queue * result.event_bytes, limits.max_outbox)
    return queue + result.stalled * (result.event_bytes + limits.max_queue * PLACE)


def _against_bound(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        if run.peer == BROKER.name and isinstance(run.result, Published):
            grown, most, least = growth(run.result), bound(run.result), shared(run.result)
            found.append(
                f"In {run.result.seconds:.0f} s the memory of wsbroker grew by {size(grown)}. Its limits allow "
                f"{size(most)} ({_verdict(grown, most)}), or {size(least)} if all subscribers share the stored events "
                f"({_verdict(grown, least)})."
            )
    return found


# Megabytes. A server without a bound would go on to whatever the machine has.
MOST_MEMORY = 4000


def _remarks(runs: Sequence[Run]) -> list[str]:
    grown = [
        f"{run.peer} had {MOST_MEMORY / 1000:g} GB of memory after {run.result.seconds:.1f} s, and the flood was ended."
        for run in runs
        if isinstance(run.result, Published) and any(rss > MOST_MEMORY * 1e6 for _, rss in run.result.samples)
    ]
    return _against_bound(runs) + grown


def _verdict(grown: float, most: float) -> str:
    return "kept" if grown <= most else "EXCEEDED"


FLOOD = Scenario(
    "flood",
    "Flood at stalled subscribers",
    "One subscriber reads, and 100 have stopped reading. The publisher publishes events of 1 kB as fast as the one "
    "subscriber reads them, with 64 under way. A server must limit what it stores for subscribers that do not read. "
    "Each server has its default limit, if it has one.",
    (
        Publishing(
            subscribers=1, window=64, payload=1024, stalled=100, seconds=5.0, sample=0.1, most_memory=MOST_MEMORY
        ),
    ),
    (BROKER, WEBSOCKETS, PICOWS, SOCKETIFY, NATS),
    (
        Column("RSS before", lambda result: result.server_rss_before, size),
        Column("grew by", growth, size),
        Column("in", lambda result: result.seconds * 1e6, duration),
        Column("publishes/s", deliveries, rate),
        Column("done p99", lambda result: result.done_us.p99, duration),
        Column("server CPU", lambda result: result.server_cpu, share),
        Column("load CPU", lambda result: result.load_cpu, share),
    ),
    growth,
    repetitions=lambda load, peer: 1,
    less_is_better=True,
    plots=(
        Plot(
            "rss",
            "100 stalled subscribers, a publisher at full speed, 1 kB",
            "samples",
            "MB",
            metric="memory of the server (RSS) over time",
        ),
    ),
    remarks=_remarks,
)
