"""Everything that the bench can measure, by name."""

from bench.scenarios.base import Column, Plot, Scenario
from bench.scenarios.connections import CONNECT, IDLE, STORM
from bench.scenarios.fanout import FANOUT
from bench.scenarios.latency import LATENCY
from bench.scenarios.onetoone import ONETOONE, PIPELINED
from bench.scenarios.patterns import PATTERNS
from bench.scenarios.stalled import FLOOD, STALLED
from bench.scenarios.threads import THREADS
from bench.scenarios.transports import DEFLATE, TLS, UNIX

__all__ = ["SCENARIOS", "Column", "Plot", "Scenario"]

# In the order of a whole run and of the report.
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        FANOUT,
        THREADS,
        ONETOONE,
        PIPELINED,
        PATTERNS,
        LATENCY,
        CONNECT,
        STORM,
        IDLE,
        STALLED,
        FLOOD,
        UNIX,
        TLS,
        DEFLATE,
    )
}
