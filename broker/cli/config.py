"""`wsbroker config`: shows what can be configured."""

from __future__ import annotations

import json

import click

from broker.cli.report import print_text


@click.group("config")
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

    return print_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
