"""The commands of `wsbroker`, found as the help finds them."""

from __future__ import annotations

from collections.abc import Iterator

import click

from broker.cli import wsbroker


def commands(group: click.Command = wsbroker, words: str = "wsbroker") -> Iterator[tuple[str, click.Command]]:
    """Each command that does something, by the words that call it."""
    if not isinstance(group, click.Group):
        yield words, group
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from commands(command, f"{words} {name}")
