"""`wsbroker pub`: publishes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from broker.cli.connection import check_connection, is_text, run
from broker.cli.options import connection_options
from broker.cli.report import Report, Status


@click.command("pub")
@click.argument("topic")
@click.argument("data", required=False)
@click.option("--text", is_flag=True, help="The data is plain text, published as a JSON string.")
@click.option("--key", metavar="K", help="The key of the events.")
@connection_options
def command(
    topic: str,
    data: str | None,
    text: bool,
    key: str | None,
    url: str,
    token: str | None,
    ca: Path | None,
    as_json: bool,
) -> int:
    """Publish DATA, which is JSON, or each line of standard input.

    Every event is answered by the broker before the command ends. A line that is not published is reported with its
    number, the others are, and the exit status is 1 then.
    """
    from broker.cli.lines import json_value, publish_lines, publish_one, text_value
    from broker.errors import CommandError
    from broker.topics import check_topic

    report = Report(as_json)
    check_connection(url, token, ca)
    if key is not None and not is_text(key):
        raise click.BadParameter("it is not UTF-8", param_hint="--key")
    try:
        check_topic(topic)
        # Arguments are bytes for the system. Python hands those that are not UTF-8 over as halves of surrogate pairs.
        value = None if data is None else (text_value if text else json_value)(os.fsencode(data))
    except CommandError as error:
        return report.command_error(error)
    if value is not None:
        return run(publish_one(topic, value, key=key, url=url, token=token, ca=ca), report)
    if sys.stdin is None:
        report.error("no_input", "standard input is closed")
        return Status.NO_INPUT
    work = publish_lines(topic, text=text, key=key, url=url, token=token, ca=ca, failed=report.command_error)
    return run(work, report)
