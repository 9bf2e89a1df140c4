"""What the command lines of all scenarios have in common."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from bench.measure import MeasureError, raise_open_files
from bench.native import BuildError
from bench.peers import Peer


def parser(scenario: str, description: str, peers: Sequence[Peer], repeat: int) -> argparse.ArgumentParser:
    """A parser with the options that every scenario has; `peers` are those that can take part, all by default."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{scenario}", description=description)
    made.add_argument(
        "--peer", action="append", choices=[peer.name for peer in peers], help="measure only this one; repeatable"
    )
    made.add_argument("--repeat", type=positive, default=repeat, help="repetitions (default %(default)s)")
    made.add_argument(
        "--retries", type=int, default=2, help="repeat a run so often if others disturb it (default %(default)s)"
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help=f"for the results (default bench/results/{scenario}.json)"
    )
    return made


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the scenarios that publish."""
    parser.add_argument("--payload", type=positive, default=128, help="bytes (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a run after its warm-up (default %(default)s)")


def chosen(names: Sequence[str] | None, peers: Sequence[Peer]) -> list[Peer]:
    """The peers that were asked for and can run here. Those that cannot are named on standard error."""
    present = []
    for peer in peers:
        if names and peer.name not in names:
            continue
        if reason := peer.missing():
            print(f"missing: {peer.name} ({reason})", file=sys.stderr)
        else:
            present.append(peer)
    return present


def run(scenario: Callable[[], int]) -> NoReturn:
    """Runs a scenario as a program: its status, or a message about what went wrong and 1."""
    raise_open_files()
    # So that the server under test is stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(scenario())
    except (MeasureError, BuildError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def positives(text: str) -> list[int]:
    """An argument that is several of them, with commas between."""
    return [positive(part) for part in text.split(",")]
