"""`wsbroker presence`: prints who is subscribed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from broker.cli.connection import check_connection, run
from broker.cli.options import connection_options
from broker.cli.report import Report, Status


@click.command("presence")
@click.argument("topic")
@connection_options
def command(topic: str, url: str, token: str | None, ca: Path | None, as_json: bool) -> int:
    """Print the members of a topic, one JSON object a line."""
    from broker.cli.lines import print_members
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
    return run(print_members(topic, url=url, token=token, ca=ca), report)
