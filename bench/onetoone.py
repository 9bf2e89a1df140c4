"""One to one: 1,000 topics with one subscriber each, and one topic with one subscriber, both with a deep window.

There is nothing to share between subscribers here: what is measured is the cost of a single event from a publisher to a
subscriber. The publisher goes through the topics in turn.
"""

import argparse

from bench import command, report
from bench.measure import Publishing, take_turns
from bench.peers import BROKER, FLOOR, FLOOR_MESSAGE, WEBSOCKETS

PEERS = (BROKER, WEBSOCKETS, FLOOR, FLOOR_MESSAGE)


def main() -> int:
    """Measures, prints, saves; the exit status."""
    options = _parse()
    peers = command.chosen(options.peer, PEERS)
    runs = []
    for topics in dict.fromkeys((options.topics, 1)):
        load = Publishing(topics, options.window, topics=topics, payload=options.payload, seconds=options.seconds)
        able = [peer for peer in peers if peer.topics or topics == 1]
        measured = take_turns([load], able, options.repeat, options.retries)
        rows = [[peer.title, *report.publishing_row(measured, load, peer, (WEBSOCKETS,))] for peer in able]
        print(f"\nOne to one, topics: {topics:,}, window {options.window}, {options.payload}-byte payload\n")
        print(report.table(["", *report.PUBLISHING_HEADINGS, "× websockets"], rows))
        runs += measured
    print("", *report.remarks(runs), sep="\n")
    report.save("onetoone", runs, options.json)
    return 0


def _parse() -> argparse.Namespace:
    parser = command.parser("onetoone", __doc__.split("\n")[0], PEERS, repeat=3)
    parser.add_argument("--topics", type=command.positive, default=1000, help="(default %(default)s)")
    parser.add_argument("--window", type=command.positive, default=256, help="under way (default %(default)s)")
    command.add_publishing(parser)
    return parser.parse_args()


if __name__ == "__main__":
    command.run(main)
