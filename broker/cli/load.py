"""Starts the load program: the native client of the bench and of `wsbroker bench` (its sources are in bench/load)."""

import sys

# It ends its process when something fails, and keeps a core busy: it has a process of its own.
_START = "import sys; from broker._load import main; sys.exit(main(sys.argv[1:]))"
_START_BY_INPUT = "import json, sys; from broker._load import main; sys.exit(main(json.load(sys.stdin)))"


def command() -> list[str]:
    """The beginning of a command line that runs the load program; its arguments follow (bench/load/options.c)."""
    # -P: what lies in the current folder is not imported in place of the standard library.
    return [sys.executable, "-P", "-c", _START]


def command_by_input() -> list[str]:
    """The whole command line; the arguments are read from standard input, as a JSON array.

    Everybody on the machine can read a command line, and there may be a token among the arguments.
    """
    return [sys.executable, "-P", "-c", _START_BY_INPUT]
