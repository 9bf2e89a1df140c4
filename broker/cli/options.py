"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

URL: Final = "ws://127.0.0.1:8765"
"""Where a broker without any configuration listens. A copy of `wsbroker_client.DEFAULT_URL`: an import costs time."""


_Command = TypeVar("_Command", bound=Callable[..., Any])


def together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Put several options together, to give them to several commands."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Group(click.Group):
    """A group whose help shows the whole first sentence of each command: click cuts it to fit into one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None
            rows.append((name, command.get_short_help_str(limit=1000)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


json_option = click.option("--json", "as_json", is_flag=True, help="Print errors as JSON objects, one a line.")
config_option = click.option(
    "--config",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TOML file. By default /etc/wsbroker/wsbroker.toml, if there is one.",
)
connection_options = together(
    click.option(
        "--url",
        metavar="U",
        default=URL,
        show_default=True,
        envvar="WSBROKER_URL",
        help="The broker: ws://host:port, wss://host:port or unix:/path.  [env: WSBROKER_URL]",
    ),
    click.option(
        "--token",
        metavar="T",
        envvar="WSBROKER_TOKEN",
        help="Says who you are. Others on this machine may see it on the command line, not in WSBROKER_TOKEN.",
    ),
    click.option(
        "--ca",
        metavar="FILE",
        envvar="WSBROKER_CA",
        type=click.Path(path_type=Path),
        help="Certificates to trust at wss://, in place of the system's.  [env: WSBROKER_CA]",
    ),
    json_option,
)
