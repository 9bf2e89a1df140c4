"""What is to be reached, and whether it was."""

import re
from collections.abc import Sequence

import msgspec
import pytest

from bench import goals
from bench.figures import Run
from bench.measure import Published, Publishing
from bench.scenarios import SCENARIOS, fanout, stalled
from tests.bench.made_up import opened, published


def rows(**runs: Sequence[Run]) -> dict[str, list[str]]:
    """The goals that were measured."""
    return {first: others for first, *others in goals.table(runs, all_of_them=False).rows}


@pytest.mark.parametrize(("rate", "word"), [(97.0, "aim"), (96.9, "yes"), (90.0, "yes"), (89.9, "**no**")])
def test_verdict_depends_on_target_and_minimum(rate: float, word: str) -> None:
    runs = [published("wsbroker", rate, fanout.at(1)), published("floor", 100.0, fanout.at(1))]
    found = rows(fanout=runs)
    assert found == {
        "fan-out to 1,000, window 1: share of the C floor": ["0.90", "0.97", f"{rate / 100:.2f} ±0%", word, ""],
    }


@pytest.mark.parametrize(
    ("rates", "reached"),
    [
        ([97.0, 98.0, 99.0], ["aim", ""]),
        ([91.0, 92.0, 96.0], ["yes", ""]),
        ([95.0, 98.0, 99.0], ["aim", "unsure: yes to aim"]),
        ([80.0, 91.0, 98.0], ["yes", "unsure: **no** to aim"]),
        ([10.0, 20.0, 91.0], ["**no**", "unsure: **no** to yes"]),
    ],
)
def test_result_within_its_spread_is_uncertain(rates: Sequence[float], reached: list[str]) -> None:
    runs = []
    for number, rate in enumerate(rates):
        runs.append(published("wsbroker", rate, fanout.at(1), repetition=number))
        runs.append(published("floor", 100.0, fanout.at(1), repetition=number))
    (row,) = rows(fanout=runs).values()
    assert row[3:] == reached


def test_verdict_states_its_figures() -> None:
    peers = [
        published("wsbroker", 97.0, fanout.at(1), server_cpu=0.7, load_cpu=0.95),
        published("floor", 100.0, fanout.at(1), server_cpu=0.7, other_cpu=0.4),
    ]
    (row,) = rows(fanout=peers).values()
    assert row[-1] == ("load bound 1/2; server waited 1/2; disturbed 1/2")


def test_best_peer_excludes_the_reference_floor() -> None:
    load = SCENARIOS["onetoone"].loads[0]
    rates = {"wsbroker": 200.0, "nats": 125.0, "picows": 100.0, "redis": 1000.0}
    found = rows(onetoone=[published(peer, rate, load) for peer, rate in rates.items()])
    assert found["one to one, 1,000 topics: ratio to the best peer"][2:] == ["1.60 ±0%", "yes", ""]


def test_less_memory_is_better() -> None:
    runs = [opened("wsbroker", 2100.0, SCENARIOS["idle"].loads[0]), opened("wsbroker", 9.0, SCENARIOS["idle"].loads[1])]
    assert rows(idle=runs) == {"idle connection, RSS": ["3.0 kB", "1.5 kB", "2.1 kB ±0%", "yes", ""]}


def test_latency_beside_stalled_subscribers_is_compared_with_latency_without_them() -> None:
    """Pair by pair; and not where publishes were held back, which are in no latency."""
    runs = [
        published("wsbroker", 1.0, stalled.WITH, p99=1100.0, server_cpu=0.4),
        published("wsbroker", 1.0, stalled.WITHOUT, p99=1000.0, server_cpu=0.4),
        published("wsbroker", 1.0, stalled.WITH, p99=2200.0, server_cpu=0.4, repetition=1),
        published("wsbroker", 1.0, stalled.WITHOUT, p99=2000.0, server_cpu=0.4, repetition=1),
        published("wsbroker", 1.0, stalled.WITH, p99=10.0, server_cpu=0.4, repetition=2, unsent=1),
        published("wsbroker", 1.0, stalled.WITHOUT, p99=10.0, server_cpu=0.4, repetition=2),
        published("nats", 1.0, stalled.WITH, p99=9000.0),
    ]
    assert rows(stalled=runs)["p99 of healthy subscribers beside 10 % stalled ones: ratio to p99 without stalled ones"][
        2:
    ] == [
        "1.10 ±0%",
        "yes",
        "",
    ]


@pytest.mark.parametrize(
    ("grown", "words", "remarks"),
    [
        (1_000_000, ["aim", "aim"], ["kept", "kept"]),
        (3_000_000, ["aim", "**no**"], ["kept", "EXCEEDED"]),
        (100_000_000, ["**no**", "**no**"], ["EXCEEDED", "EXCEEDED"]),
    ],
)
def test_memory_of_a_flood_is_compared_with_the_limits(grown: int, words: list[str], remarks: list[str]) -> None:
    """For each of those who stopped reading by himself, and for all of them if they share the events."""
    load = msgspec.structs.replace(SCENARIOS["flood"].loads[0], seconds=60.0)
    samples = ((1.0, 50_000_000 + grown), (60.0, 50_000_000))
    run = published("wsbroker", 1.0, load, samples=samples, seconds=60.01)
    assert isinstance(run.result, Published)
    assert stalled.growth(run.result) == grown
    # 100 queues of 256 events of 173 bytes, one event more each, and the places.
    assert stalled.bound(run.result) == 100 * (256 * 173 + 173 + 256 * stalled.PLACE)
    assert stalled.shared(run.result) == 256 * 173 + 100 * (173 + 256 * stalled.PLACE)
    found = rows(flood=[run])
    title = "memory growth in a flood of 60 s with 100 stalled subscribers: share of what the limits allow"
    assert next(iter(found)) == title
    assert [row[-2] for row in found.values()] == words
    (remark,) = SCENARIOS["flood"].remarks([run])
    assert remark.startswith("In 60 s the memory of wsbroker grew by ")
    assert re.findall("kept|EXCEEDED", remark) == remarks


def test_flood_stops_for_a_server_that_grows_without_bound() -> None:
    load = SCENARIOS["flood"].loads[0]
    assert isinstance(load, Publishing)
    assert load.most_memory == stalled.MOST_MEMORY
    run = published("picows", 1.0, load, samples=((1.0, 50_000_000), (7.1, 4_000_000_001)), seconds=7.2)
    assert SCENARIOS["flood"].remarks([run]) == ["picows had 4 GB of memory after 7.2 s, and the flood was ended."]


def test_runs_of_any_length_are_judged() -> None:
    load = msgspec.structs.replace(fanout.at(1), seconds=5.0)
    found = rows(fanout=[published("wsbroker", 97.0, load), published("floor", 100.0, load)])
    assert list(found) == ["fan-out to 1,000, window 1: share of the C floor"]


def test_unmeasured_goal_is_reported() -> None:
    table = goals.table({})
    assert {row[3] for row in table.rows} == {"not measured"}
    assert len(table.rows) == len(goals.GOALS)


def test_every_goal_is_measured_by_a_full_run() -> None:
    runs: dict[str, list[Run]] = {}
    for scenario in SCENARIOS.values():
        runs[scenario.name] = [
            published(peer.name, 100.0, load) if isinstance(load, Publishing) else opened(peer.name, 2000.0, load)
            for load in scenario.loads
            for peer in scenario.peers
        ]
    assert all(row[3] != "not measured" for row in goals.table(runs).rows)
