"""`wsbroker check`: says every mistake in the configuration."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from broker.cli.options import config_option, json_option
from broker.cli.report import Report, print_text


@click.command("check")
@config_option
@json_option
def command(file: Path | None, as_json: bool) -> int:
    """Read the configuration as `serve` does, and say every mistake.

    Exits with 0 if there is none, else with 78.
    """
    from broker.config import Reading
    from broker.daemon import check_resources
    from broker.errors import ConfigError
    from broker.net.certificate import check_validity

    reading = Reading(file, os.environ, {})
    try:
        # `serve` starts with an expired certificate, and warns: no restart should end what still works for some.
        reading.problems += map(reading.locate, check_validity(reading.config.server, time.time()))
        check_resources(reading)
    except ConfigError as error:
        return Report(as_json).config_error(error)
    return print_text(
        f"The configuration is good: serve listens on {', '.join(reading.config.server.listen)}.\n", as_json
    )
