"""The same as `make soak`, for a few seconds. How long things take is not asserted here."""

from __future__ import annotations

from tests.fixtures_broker import start_broker
from tests.soak.stall import DATA, stall


def test_memory_stays_bounded_and_each_policy_delivers_its_stream() -> None:
    with start_broker() as broker:
        outcome = stall(broker, stalled=20, healthy=20, seconds=1.5)
    print(outcome)
    assert outcome.most <= outcome.bound, outcome
    # Without bounds each event would be held, so that the limits would be passed.
    assert outcome.published * DATA > outcome.bound - outcome.before, "too few to show anything"
