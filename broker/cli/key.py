"""`wsbroker key`: makes API keys for backends."""

from __future__ import annotations

import click

from broker.cli.options import Group, json_option
from broker.cli.report import print_text, to_json


@click.group("key", cls=Group)
def command() -> None:
    """Make API keys for backends."""


@command.command("make")
@json_option
def make(as_json: bool) -> int:
    """Make an API key; print it, and its hash for the configuration.

    The key is stored nowhere: give it to the backend now.
    """
    from broker.auth.api_keys import hash_key, make_key

    key = make_key()
    hashed = hash_key(key)
    text = to_json({"key": key, "hash": hashed}) if as_json else f"key   {key}\nhash  {hashed}"
    return print_text(text + "\n", as_json)
