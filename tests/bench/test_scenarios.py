"""The scenarios: what is among them, that they are documented, and that all together take less than 17 minutes."""

import re
from collections import Counter
from pathlib import Path

import pytest

from bench import turns
from bench.measure import Opening, Publishing, missing_ability
from bench.peers import BROKER, FLOOR, NATS, PEERS, PICOWS, SOCKETIFY
from bench.scenarios import SCENARIOS, fanout
from bench.scenarios.stalled import WITH, WITHOUT

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "benchmarks.md").read_text()


def rows(heading: str) -> set[str]:
    """What the first column of the table below this heading names."""
    section = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    (found,) = [text for text in section if text.startswith(f"{heading}\n")]
    return set(re.findall(r"^\| `([\w-]+)` \|", found, re.MULTILINE))


def test_every_scenario_is_documented() -> None:
    assert rows("The scenarios") == set(SCENARIOS)


def test_every_peer_is_documented() -> None:
    assert rows("The peers") == set(PEERS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_compares_by_a_column_of_its_table(name: str) -> None:
    scenario = SCENARIOS[name]
    assert scenario.compared in [column.value for column in scenario.columns]
    assert scenario.plots
    assert BROKER in scenario.peers
    for load in scenario.loads:
        # With one thread the broker is compared with itself on all cores.
        least = 1 if "threads" in load.needs else 2
        assert sum(missing_ability(peer, load) is None for peer in scenario.peers) >= least, "nothing to compare with"


def test_loads_of_a_goal_are_measured_five_times() -> None:
    goal = [
        *(("fanout", fanout.at(window), peer) for window in (1, 16, 64) for peer in (BROKER, FLOOR, SOCKETIFY, NATS)),
        *(("onetoone", SCENARIOS["onetoone"].loads[0], peer) for peer in (BROKER, PICOWS, SOCKETIFY, NATS)),
        *(("pipelined", SCENARIOS["pipelined"].loads[0], peer) for peer in (BROKER, NATS)),
        ("stalled", WITH, BROKER),
        ("stalled", WITHOUT, BROKER),
        ("connect", SCENARIOS["connect"].loads[0], BROKER),
    ]
    steps = Counter((step.scenario, step.load, step.peer.name) for step in turns.plan(list(SCENARIOS.values())).steps)
    assert {steps[scenario, load, peer.name] for scenario, load, peer in goal} == {5}


def test_full_bench_takes_less_than_seventeen_minutes() -> None:
    assert turns.plan(list(SCENARIOS.values())).expected < 15.5 * 60, "there must be time for what was disturbed"


def test_loads_have_descriptions() -> None:
    assert str(Publishing(subscribers=1, window=256)) == "1 subscriber, window 256, 128 B"
    assert str(Publishing(subscribers=1000, topics=1000, patterns=True, window=64)) == (
        "1,000 subscribers, 1,000 patterns, window 64, 128 B"
    )
    assert str(WITH) == "900 subscribers, 75 publishes/s, 2 kB, 100 more stalled"
    assert str(Publishing(subscribers=2, window=1, transport="unix")) == "2 subscribers, window 1, 128 B, Unix socket"
    assert str(Publishing(subscribers=2, window=1, payload=1024, transport="tls", deflate=True)) == (
        "2 subscribers, window 1, 1 kB, TLS, deflate"
    )
    assert str(Opening(connections=2000, opening=2000, subscribed=True)) == (
        "2,000 connections, subscribed, 2,000 at a time"
    )


def test_stalled_scenario_has_a_thousand_subscribers() -> None:
    assert WITH.subscribers + WITH.stalled == 1000
    assert WITH.subscribers == WITHOUT.subscribers


def test_loads_have_unique_names() -> None:
    for scenario in SCENARIOS.values():
        assert len({str(load) for load in scenario.loads}) == len(scenario.loads)
