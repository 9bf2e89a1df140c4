"""Fan-out: one publisher, one topic, N subscribers, W publishes under way.

A publish is done when every subscriber has got the event; the publisher sends the next one then. `--check` measures
only what the broker promises against `websockets`, and exits with 1 unless the promise is kept.
"""

import argparse
import sys
from collections.abc import Sequence

from bench import command, report
from bench.measure import Published, Publishing, Run, take_turns
from bench.peers import BROKER, FLOOR, FLOOR_MESSAGE, WEBSOCKETS, Peer

PEERS = (BROKER, WEBSOCKETS, FLOOR, FLOOR_MESSAGE)
# To 1,000 subscribers: window → times the deliveries per second of `websockets`, at least.
PROMISED = {1: 1.6, 16: 10.0}


def main() -> int:
    """Measures, prints, saves; the exit status."""
    options = _parse()
    peers = command.chosen(options.peer, PEERS)
    if options.check:
        return _check(peers, options)
    loads = [
        Publishing(subscribers, window, payload=options.payload, seconds=options.seconds)
        for subscribers in options.subscribers
        for window in options.windows
    ]
    runs = take_turns(loads, peers, options.repeat, options.retries)
    for subscribers in options.subscribers:
        print(f"\nFan-out to {subscribers:,}, {options.payload}-byte payload, {options.repeat} repetitions\n")
        print(_table(runs, [load for load in loads if load.subscribers == subscribers], peers))
    print("", *report.remarks(runs), sep="\n")
    report.save("fanout", runs, options.json)
    return 0


def _table(runs: Sequence[Run[Published]], loads: Sequence[Publishing], peers: Sequence[Peer]) -> str:
    rows = [
        [f"window {load.window:<3} {peer.title}", *report.publishing_row(runs, load, peer, (WEBSOCKETS, FLOOR))]
        for load in loads
        for peer in peers
    ]
    return report.table(["", *report.PUBLISHING_HEADINGS, "× websockets", "× floor"], rows)


def _check(peers: Sequence[Peer], options: argparse.Namespace) -> int:
    if BROKER not in peers or WEBSOCKETS not in peers:
        print("the check needs wsbroker and websockets", file=sys.stderr)
        return 1
    loads = [Publishing(1000, window, payload=options.payload, seconds=options.seconds) for window in PROMISED]
    runs = take_turns(loads, [BROKER, WEBSOCKETS], options.repeat, options.retries)
    print(_table(runs, loads, [BROKER, WEBSOCKETS]), *report.remarks(runs), sep="\n")
    if options.json:
        report.save("fanout", runs, options.json)
    kept = True
    for load, least in zip(loads, PROMISED.values(), strict=True):
        found = report.ratio(runs, load, BROKER, WEBSOCKETS, report.deliveries)
        enough = found is not None and found.median >= least
        kept = kept and enough
        print(f"window {load.window}: {found.median if found else 0:.2f} times websockets,", end=" ")
        print(f"{'as promised' if enough else 'and promised are'}: at least {least}")
    return 0 if kept else 1


def _parse() -> argparse.Namespace:
    parser = command.parser("fanout", __doc__.split("\n")[0], PEERS, repeat=3)
    parser.add_argument("--subscribers", type=command.positives, default=[1, 10, 100, 1000], metavar="N,…")
    parser.add_argument("--windows", type=command.positives, default=[1, 4, 16, 64], metavar="W,…")
    command.add_publishing(parser)
    parser.add_argument("--check", action="store_true", help="measure what is promised against websockets, and judge")
    return parser.parse_args()


if __name__ == "__main__":
    command.run(main)
