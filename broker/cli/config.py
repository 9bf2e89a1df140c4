"""`wsbroker config`: shows what can be configured."""

from __future__ import annotations

import click

from broker.cli.options import Group
from broker.cli.report import print_text, to_json


@click.group("config", cls=Group)
def command() -> None:
    """Show what can be configured."""


@command.command("default")
def config_default() -> int:
    """Print a commented configuration file with every default."""
    from broker.config.describe import default_toml

    return print_text(default_toml())


@command.command("schema")
def config_schema() -> int:
    """Print the JSON Schema of the configuration file."""
    from broker.config.describe import schema

    return print_text(to_json(schema(), indent=True) + "\n")
