"""What the bench shows: the progress, and tables."""

import io

import pytest
from rich.console import Console

from bench import terminal
from bench.peers import PEERS
from bench.tables import Table
from bench.turns import Step
from tests.bench.made_up import LOAD

STEPS = [Step("fanout", LOAD, PEERS["wsbroker"]), Step("fanout", LOAD, PEERS["nats"])]


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "left"),
    [
        (0.0, 100.0, 0.0, 100.0),
        (50.0, 100.0, 50.0, 50.0),
        (50.0, 100.0, 100.0, 100.0),  # twice as slow as expected
        (2.0, 100.0, 60.0, 98.0),  # the first step says little
        (100.0, 100.0, 80.0, 0.0),
    ],
)
def test_remaining_time_follows_the_pace(done: float, total: float, elapsed: float, left: float) -> None:
    assert terminal.remaining(done, total, elapsed) == pytest.approx(left)


def follow(console: Console) -> None:
    with terminal.following(console, STEPS) as display:
        for step in STEPS:
            display.before(step)
            display.after(step)


def test_progress_without_a_terminal_is_one_line_per_step() -> None:
    output = io.StringIO()
    follow(Console(file=output, width=200))
    assert output.getvalue().splitlines() == [
        "1/2 fanout: wsbroker, 1,000 subscribers, window 16, 128 B",
        "2/2 fanout: nats, 1,000 subscribers, window 16, 128 B",
    ]


def test_progress_on_a_terminal_is_a_bar_with_the_remaining_time() -> None:
    output = io.StringIO()
    follow(Console(file=output, width=200, force_terminal=True))
    assert "0:00 left" in output.getvalue()
    assert "fanout: nats, 1,000 subscribers" in output.getvalue()


def test_narrow_terminal_does_not_split_a_figure_from_its_unit() -> None:
    output = io.StringIO()
    table = Table("Fan-out", ["", "deliveries each second"], [["wsbroker", "2.62 M"], ["floor", "**no**"]])
    terminal.show(Console(file=output, width=22), table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert any(line.endswith("2.62\N{NO-BREAK SPACE}M") for line in lines)
    assert any(line.endswith(" no") for line in lines)
