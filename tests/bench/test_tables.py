"""Tables of figures."""

import pytest

from bench import tables
from bench.measure import Publishing
from bench.scenarios import SCENARIOS
from tests.bench.made_up import LOAD, published, run_of

FANOUT = SCENARIOS["fanout"]


def test_a_row_for_each_peer_in_a_fixed_order() -> None:
    runs = [published("floor", 4_000_000.0), published("wsbroker", 2_000_000.0)]
    runs.append(published("wsbroker", 2_200_000.0, repetition=1))
    table = tables.of_load(FANOUT, runs, LOAD)
    assert table.title == "1,000 subscribers, window 16, 128 B"
    assert table.rows == [
        ["wsbroker", "2.10 M", "0.40", "98%", "50%", "900 µs", "1.5 ms", "±5%", ""],
        ["C floor, a send per read batch", "4.00 M", "0.40", "98%", "50%", "900 µs", "1.5 ms", "±0%", "0.50"],
    ]
    assert all(len(row) == len(table.headings) for row in table.rows)


def test_a_matrix_has_a_column_for_each_load() -> None:
    other = Publishing(subscribers=1000, window=1)
    runs = [published("wsbroker", 300.0), published("nats", 100.0), published("wsbroker", 200.0, other)]
    matrix = tables.matrix(FANOUT, runs, [LOAD, other], ["window 16", "window 1"])
    assert matrix.rows == [["wsbroker", "300", "200"], ["nats-server over WebSocket", "100 (3.00)", ""]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_a_table(name: str) -> None:
    scenario = SCENARIOS[name]
    load = scenario.loads[0]
    made = run_of("wsbroker", load)
    (row,) = tables.of_load(scenario, [made], load).rows
    assert row[0] == "wsbroker"
    assert all(row[:-1])


def test_markdown_figures_are_right_aligned() -> None:
    table = tables.Table("", ["", "rate"], [["wsbroker", "1"]])
    assert tables.markdown(table) == "|  | rate |\n|---|---:|\n| wsbroker | 1 |"
