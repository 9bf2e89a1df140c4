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
    "Each subscriber has a pattern of its own (`p.*.t00000`, `p.*.t00001`, …); each publish goes to a topic that one "
    "of them matches. A server that goes through all patterns for each publish is slower the more there are.",
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
