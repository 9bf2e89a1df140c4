"""One publish to many subscribers, by one thread and by all cores."""

from collections.abc import Sequence

from bench.figures import Run, duration, figure, micros, share, times
from bench.measure import Flushed, Flushing
from bench.peers import BROKER, FLOOR, NATS, SOCKETIFY
from bench.scenarios.base import GOAL, Column, Plot, Scenario

SUBSCRIBERS = (1000, 10_000)


def done(result: Flushed) -> float:
    """The median time from a publish until the last subscriber has it in its socket, in microseconds."""
    return result.done_us.p50


def _remarks(runs: Sequence[Run]) -> list[str]:
    found = []
    for subscribers in SUBSCRIBERS:
        one = figure(runs, Flushing(subscribers=subscribers, threads=1), BROKER.name, done)
        all_cores = figure(runs, Flushing(subscribers=subscribers), BROKER.name, done)
        if one is not None and all_cores is not None and all_cores.median:
            ratio = times(one.median / all_cores.median)
            found.append(f"With all cores wsbroker reaches {subscribers:,} subscribers {ratio} times as fast.")
    return found


THREADS = Scenario(
    "threads",
    "One publish on all cores",
    "The time from a publish until the last of the subscribers has the event in its socket, by the kernel's clock. The "
    "subscribers do not read at that moment, and the load program sleeps, so that the server has all cores of the "
    "machine. One publish at a time, 128 bytes.",
    tuple(Flushing(subscribers=count, threads=threads) for count in SUBSCRIBERS for threads in (1, 0)),
    (BROKER, SOCKETIFY, NATS, FLOOR),
    (
        Column("done p50", done, duration),
        Column("p90", lambda result: result.done_us.p90, duration),
        Column("p99", lambda result: result.done_us.p99, duration),
        Column("server µs each", lambda result: result.server_us_per_delivery, micros),
        Column("server CPU", lambda result: result.server_cpu, share),
    ),
    done,
    repetitions=lambda load, peer: GOAL if peer is BROKER else 1,
    alternate=True,
    less_is_better=True,
    plots=(
        Plot(
            "done",
            "1 publisher, 128 bytes",
            "bars",
            "ms until the last subscriber has it",
            lambda result: done(result) / 1e3,
            label=str,
            metric="time from a publish until all subscribers have it",
        ),
    ),
    remarks=_remarks,
)
