"""`wsbroker bench`: loads a running broker and measures it."""

from __future__ import annotations

from pathlib import Path

import click

from broker.cli.connection import check_connection, run
from broker.cli.options import connection_options
from broker.cli.report import Report, Status, print_text


@click.command("bench")
@click.option(
    "--subscribers",
    "--connections",
    metavar="N",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    help="Connections that subscribe; one more publishes.",
)
@click.option(
    "--topics",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=1,
    show_default=True,
    help="The subscribers are spread over so many topics, of which their number is a multiple.",
)
@click.option("--window", metavar="N", type=click.IntRange(1, 65_536), help="Publishes kept under way.  [default: 16]")
@click.option(
    "--rate",
    metavar="R",
    type=click.FloatRange(0, 10_000_000, min_open=True),
    help="Publishes a second, in place of a window: latencies count from when each is due.",
)
@click.option(
    "--payload",
    metavar="BYTES",
    type=click.IntRange(2, 65_000),
    default=128,
    show_default=True,
    help="Bytes of data of an event.",
)
@click.option(
    "--seconds",
    metavar="S",
    type=click.FloatRange(0.1, 86_400),
    default=5.0,
    show_default=True,
    help="How long to measure.",
)
@connection_options
def command(
    subscribers: int,
    topics: int,
    window: int | None,
    rate: float | None,
    payload: int,
    seconds: float,
    url: str,
    token: str | None,
    ca: Path | None,
    as_json: bool,
) -> int:
    """Load a running broker and measure it.

    Everything happens in topics of a random name below "bench.", so that nobody else's are touched; but the broker has
    less time for others meanwhile.
    """
    from broker.cli.measure import Outcome, Plan, measure, missing_files
    from broker.cli.measure_view import View, as_line, table

    report = Report(as_json)
    check_connection(url, token, ca)
    if window is not None and rate is not None:
        raise click.UsageError("--window and --rate exclude each other")
    if subscribers % topics:
        raise click.BadParameter(f"{subscribers} is not a multiple of the {topics} topics", param_hint="--subscribers")
    if reason := missing_files(subscribers):
        raise click.BadParameter(reason, param_hint="--subscribers")
    plan = Plan(url, subscribers, topics, window or 16, rate, payload, seconds, token, ca)
    outcomes: list[Outcome] = []

    async def work(view: View) -> bool:
        outcomes.append(await measure(plan, view.show))
        return True

    with View(plan, quiet=as_json) as view:
        status = run(work(view), report)
    if status != Status.OK:
        return status
    return print_text((as_line if as_json else table)(outcomes[0]), as_json)
