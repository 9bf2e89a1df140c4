"""Idle connections: what each adds to the server's resident memory.

The first connections (`--base`) are not counted, so that what a server sets up once, for any number of them, is not.
What the kernel holds for the sockets is not part of resident memory. `--check` exits with 1 if a connection costs the
broker more than it promises.
"""

import argparse

from bench import command, report
from bench.measure import Opened, Opening, take_turns
from bench.peers import BROKER, WEBSOCKETS

PEERS = (BROKER, WEBSOCKETS)
# Bytes for an idle connection, at most.
PROMISED = 3000


def main() -> int:
    """Measures, prints, saves; the exit status."""
    options = _parse()
    peers = command.chosen(options.peer, (BROKER,) if options.check else PEERS)
    loads = [Opening(options.connections, options.base, subscribed) for subscribed in (False, True)]
    runs = take_turns(loads, peers, options.repeat, options.retries)
    rows = []
    for load in loads:
        for peer in peers:
            each = report.figure(runs, load, peer, _bytes)
            total = report.figure(runs, load, peer, lambda result: result.server_rss / 1e6)
            rows.append(
                [
                    f"{'subscribed to one topic' if load.subscribed else 'idle':<24}{peer.title}",
                    f"{each.median:,.0f} B" if each else "",
                    f"±{each.spread:.0%}" if each else "",
                    f"{total.median:.1f} MB" if total else "",
                ]
            )
    print(f"\n{options.connections:,} connections, {options.repeat} repetitions\n")
    print(report.table(["", "RSS of each", "spread", "RSS in all"], rows))
    report.save("idle", runs, options.json)
    if not options.check:
        return 0
    found = report.figure(runs, loads[0], BROKER, _bytes)
    return 0 if found is not None and found.median <= PROMISED else 1


def _bytes(result: Opened) -> float:
    return result.rss_per_connection


def _parse() -> argparse.Namespace:
    parser = command.parser("idle", __doc__.split("\n")[0], PEERS, repeat=1)
    parser.add_argument("--connections", type=command.positive, default=10_000, help="(default %(default)s)")
    parser.add_argument("--base", type=command.positive, default=500, help="not counted (default %(default)s)")
    parser.add_argument("--check", action="store_true", help=f"exit 1 unless wsbroker takes {PROMISED} bytes at most")
    # Whatever else runs on the machine does not change the size of a connection.
    parser.set_defaults(retries=0)
    return parser.parse_args()


if __name__ == "__main__":
    command.run(main)
