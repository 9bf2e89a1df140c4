"""Tries the client libraries of other people on a real broker: `python -m tests.interop [NAME…]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click
from rich import box
from rich.console import Console
from rich.table import Table

from tests.fixtures_broker import start_broker
from tests.interop.kits import KITS, Command, MissingError
from tests.interop.libraries import LIBRARIES, STEPS, Library
from tests.interop.trial import Outcome, try_library

WIDTH = 140
"""Columns of the table where the output is no terminal."""

NAMES = [library.name for library in LIBRARIES]

COMPLAINT = re.compile(r"\[(warning|error|critical) *\]")
"""An entry of the broker's log that a well-behaved client must not cause."""


class Row(NamedTuple):
    """One library on one broker."""

    library: Library
    compression: bool
    outcome: Outcome


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAME]...")
@click.option("--strict", is_flag=True, help="A missing library is a failure.")
@click.option("--require", multiple=True, type=click.Choice(NAMES), metavar="NAME", help="This library must be there.")
def main(names: tuple[str, ...], strict: bool, require: tuple[str, ...]) -> None:
    """Try client libraries on a real broker, without and with compression.

    Each library connects, subscribes, publishes, receives, sends a message of max_size bytes and a fragmented one, and
    closes with 1000. The exit status is 1 if a step fails, or if a library is missing that must be there.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    chosen = [library for library in LIBRARIES if not names or library.name in {*names, *require}]
    commands, missing = prepare(chosen, console)
    found = [library for library in chosen if library.name in commands]
    rows: list[Row] = []
    complaints: list[str] = []
    for compression in (False, True):
        tried, logged = try_all(found, commands, compression, console)
        rows += tried
        complaints += logged
    if rows:
        console.print(table(sorted(rows, key=lambda row: found.index(row.library))))
    failed = [row for row in rows if row.outcome.failed]
    for line in (*map(describe, failed), *complaints):
        console.print(line, soft_wrap=True)
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}", soft_wrap=True)
    unmet = [name for name in missing if strict or name in require]
    wrong = len(failed) + len(complaints) + len(unmet)
    console.print(f"interop: {len(rows) - len(failed)} passed, {wrong} failed")
    sys.exit(1 if wrong else 0)


def prepare(libraries: Sequence[Library], console: Console) -> tuple[dict[str, Command], dict[str, str]]:
    """Install what is missing; gives the command of each program, and what could not be installed, by name."""
    commands, missing = {}, {}
    for library in libraries:
        with console.status(f"installing {library.name}"):
            try:
                commands[library.name] = KITS[library.kit](library)
            except MissingError as error:
                missing[library.name] = str(error)
    return commands, missing


def try_all(
    libraries: Sequence[Library], commands: dict[str, Command], compression: bool, console: Console
) -> tuple[list[Row], list[str]]:
    """Try libraries on one broker; gives how each went, and what the broker complained of in its log."""
    if not libraries:
        return [], []
    rows = []
    environ = {"WSBROKER_SERVER__ADMIN": "", "WSBROKER_SERVER__COMPRESSION": str(compression).lower()}
    with start_broker(environ=environ) as broker:
        for library in libraries:
            with console.status(f"{library.name}, compression {on_or_off(compression)}"):
                outcome = try_library(library, commands[library.name], broker.url, compression=compression)
                rows.append(Row(library, compression, outcome))
    return rows, [f"the broker logged: {line}" for line in broker.program.output.splitlines() if COMPLAINT.search(line)]


def table(rows: Sequence[Row]) -> Table:
    """Two lines for each library: compression off and on."""
    shown = Table("library", "version", "compression", *STEPS, box=box.SIMPLE_HEAD)
    for library, compression, outcome in rows:
        agreed = "on, not offered" if compression and not library.compresses else on_or_off(compression)
        first = ("", "") if compression else (library.name, outcome.version)
        shown.add_row(*first, agreed, *(cell(library, outcome, step) for step in STEPS), end_section=compression)
    return shown


def cell(library: Library, outcome: Outcome, step: str) -> str:
    """How a step went, in a word."""
    if step in outcome.failed:
        return "failed"
    if step in library.cannot:
        return "n.a."
    return outcome.passed[step] or "ok"


def describe(row: Row) -> str:
    """Each failed step of a library with its reason, and the request that it sent."""
    library, compression, outcome = row
    lines = [
        f"failed: {library.name}, compression {on_or_off(compression)}: {step}: {reason}"
        for step, reason in outcome.failed.items()
    ]
    request = [f"    {line!r}" for line in outcome.request.splitlines(keepends=True)]
    return "\n".join([*lines, *request])


def on_or_off(compression: bool) -> str:
    """The word for a setting."""
    return "on" if compression else "off"


if __name__ == "__main__":
    main()
