"""`wsbroker sub`: prints events."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.cli.connection import check_connection, run
from broker.cli.options import connection_options
from broker.cli.report import Report, Status

if TYPE_CHECKING:
    from broker.overflow import Overflow


class OverflowOption(click.Option):
    """`--overflow`. It looks the policies up when it is used, so that the other commands start without them."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        self.type = click.Choice(_overflows())
        return super().process_value(ctx, value)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        return record and (record[0], f"{record[1].rstrip('.')}: {', '.join(_overflows())}.")


def _overflows() -> tuple[str, ...]:
    from broker.overflow import OVERFLOWS

    return OVERFLOWS


@click.command("sub")
@click.argument("topics", metavar="TOPIC...", nargs=-1, required=True)
@click.option("--overflow", metavar="P", cls=OverflowOption, help="When too slow.")
@click.option("--max-queue", metavar="N", type=click.IntRange(min=1), help="How many events may wait in the broker.")
@click.option(
    "--credit",
    metavar="N",
    type=click.IntRange(min=1),
    help="Let at most N events of each topic be under way: more come when those are printed.",
)
@click.option(
    "--last",
    metavar="N",
    type=click.IntRange(min=1),
    help="Print the N newest kept events of each topic first. The topics must keep history.",
)
@connection_options
def command(
    topics: tuple[str, ...],
    overflow: Overflow | None,
    max_queue: int | None,
    credit: int | None,
    last: int | None,
    url: str,
    token: str | None,
    ca: Path | None,
    as_json: bool,
) -> int:
    """Print the events of topics and patterns as they come, one JSON object a line.

    A line with "op":"gap" stands where events were lost. Ctrl-C ends it.
    """
    from broker.cli.lines import print_events
    from broker.errors import CommandError
    from broker.topics import check_pattern

    report = Report(as_json)
    check_connection(url, token, ca)
    try:
        for topic in topics:
            check_pattern(topic)
    except CommandError as error:
        return report.command_error(error)
    if sys.stdout is None:
        report.error("no_output", "standard output is closed")
        return Status.NO_OUTPUT
    work = print_events(
        topics, overflow=overflow, max_queue=max_queue, credit=credit, last=last, url=url, token=token, ca=ca
    )
    return run(work, report)
