"""What is counted: one case for each part of the data path, and what one operation of it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.instructions.harness import Harness, document, frame, publish, text
from broker import messages
from broker._speedups import FrameReader, check_json, mask, valid_utf8
from broker.config import Limits, TopicRule

BATCH = 64
"""Publishes that come in one turn, where there are many."""
MANY = 1000
BINARY, CONTINUATION = 2, 0

Round = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`make` prepares everything and returns what is done in one round: `operations` times what `about` says.

    Of `rounds` and twice as many the difference is taken.
    """

    name: str
    about: str
    operations: int
    rounds: int
    make: Callable[[], Round]


def read_small() -> Round:
    return partial(FrameReader().feed, frame(text(128)) * BATCH)


def read_large() -> Round:
    return partial(FrameReader().feed, frame(text(16_384)))


def read_fragments() -> Round:
    part = text(1024)
    middle = frame(part, CONTINUATION, fin=False) * 6
    return partial(FrameReader().feed, frame(part, fin=False) + middle + frame(part, CONTINUATION))


def read_pieces() -> Round:
    """A frame that comes as it does from a network: in segments, of which none holds all of it."""
    whole = frame(text(16_384))
    pieces = [whole[at : at + 1448] for at in range(0, len(whole), 1448)]
    feed = FrameReader().feed

    def run() -> None:
        for piece in pieces:
            feed(piece)

    return run


def unmask(size: int) -> Round:
    return partial(mask, text(size), b"\x37\xfa\x21\x3d")


def utf8(size: int, alphabet: str) -> Round:
    return partial(valid_utf8, text(size, alphabet))


def scan_publish() -> Round:
    return partial(check_json, publish())


def scan_document() -> Round:
    return partial(check_json, document(16_384))


def decode_publish() -> Round:
    return partial(messages.decode, publish(), Limits().max_depth)


def encode_event() -> Round:
    return partial(messages.encode_event, "prices.eurusd", b'"' + text(126) + b'"')


def publish_batch(payloads: Sequence[bytes], subscribers: int = 1, fast: bool = True, history: int = 0) -> Round:
    """Messages of one publisher, read and sent in one turn; not `fast`: its session carries them out. `history`: how
    many of them are kept."""
    harness = Harness(*[TopicRule("prices.>", history=history)] if history else [])
    for _ in range(subscribers):
        harness.subscribe("prices.eurusd")
    publisher = harness.connect()
    harness.context.flush()
    turn = harness.turns(publisher, *payloads)
    for _ in range(1 + history // max(1, len(payloads))):
        turn()  # installs the route, and fills the history
    if not fast:
        publisher.routes = None
    return turn


def many_topics(**bridge: Any) -> Round:
    """One publisher, which with `bridge` also subscribes to them."""
    harness = Harness()
    topics = [f"prices.t{number:05}" for number in range(MANY)]
    for topic in topics:
        harness.subscribe(topic)
    publisher = harness.subscribe(**bridge) if bridge else harness.connect()
    harness.context.flush()
    turn = harness.turns(publisher, *(publish(topic) for topic in topics))
    turn()
    return turn


def match_patterns() -> Round:
    """A topic that nobody published to before, beside many patterns."""
    harness = Harness()
    for number in range(MANY):
        harness.subscribe(f"prices.*.t{number:05}")
    return partial(harness.node.hub.audience, "prices.forex.t00500")


def queue_lagging() -> Round:
    """Subscribers who do not read, their queues at the bound: each event drops an older one."""
    harness = Harness()
    for _ in range(100):
        harness.subscribe("prices.eurusd", max_queue=BATCH).pause_writing()
    publisher = harness.connect()
    harness.context.flush()
    turn = harness.turns(publisher, publish())
    for _ in range(BATCH + 1):
        turn()
    return turn


def catch_up_lagging() -> Round:
    """A subscriber whose socket is full while events come, and then takes them all."""
    harness = Harness()
    reader = harness.subscribe("prices.eurusd", max_queue=BATCH)
    publisher = harness.connect()
    harness.context.flush()
    turn = harness.turns(publisher, *[publish()] * BATCH)
    turn()
    flush = harness.context.flush

    def run() -> None:
        reader.pause_writing()
        turn()
        reader.resume_writing()
        flush()

    return run


def connect_and_disconnect() -> Round:
    """A client behind its handshake: welcome, a subscription, its end."""
    harness = Harness()
    command = frame(messages.encode_command(messages.Subscribe("prices.eurusd", id=1)))
    harness.subscribe("prices.eurusd")
    connect, flush = harness.connect, harness.context.flush

    def run() -> None:
        connection = connect()
        connection.feed(command)
        flush()
        connection.connection_lost(None)
        flush()

    return run


MIXED = "Grüße, Καλημέρα, 早上好, 🙂 and plain words between them. "

CASES = (
    Case("read-128", "read a masked text message of 128 bytes", BATCH, 4, read_small),
    Case("read-16k", "read a masked text message of 16 kB", 1, 20, read_large),
    Case("read-fragments", "read a text message of 8 kB in 8 fragments", 1, 50, read_fragments),
    Case("read-pieces", "read a text message of 16 kB in 12 segments", 1, 20, read_pieces),
    Case("unmask-128", "unmask 128 bytes", 1, 200, partial(unmask, 128)),
    Case("unmask-16k", "unmask 16 kB", 1, 20, partial(unmask, 16_384)),
    Case("utf8-ascii", "validate 16 kB of ASCII as UTF-8", 1, 20, partial(utf8, 16_384, "plain ASCII, ")),
    Case("utf8-mixed", "validate 1 kB in several scripts as UTF-8", 1, 50, partial(utf8, 1024, MIXED)),
    Case("json-publish", "check the JSON of a publish of 128 bytes", 1, 200, scan_publish),
    Case("json-16k", "check a JSON document of 16 kB", 1, 5, scan_document),
    Case("decode-publish", "decode a publish in the slow path", 1, 200, decode_publish),
    Case("encode-event", "encode an event in the slow path", 1, 200, encode_event),
    Case("fast", "publish 128 bytes, 64 in a turn", BATCH, 5, partial(publish_batch, [publish()] * BATCH)),
    Case(
        "fast-history",
        "publish 128 bytes, 64 in a turn, the last 1,000 kept",
        BATCH,
        5,
        partial(publish_batch, [publish()] * BATCH, history=1000),
    ),
    Case("slow", "the same by the session", BATCH, 2, partial(publish_batch, [publish()] * BATCH, fast=False)),
    Case("fast-turn", "publish 128 bytes, one in a turn", 1, 200, partial(publish_batch, [publish()])),
    Case(
        "fast-id",
        "publish 128 bytes, answered, 64 in a turn",
        BATCH,
        5,
        partial(publish_batch, [publish(id=7)] * BATCH),
    ),
    Case(
        "fast-key",
        "publish 128 bytes with a key, 64 in a turn",
        BATCH,
        5,
        partial(publish_batch, [publish(key="eurusd")] * BATCH),
    ),
    Case("fast-16k", "publish 16 kB, one in a turn", 1, 20, partial(publish_batch, [publish(size=16_384)])),
    Case("one-to-one", "publish to 1,000 topics in a turn, a subscriber each", MANY, 1, many_topics),
    Case("bridge", "the same, by one with `>` and without echo", MANY, 1, partial(many_topics, topic=">", echo=False)),
    Case(
        "fanout",
        "deliver to 1,000, one event in a turn",
        MANY,
        3,
        partial(publish_batch, [publish()], subscribers=MANY),
    ),
    Case(
        "fanout-64",
        "the same, 64 in a turn",
        MANY * BATCH,
        1,
        partial(publish_batch, [publish()] * BATCH, subscribers=MANY),
    ),
    Case("match", "find the audience of a topic among 1,000 patterns", 1, 100, match_patterns),
    Case("behind-queue", "queue for one who is behind, dropping the oldest", 100, 5, queue_lagging),
    Case("behind-catch-up", "publish to one who is behind, and send it later", BATCH, 5, catch_up_lagging),
    Case("come-and-go", "take a client over, subscribe it, lose it", 1, 50, connect_and_disconnect),
)
