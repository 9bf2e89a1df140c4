"""The command `wsbroker`: one file for each command; `group` finds and runs them.

A command does its work and returns its exit status; what goes wrong becomes one line on standard error, never a
traceback. Each pays for its own imports alone: `pub` and `sub` run in loops of shell scripts.
"""

from broker.cli.group import main, wsbroker

__all__ = ["main", "wsbroker"]
