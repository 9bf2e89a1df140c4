"""`wsbroker serve`: runs the broker."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import click

from broker.cli.options import config_option


@click.command("serve")
@config_option
@click.option(
    "--listen",
    metavar="ADDRESS",
    multiple=True,
    help="host:port, [v6]:port, unix:/path or systemd; may be given several times.  [default: 127.0.0.1:8765]",
)
@click.option("--admin", metavar="ADDRESS", help="The admin listener, in HTTP; '' for none.  [default: 127.0.0.1:8766]")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="How the log is written.  [default: text]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
def command(
    file: Path | None, listen: tuple[str, ...], admin: str | None, log_format: str | None, log_level: str | None
) -> int:
    """Run the broker until SIGTERM or Ctrl-C."""
    flags = {
        "server.listen": list(listen) or None,
        "server.admin": admin,
        "log.format": log_format,
        "log.level": log_level,
    }
    from broker.config import Reading
    from broker.daemon import run

    # By the path that it has now, whatever the working directory is then.
    file = None if file is None else file.absolute()
    return run(functools.partial(Reading, file, dict(os.environ), flags))
