"""Patterns: every subscriber has one of its own."""

from bench.measure import Publishing
from bench.peers import BROKER, NATS, REDIS
from bench.scenarios.base import PUBLISHING, Plot, Scenario, deliveries


def of(count: int) -> Publishing:
    """So many patterns, and as many topics."""
    return Publishing(subscribers=count, topics=count, patterns=True, window=64)


PATTERNS = Scenario(
    "patterns",
    "Patterns",
    "Each subscriber has its own pattern (`p.*.t00000`, `p.*.t00001`, …). Each publish goes to a topic that one of "
    "the patterns matches. A server that compares each topic with all patterns is slower with more patterns.",
    (of(100), of(1000)),
    (BROKER, NATS, REDIS),
    PUBLISHING,
    deliveries,
    plots=(
        Plot(
            "rate",
            "One subscriber for each pattern, window 64",
            "bars",
            "messages/s",
            deliveries,
            label=lambda load: f"{load.subscribers:,} patterns",
            metric="messages per second",
        ),
    ),
)
