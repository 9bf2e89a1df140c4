"""What the bench makes of its measurements."""

from pathlib import Path

import msgspec
import pytest

from bench import report
from bench.measure import Latency, Published, Publishing, Run
from bench.peers import BROKER, FLOOR, WEBSOCKETS, Peer
from bench.report import Figure

LOAD = Publishing(subscribers=1000, window=16)


def run(peer: Peer, rate: float, load_cpu: float = 0.5, other_cpu: float = 0.0) -> Run[Published]:
    latency = Latency(p50=900.0, p90=950.0, p99=1500.0, p999=1600.0, max=1700.0)
    result = Published(
        subscribers=1000,
        topics=1,
        window=16,
        event_bytes=173,
        seconds=1.0,
        publishes=int(rate / 1000),
        deliveries=int(rate),
        deliveries_per_second=rate,
        total_publishes=int(rate / 1000),
        total_deliveries=int(rate),
        server_cpu=0.98,
        load_cpu=load_cpu,
        other_cpu=other_cpu,
        server_us_per_delivery=0.4,
        server_rss=50_000_000,
        publishes_per_write=16.0,
        deliveries_per_read=16.0,
        done_us=latency,
        delivery_us=latency,
    )
    return Run(peer, LOAD, result)


def test_a_figure_is_the_median_and_half_the_range() -> None:
    assert Figure.of([100.0, 110.0, 90.0, 100.0]) == Figure(100.0, 0.1)


def test_a_ratio_is_taken_run_by_run() -> None:
    runs = [run(BROKER, 200.0), run(WEBSOCKETS, 100.0), run(BROKER, 60.0), run(WEBSOCKETS, 20.0)]
    assert report.ratio(runs, LOAD, BROKER, WEBSOCKETS, report.deliveries) == Figure(2.5, 0.2)


def test_there_is_no_figure_for_what_was_not_measured() -> None:
    runs = [run(BROKER, 200.0)]
    assert report.figure(runs, LOAD, WEBSOCKETS, report.deliveries) is None
    assert report.figure(runs, Publishing(1, 1), BROKER, report.deliveries) is None
    assert report.ratio(runs, LOAD, BROKER, WEBSOCKETS, report.deliveries) is None


def test_a_row_has_a_cell_for_each_heading() -> None:
    runs = [run(BROKER, 2_000_000.0), run(WEBSOCKETS, 100_000.0)]
    row = report.publishing_row(runs, LOAD, BROKER, (WEBSOCKETS, FLOOR))
    assert row == ["2.00 M", "±0%", "0.40", "98%", "50%", "900 µs", "1.5 ms", "20.00", ""]
    assert len(row) == len(report.PUBLISHING_HEADINGS) + 2
    assert len(report.publishing_row(runs, LOAD, FLOOR, (WEBSOCKETS, FLOOR))) == len(row)


def test_columns_of_numbers_stand_to_the_right() -> None:
    assert report.table(["", "rate"], [["wsbroker", "1"], ["floor", "2,000"]]) == (
        "           rate\nwsbroker      1\nfloor     2,000"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (12_345.0, "12.3 k"),
        (216_400.0, "216 k"),
        (3_050_000.0, "3.05 M"),
    ],
)
def test_a_rate_has_three_digits(value: float, text: str) -> None:
    assert report.rate(value) == text


def test_remarks_name_runs_that_do_not_count() -> None:
    assert report.remarks([run(BROKER, 1.0, load_cpu=0.99), run(FLOOR, 1.0, other_cpu=0.5)])[:2] == [
        "In 1 of 2 runs (wsbroker) the load program was busy all the time.",
        "In 1 of 2 runs other programs used more than 10% of a core: these figures do not count for much.",
    ]


def test_saves_every_run_with_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "results" / "fanout.json"
    report.save("fanout", [run(BROKER, 1.0), run(FLOOR, 2.0)], file)
    saved = msgspec.json.decode(file.read_bytes())
    assert [(each["peer"], each["load"]["window"]) for each in saved["runs"]] == [("wsbroker", 16), ("floor", 16)]
    assert saved["runs"][1]["result"]["done_us"]["p99.9"] == 1600.0
    assert saved["machine"]["cores"] >= 1
