"""`make soak`: 100 subscribers that stop reading beside 100 that read on, for a minute or `--seconds`."""

from __future__ import annotations

import argparse

from tests.fixtures_broker import start_broker
from tests.soak.stall import p99, stall


def main() -> None:
    """Run it, say what came of it, and fail where memory or the healthy suffer."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=60.0, help="(default: %(default)s)")
    seconds: float = parser.parse_args().seconds
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
