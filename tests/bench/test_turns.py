"""The order of the measurements, and what becomes of those that fail or are disturbed."""

from dataclasses import replace

import pytest

from bench import turns
from bench.figures import Run
from bench.measure import MeasureError, Opening, Publishing
from bench.peers import PEERS
from bench.scenarios import SCENARIOS
from bench.turns import Runner, Step
from tests.bench.made_up import LOAD, published

A, B = PEERS["wsbroker"], PEERS["floor"]
SCENARIO = replace(SCENARIOS["pipelined"], loads=(LOAD,), peers=(A, B), repetitions=lambda load, peer: 2)
STEPS = [Step("pipelined", LOAD, A), Step("pipelined", LOAD, B)]


def test_peers_alternate() -> None:
    assert [step.peer.name for step in turns.plan([SCENARIO]).steps] == ["wsbroker", "floor", "wsbroker", "floor"]


def test_command_line_options_override_the_scenario() -> None:
    opening = Opening(connections=10)
    planned = turns.plan([replace(SCENARIO, loads=(LOAD, opening))], ["floor"], repeat=1, seconds=0.25)
    assert [(step.peer.name, step.load) for step in planned.steps] == [
        ("floor", Publishing(subscribers=1000, window=16, seconds=0.25)),
        ("floor", opening),
    ]


def test_repetitions_can_differ_between_peers() -> None:
    """The seconds that are asked for make no other load of it. Runner are taken for as long as there are two."""
    long = Publishing(subscribers=10_000, window=1)
    scenario = replace(
        SCENARIO, loads=(LOAD, long), repetitions=lambda load, peer: 1 if load == long else 3 if peer is A else 2
    )
    planned = turns.plan([scenario], seconds=0.1)
    assert [
        (step.load.subscribers, step.peer.name, step.repetition)
        for step in planned.steps
        if isinstance(step.load, Publishing)
    ] == [
        (1000, "wsbroker", 0),
        (1000, "floor", 0),
        (1000, "wsbroker", 1),
        (1000, "floor", 1),
        (1000, "wsbroker", 2),
        (10_000, "wsbroker", 0),
        (10_000, "floor", 0),
    ]


def test_compared_loads_alternate() -> None:
    other = Publishing(subscribers=1, window=1)
    planned = turns.plan([replace(SCENARIO, loads=(LOAD, other), peers=(A, B), alternate=True)])
    assert [(step.load, step.peer.name, step.repetition) for step in planned.steps] == [
        (load, name, number) for number in range(2) for load in (LOAD, other) for name in ("wsbroker", "floor")
    ]


def test_a_run_knows_which_repetition_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    result = published("wsbroker", 1.0).result
    monkeypatch.setattr(Publishing, "run", lambda self, peer: result)
    steps = turns.plan([replace(SCENARIO, peers=(A,))]).steps
    assert [run.repetition for run in Runner(0).run(steps)["pipelined"].runs] == [0, 1]


def test_unavailable_peer_is_reported() -> None:
    absent = replace(B, missing=lambda: "there is no floor; build one")
    planned = turns.plan([replace(SCENARIO, peers=(A, absent))])
    assert planned.missing == {"floor": "there is no floor; build one"}
    assert {step.peer.name for step in planned.steps} == {"wsbroker"}


def test_peer_with_a_missing_ability_is_reported() -> None:
    over_tls = Publishing(subscribers=5, window=1, transport="tls")
    planned = turns.plan([replace(SCENARIO, loads=(LOAD, over_tls), peers=(B,))])
    assert planned.unable == {"pipelined": {"floor": "has no TLS"}}
    assert {step.load for step in planned.steps} == {LOAD}


def test_failed_run_is_recorded_with_its_reason() -> None:
    def measure(step: Step) -> Run:
        if step.peer is A:
            raise MeasureError("nobody listens")
        return published("floor", 1.0)

    taken = Runner(0, measure=measure).run(STEPS)["pipelined"]
    assert [run.peer for run in taken.runs] == ["floor"]
    assert [(failure.peer, failure.error) for failure in taken.failures] == [("wsbroker", "nobody listens")]


@pytest.mark.parametrize(
    ("retries", "disturbances", "kept"),
    [(2, [0.5, 0.05, 0.0], 0.05), (2, [0.5, 0.3, 0.4], 0.3), (0, [0.5, 0.0], 0.5), (2, [0.02, 0.0], 0.02)],
)
def test_disturbed_run_is_repeated(retries: int, disturbances: list[float], kept: float) -> None:
    left = iter(disturbances)
    runner = Runner(retries, measure=lambda step: published("wsbroker", 1.0, other_cpu=next(left)))
    (run,) = runner.run(STEPS[:1])["pipelined"].runs
    assert run.result.other_cpu == kept


def test_no_run_is_repeated_after_the_deadline() -> None:
    now = 0.0

    def measure(step: Step) -> Run:
        nonlocal now
        now += step.load.expected
        return published(step.peer.name, 1.0, other_cpu=0.5)

    # Time for the two steps and one more.
    runner = Runner(5, LOAD.expected * 3.5, measure, clock=lambda: now)
    assert len(runner.run(STEPS)["pipelined"].runs) == 2
    assert now == pytest.approx(LOAD.expected * 3)


def test_progress_is_reported_before_and_after_each_step() -> None:
    told: list[str] = []
    Runner(0, measure=lambda step: published(step.peer.name, 1.0)).run(
        STEPS, lambda step: told.append(f"before {step.peer.name}"), lambda step: told.append(f"after {step.peer.name}")
    )
    assert told == ["before wsbroker", "after wsbroker", "before floor", "after floor"]
