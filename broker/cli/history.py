"""`wsbroker history`: prints kept events."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from broker.cli.connection import check_connection, run
from broker.cli.options import connection_options
from broker.cli.report import Report, Status


@click.command("history")
@click.argument("topic")
@click.option(
    "--last", metavar="N", type=click.IntRange(min=1), default=100, show_default=True, help="How many, the newest."
)
@connection_options
def command(topic: str, last: int, url: str, token: str | None, ca: Path | None, as_json: bool) -> int:
    """Print the newest kept events of a topic, the oldest of them first, one JSON object a line."""
    from broker.cli.lines import print_history
    from broker.errors import CommandError
    from broker.topics import check_topic

    report = Report(as_json)
    check_connection(url, token, ca)
    try:
        check_topic(topic)
    except CommandError as error:
        return report.command_error(error)
    if sys.stdout is None:
        report.error("no_output", "standard output is closed")
        return Status.NO_OUTPUT
    return run(print_history(topic, last, url=url, token=token, ca=ca), report)
