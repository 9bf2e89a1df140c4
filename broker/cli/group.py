"""The group of the commands, which imports the one that is called, and what all of them share when they end."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Final

import click

from broker import __version__
from broker.cli.options import Group
from broker.cli.report import EXTENSION, Report, Status

COMMANDS: Final = (
    *("serve", "check", "config", "pub", "sub", "history", "presence"),
    *("bench", "store", "token", "key", "version"),
)
"""Each is `command` of the module of its name, in the order of the help."""


class LazyGroup(Group):
    """A group that imports a command when it is called, or listed in the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"broker.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, which is by default that of the process, and return the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    report = Report("--json" in args)
    try:
        status = wsbroker.main(args, prog_name="wsbroker", standalone_mode=False)
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError) and not report.as_json:
            error.show()
            return Status.USAGE
        message = " ".join(error.format_message().split()).rstrip(".")
        command = "wsbroker" if error.ctx is None else error.ctx.command_path
        report.error("usage", message if report.as_json else f"{message}; see {command} --help")
        return Status.USAGE
    except ImportError as error:
        if error.name != EXTENSION:
            raise
        report.error("no_extension", f"{EXTENSION} is not built, or not for this Python: {error}")
        return Status.FAULT
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # or one more would come out of the exit
        return Status.INTERRUPTED
    return int(status or 0)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s", prog_name="wsbroker")
def wsbroker() -> None:
    """A message broker for WebSockets."""
