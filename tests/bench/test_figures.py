"""Medians, spreads and ratios of runs, and how figures are written."""

from collections.abc import Callable

import pytest

from bench import figures
from bench.figures import Figure
from bench.measure import Publishing
from bench.scenarios.base import deliveries
from tests.bench.made_up import LOAD, published


def test_a_figure_is_the_median_and_half_the_range() -> None:
    assert Figure.of([100.0, 110.0, 90.0, 100.0]) == Figure(100.0, 0.1)


def test_a_ratio_is_taken_run_by_run() -> None:
    pairs = [("wsbroker", 200.0, 0), ("websockets", 100.0, 0), ("wsbroker", 60.0, 1), ("websockets", 20.0, 1)]
    runs = [published(peer, rate, repetition=number) for peer, rate, number in pairs]
    assert figures.ratio(runs, LOAD, "wsbroker", "websockets", deliveries) == Figure(2.5, 0.2)


def test_runs_are_compared_within_one_repetition() -> None:
    """The first run of a peer failed: the second is not put beside the broker's first."""
    runs = [
        published("wsbroker", 200.0, repetition=0),
        published("wsbroker", 60.0, repetition=1),
        published("websockets", 20.0, repetition=1),
    ]
    assert figures.ratio(runs, LOAD, "wsbroker", "websockets", deliveries) == Figure(3.0, 0.0)
    assert figures.ratio(runs[:1] + runs[2:], LOAD, "wsbroker", "websockets", deliveries) is None


def test_unmeasured_load_has_no_figure() -> None:
    runs = [published("wsbroker", 200.0)]
    assert figures.figure(runs, LOAD, "websockets", deliveries) is None
    assert figures.figure(runs, Publishing(subscribers=1, window=1), "wsbroker", deliveries) is None
    assert figures.ratio(runs, LOAD, "wsbroker", "websockets", deliveries) is None


def test_remarks_name_unreliable_runs() -> None:
    runs = [
        published("wsbroker", 1.0, load_cpu=0.99),
        published("wsbroker", 1.0, load_cpu=0.98),
        published("floor", 1.0, other_cpu=0.5),
    ]
    assert figures.remarks(runs) == [
        "In 2 of 3 runs the load program was busy for more than 90% of the time: "
        "1,000 subscribers, window 16, 128 B (wsbroker).",
        "In 1 of 3 runs other programs used more than 10% of a core: 1,000 subscribers, window 16, 128 B (floor).",
    ]
    assert figures.remarks([published("wsbroker", 1.0)]) == []


def test_server_that_waits_for_the_load_is_reported_with_its_idle_time() -> None:
    """They take turns: neither is busy all the time, and what is measured is the two of them together."""
    runs = [published("wsbroker", 1.0, server_cpu=cpu) for cpu in (0.72, 0.70, 0.74)]
    runs.append(published("floor", 1.0, server_cpu=0.95))
    assert figures.remarks(runs) == [
        "In 3 of 4 runs the server waited for the load program for more than 10% of the time, so the rate depends on "
        "both: 1,000 subscribers, window 16, 128 B (wsbroker 28%).",
    ]
    assert not any(
        "waited" in said for said in figures.remarks([published("floor", 1.0, server_cpu=0.3, other_cpu=0.6)])
    )
    at_a_rate = Publishing(subscribers=1000, rate=30.0)
    assert figures.remarks([published("wsbroker", 1.0, at_a_rate, server_cpu=0.3)]) == []


def test_latency_at_saturation_is_marked_as_queueing() -> None:
    load = Publishing(subscribers=1000, rate=75.0)
    runs = [published("websockets", 1.0, load, server_cpu=0.94), published("wsbroker", 1.0, load, server_cpu=0.4)]
    assert figures.remarks(runs) == [
        "In 1 of 2 runs the server was busy for more than 80% of the time, so most of a latency is waiting in a queue: "
        "1,000 subscribers, 75 publishes/s, 128 B (websockets).",
    ]


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.rate, 0.0, "0"),
        (figures.rate, 999.4, "999"),
        (figures.rate, 999.6, "1.00 k"),
        (figures.rate, 12_345.0, "12.3 k"),
        (figures.rate, 216_400.0, "216 k"),
        (figures.rate, 3_050_000.0, "3.05 M"),
        (figures.duration, 900.0, "900 µs"),
        (figures.duration, 1500.0, "1.5 ms"),
        (figures.duration, 2_100_000.0, "2.10 s"),
        (figures.size, 710.0, "710 B"),
        (figures.size, 2_100.0, "2.1 kB"),
        (figures.size, -48_000_000.0, "-48.0 MB"),
        (figures.micros, 0.123, "0.12"),
        (figures.micros, 12.34, "12.3"),
        (figures.times, 1.256, "1.26"),
        (figures.times, 120.4, "120"),
    ],
)
def test_figure_has_significant_digits_only(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text
