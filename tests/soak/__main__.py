"""`make soak`: what a broker must stand for long, with the memory that it takes.

First 100,000 clients connect, authenticate, subscribe, publish and close, one after the other (`--cycles`). Then 100
subscribers stop reading beside 100 that read on, for a minute (`--seconds`).
"""

from __future__ import annotations

import argparse
from typing import Final

from tests.fixtures_broker import start_broker
from tests.soak.cycles import cycle, growth
from tests.soak.stall import p99, stall

GROWTH: Final = 0.03
"""Part by which the memory may grow after the first fifth of the cycles."""


def main() -> None:
    """Run both, print the results, and fail if memory grows or the healthy clients suffer."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--cycles", type=int, default=100_000, help="0: none (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="0: none (default: %(default)s)")
    options = parser.parse_args()
    if options.cycles:
        check_cycles(options.cycles)
    if options.seconds:
        check_stall(options.seconds)


def check_cycles(cycles: int) -> None:
    """Connect clients one after the other."""
    sizes = cycle(cycles)
    shown = ", ".join(f"{size / 2**20:.1f}" for size in sizes)
    print(f"{cycles:,} cycles: {shown} MiB, grown by {growth(sizes):.1%}", flush=True)
    if growth(sizes) > GROWTH:
        raise SystemExit("the memory of the broker grows with the clients that come and go")


def check_stall(seconds: float) -> None:
    """Let half of the subscribers stop reading."""
    # Without pings: who reads nothing for half a minute would be closed.
    with start_broker(environ={"WSBROKER_LIMITS__PING_INTERVAL": "0"}) as broker:
        outcome = stall(broker, stalled=100, healthy=100, seconds=seconds)
    print(outcome)
    if outcome.most > outcome.bound:
        raise SystemExit("the broker took more memory than its limits allow")
    if p99(outcome.beside) > 1.2 * p99(outcome.alone):
        raise SystemExit("those who read had to wait for those who do not; or the machine was busy")


if __name__ == "__main__":
    main()
