"""Connecting: the server's CPU time for a connection with its handshake.

Up to 64 connections are on their way at the same time, and all stay open. The time counts until the server has nothing
more to do for them.
"""

import argparse

from bench import command, report
from bench.measure import Opening, take_turns
from bench.peers import BROKER, WEBSOCKETS

PEERS = (BROKER, WEBSOCKETS)


def main() -> int:
    """Measures, prints, saves; the exit status."""
    options = _parse()
    peers = command.chosen(options.peer, PEERS)
    load = Opening(options.connections, options.base, settle=0.3)
    runs = take_turns([load], peers, options.repeat, options.retries)
    rows = []
    for peer in peers:
        cost = report.figure(runs, load, peer, lambda result: result.server_us_per_connect)
        rate = report.figure(runs, load, peer, lambda result: result.connects_per_second)
        times = report.ratio(runs, load, peer, WEBSOCKETS, lambda result: 1 / result.server_us_per_connect)
        rows.append(
            [
                peer.title,
                f"{cost.median:.0f} µs" if cost else "",
                f"±{cost.spread:.0%}" if cost else "",
                report.rate(rate.median) if rate else "",
                f"{times.median:.2f}" if times else "",
            ]
        )
    print(f"\n{options.connections - options.base:,} connects, {options.repeat} repetitions\n")
    print(report.table(["", "server CPU of each", "spread", "connects/s", "× websockets"], rows))
    print("", *report.remarks(runs), sep="\n")
    report.save("connect", runs, options.json)
    return 0


def _parse() -> argparse.Namespace:
    parser = command.parser("connect", __doc__.split("\n")[0], PEERS, repeat=3)
    parser.add_argument("--connections", type=command.positive, default=5_000, help="(default %(default)s)")
    parser.add_argument("--base", type=command.positive, default=500, help="not counted (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    command.run(main)
