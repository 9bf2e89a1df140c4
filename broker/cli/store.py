"""`wsbroker store`: looks after the SQLite file in which history is kept."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import click

from broker.cli.options import Group, config_option, json_option
from broker.cli.report import Report, Status, print_text, to_json


@click.group("store", cls=Group)
def command() -> None:
    """Look after the SQLite file of the configuration."""


def with_file(work: Callable[..., int]) -> Callable[..., int]:
    """Give a command the file that the configuration names, and report what may be wrong with it."""

    @functools.wraps(work)
    def run(file: Path | None, as_json: bool, **options: Path) -> int:
        from broker.config import SQLITE, Reading
        from broker.engines.store import StoreError
        from broker.errors import ConfigError

        report = Report(as_json)
        try:
            reading = Reading(file, os.environ, {})
            reading.raise_problems([])
            engine = reading.config.server.engine
            if not engine.startswith(SQLITE):
                raise ConfigError([f"server.engine is {engine}: there is no file"])
            return work(Path(engine.removeprefix(SQLITE)), as_json, **options)
        except ConfigError as error:
            return report.config_error(error)
        except StoreError as error:
            report.error("store", str(error))
            return Status.INCOMPLETE

    return config_option(json_option(run))


@command.command("info")
@with_file
def store_info(path: Path, as_json: bool) -> int:
    """Say what is in the file: topics, events, sizes."""
    from broker.engines.tools import info

    found = info(path)
    width = max(map(len, found))
    lines = to_json(found) if as_json else "\n".join(f"{name:{width}}  {value}" for name, value in found.items())
    return print_text(lines + "\n", as_json)


@command.command("check")
@with_file
def store_check(path: Path, as_json: bool) -> int:
    """Read all of the file, and say what is wrong. Exits with 1 if something is."""
    from broker.engines.tools import check

    problems = check(path)
    for problem in problems:
        Report(as_json).error("store", problem)
    return Status.INCOMPLETE if problems else print_text(f"{path} is good.\n", as_json)


@command.command("compact")
@with_file
def store_compact(path: Path, as_json: bool) -> int:
    """Give the room of dropped events back to the file system. No broker may have the file open."""
    from broker.engines.tools import compact

    before, after = compact(path)
    return print_text(f"{path} had {before} bytes, and has {after}.\n", as_json)


@command.command("backup")
@click.argument("target", type=click.Path(path_type=Path))
@with_file
def store_backup(path: Path, as_json: bool, target: Path) -> int:
    """Copy the file to TARGET, as it is at one moment, also while a broker writes to it."""
    from broker.engines.tools import backup

    backup(path, target)
    return print_text(f"{path} was copied to {target}.\n", as_json)
