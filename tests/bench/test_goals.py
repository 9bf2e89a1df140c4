"""What is to be reached, and whether it was."""

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
def test_a_ratio_reaches_its_aim_or_enough_or_not(rate: float, word: str) -> None:
    runs = [published("wsbroker", rate, fanout.at(1)), published("floor", 100.0, fanout.at(1))]
    found = rows(fanout=runs)
    assert found == {
        "fan-out to 1,000, window 1: of the C floor": ["0.90", "0.97", f"{rate / 100:.2f} ±0%", word],
    }


def test_the_best_peer_is_a_peer_and_no_yardstick() -> None:
    load = SCENARIOS["onetoone"].loads[0]
    rates = {"wsbroker": 200.0, "nats": 125.0, "picows": 100.0, "redis": 1000.0}
    found = rows(onetoone=[published(peer, rate, load) for peer, rate in rates.items()])
    assert found["one to one, 1,000 topics: against the best peer"][2:] == ["1.60 ±0%", "yes"]


def test_less_memory_is_better() -> None:
    runs = [opened("wsbroker", 2100.0, SCENARIOS["idle"].loads[0]), opened("wsbroker", 9.0, SCENARIOS["idle"].loads[1])]
    assert rows(idle=runs) == {"idle connection, RSS": ["3.0 kB", "1.5 kB", "2.1 kB ±0%", "yes"]}


def test_the_healthy_are_compared_with_the_healthy_that_are_alone() -> None:
    runs = [
        published("wsbroker", 1.0, stalled.WITH, p99=1100.0),
        published("wsbroker", 1.0, stalled.WITHOUT, p99=1000.0),
        published("nats", 1.0, stalled.WITH, p99=9000.0),
    ]
    assert rows(stalled=runs)["p99 of healthy subscribers with 10 % stalled: against none stalled"][2:] == [
        "1.10 ±0%",
        "yes",
    ]


@pytest.mark.parametrize(("grown", "word"), [(1_000_000, "aim"), (100_000_000, "**no**")])
def test_a_flood_is_compared_with_what_the_limits_allow(grown: int, word: str) -> None:
    load = SCENARIOS["flood"].loads[0]
    run = published("wsbroker", 1.0, load, samples=((1.0, 50_000_000 + grown), (2.0, 50_000_000)))
    assert isinstance(run.result, Published)
    assert stalled.growth(run.result) == grown
    # 100 queues of 256 events of 173 bytes, one event more each, and the places.
    assert stalled.bound(run.result) == 100 * (256 * 173 + 173 + 256 * stalled.PLACE)
    (row,) = rows(flood=[run]).values()
    assert row[-1] == word
    (remark,) = SCENARIOS["flood"].remarks([run])
    assert ("ABOVE" in remark) == (word == "**no**")


def test_longer_and_shorter_runs_count_too() -> None:
    load = msgspec.structs.replace(fanout.at(1), seconds=5.0)
    found = rows(fanout=[published("wsbroker", 97.0, load), published("floor", 100.0, load)])
    assert list(found) == ["fan-out to 1,000, window 1: of the C floor"]


def test_what_was_not_measured_is_said() -> None:
    table = goals.table({})
    assert {row[3] for row in table.rows} == {"not measured"}
    assert len(table.rows) == len(goals.GOALS)


def test_every_goal_is_about_something_that_a_whole_run_measures() -> None:
    runs: dict[str, list[Run]] = {}
    for scenario in SCENARIOS.values():
        runs[scenario.name] = [
            published(peer.name, 100.0, load) if isinstance(load, Publishing) else opened(peer.name, 2000.0, load)
            for load in scenario.loads
            for peer in scenario.peers
        ]
    assert all(row[3] != "not measured" for row in goals.table(runs).rows)
