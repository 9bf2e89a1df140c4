"""Latency below saturation: an open loop, at fixed rates."""

from bench.figures import duration, share
from bench.measure import Publishing
from bench.peers import BROKER, FLOOR, NATS, PICOWS, SOCKETIFY, WEBSOCKETS
from bench.scenarios.base import Column, Plot, Scenario, delivery_p99

# The slowest of the peers is busy for some six tenths of the time at the highest of them.
RATES = (15.0, 30.0, 45.0)

LATENCY = Scenario(
    "latency",
    "Latency at fixed rates",
    "1,000 subscribers get 15, 30 or 45 events a second; the publisher does not wait for the server. The latency of a "
    "delivery counts from the moment when the publish was due, so it includes pauses of the server. uWebSockets "
    "through socketify uses its whole core, also while it waits.",
    tuple(Publishing(subscribers=1000, rate=rate, seconds=2.0) for rate in RATES),
    (BROKER, WEBSOCKETS, PICOWS, SOCKETIFY, NATS, FLOOR),
    (
        Column("delivery p50", lambda result: result.delivery_us.p50, duration),
        Column("p90", lambda result: result.delivery_us.p90, duration),
        Column("p99", delivery_p99, duration),
        Column("max", lambda result: result.delivery_us.max, duration),
        Column("unsent", lambda result: result.unsent, lambda value: f"{value:.0f}"),
        Column("server CPU", lambda result: result.server_cpu, share),
        Column("load CPU", lambda result: result.load_cpu, share),
    ),
    delivery_p99,
    repetitions=lambda load, peer: 2 if peer is BROKER else 1,
    less_is_better=True,
    plots=(
        Plot(
            "p99",
            "1,000 subscribers, fixed rates of publishes",
            "lines",
            "ms, p99",
            lambda result: result.delivery_us.p99 / 1e3,
            x=lambda load: load.rate,
            x_axis="publishes/s",
            metric="99th percentile of the time to a delivery",
        ),
    ),
)
