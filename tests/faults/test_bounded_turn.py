"""Whatever one client does, the others are served: a turn of the broker's loop is bounded, in bytes and in time.

Each attack is played against a broker in a process of its own, over real sockets, with bytes made beforehand. Meanwhile
a bystander (bystander.py) sends `ping` every few milliseconds; before the slowest answer the broker may work on other
things for 100 ms. This is the one place where a test asserts time: a standstill is what it is about. A busy machine
must not fail it, so what counts is the time for which the broker itself worked, and the best of five attempts. An
attack is cut off after a while: what it asks for may take longer in all, but not at once.
"""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.faults.traffic import (
    CONTINUATION,
    PING,
    TEXT,
    Clients,
    command,
    deflate,
    frame,
    play,
    publish,
)
from tests.fixtures_broker import RunningBroker, start_broker

LONGEST = 0.1
"""Seconds that the broker may work on other things before it answers a bystander."""
ATTEMPTS = 5
DURATION = 1.5
"""Seconds after which an attack is cut off."""
INTERVAL = 0.003
"""Seconds between a bystander's answer and its next ping."""
GIVEN_UP = 3.0
"""Seconds after which a bystander waits for an answer no longer. It has seen enough."""
CERTAIN = 0.5
"""Seconds that are not to be explained by anything but a fault: no further attempt is made."""
MEMORY = 128 * 2**20
"""Bytes by which the broker may grow at most, where an attack is one on memory."""

MIB = 2**20
COMPRESSION = {"WSBROKER_SERVER__COMPRESSION": "true"}

Attack = Callable[[Clients], Iterator[None]]
"""Prepares, yields, and then attacks. What comes before the `yield` is not measured."""


@dataclass
class Outcome:
    """What one attempt did to the bystander and to the broker."""

    slowest: float
    """The bystander's slowest answer, in seconds."""
    answers: int
    grown: int
    """By how many bytes the broker's peak of memory lies above what it had before the attack."""

    def __str__(self) -> str:
        return f"{1000 * self.slowest:.0f} ms, {self.grown / MIB:.0f} MiB"


class Bystander:
    """The process of a client that pings. `slowest` and `answers` are known at the end of the block."""

    def __init__(self, broker: RunningBroker) -> None:
        program = Path(__file__).parent / "bystander.py"
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                str(program),
                str(broker.port),
                str(broker.program.pid),
                str(INTERVAL),
                str(GIVEN_UP),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.slowest = 0.0
        self.answers = 0

    def __enter__(self) -> Self:
        assert self._line() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            slowest, answers = self._line().split()
            self.slowest, self.answers = float(slowest), int(answers)
        finally:
            self._process.kill()
            self._process.stdout.close()
            self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def memory(pid: int, field: str) -> int:
    """Bytes of memory of a process: VmRSS is what it has now, VmHWM the most that it has had (proc(5))."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


class Brokers:
    """The brokers of this file: one for each configuration, and another one once it had to be given up."""

    def __init__(self) -> None:
        self._stacks: dict[str, contextlib.ExitStack] = {}
        self._running: dict[str, RunningBroker] = {}

    def get(self, environ: dict[str, str]) -> RunningBroker:
        """A broker that has nothing to do."""
        name = repr(environ)
        if name not in self._running:
            self._stacks[name] = contextlib.ExitStack()
            self._running[name] = self._stacks[name].enter_context(start_broker(environ=environ))
        return self._running[name]

    def give_up(self, environ: dict[str, str]) -> None:
        """Kill a broker: it may have a lot of work left."""
        name = repr(environ)
        self._running.pop(name).program.kill()
        self._stacks.pop(name).close()

    def end(self) -> None:
        """End all of them, as a service manager would."""
        for stack in self._stacks.values():
            stack.close()


@pytest.fixture(scope="module")
def brokers() -> Iterator[Brokers]:
    started = Brokers()
    yield started
    started.end()


def attempt(attack: Attack, broker: RunningBroker) -> Outcome:
    """Play an attack once."""
    pid = broker.program.pid
    with Clients(broker.port) as clients:
        playing = attack(clients)
        next(playing)
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # sets VmHWM back (proc(5))
        before = memory(pid, "VmRSS")
        with Bystander(broker) as bystander:
            assert next(playing, "played") == "played"
        grown = memory(pid, "VmHWM") - before
    assert broker.program.running, broker.program.output
    return Outcome(bystander.slowest, bystander.answers, grown)


def check(brokers: Brokers, attack: Attack, most_memory: int | None = None, **environ: str) -> None:
    """Play an attack until the bystander is served in time, and fail if it is not served in time in any attempt."""
    outcomes = []
    for _ in range(ATTEMPTS):
        outcome = attempt(attack, brokers.get(environ))
        outcomes.append(outcome)
        if outcome.slowest < LONGEST and (most_memory is None or outcome.grown < most_memory):
            assert outcome.answers, "the bystander was not there"
            return
        brokers.give_up(environ)
        if outcome.slowest >= CERTAIN:
            break
    pytest.fail(
        f"before an answer to the bystander the broker worked for: {'; '.join(map(str, outcomes))}", pytrace=False
    )


# What the attacks are made of.

WORDS = "a.b.c.d.e.f.g.h.i.j"
"""A topic that 1,024 patterns match."""


def overlapping(count: int, topic: str = WORDS) -> list[str]:
    """So many patterns that all match the topic."""
    choices = product(*((token, "*") for token in topic.split(".")))
    return [".".join(tokens) for tokens in islice(choices, 1, count + 1)]


def repeat(data: bytes, size: int) -> bytes:
    """The same bytes again and again, at least `size` of them."""
    return data * -(-size // len(data))


# The attacks that are known to have stopped the loop.


def publish_with_many_subscriptions(clients: Clients) -> Iterator[None]:
    """A publisher with 1,000 subscriptions, one of them without echo, to a topic that 1,000 patterns match."""
    clients.subscribe(overlapping(1000))
    publisher = clients.subscribe([f"mine.{number}" for number in range(999)])
    publisher.send(command("subscribe", topic="quiet", echo=False), publish(WORDS))
    publisher.settle()
    yield
    play({publisher: repeat(publish(WORDS, 8), 213_000)}, DURATION)


def subscribe_beside_many_routes(topic: str) -> Attack:
    """One new pattern, beside 2,000 routes whose audiences are each a part of 512 filters."""

    def attack(clients: Clients) -> Iterator[None]:
        with_patterns(clients)
        attacker = clients.connect()
        yield
        play({attacker: command("subscribe", topic=topic)}, DURATION)

    return attack


def with_patterns(clients: Clients) -> None:
    """2,000 topics, each with a subscriber of its own and a route, and 512 patterns that match all of them."""
    patterns = overlapping(511, WORDS.removesuffix(".j"))
    topics = [f"{WORDS.removesuffix('.j')}.t{number}" for number in range(2000)]
    clients.subscribe([f"{pattern}.*" for pattern in patterns])
    clients.subscribe(topics[:1000])
    clients.subscribe(topics[1000:])
    publisher = clients.connect()
    assert play({publisher: b"".join(publish(topic, 1) for topic in topics)}, 30)


def ping_with_many_barriers(clients: Clients) -> Iterator[None]:
    """Subscriptions that each wait for 500 broader ones, and pings on their connection."""
    patterns = overlapping(500)
    attackers = [clients.subscribe(patterns, credit=0) for _ in range(3)]
    clients.connect(publish(WORDS))
    narrower = [pattern.replace("*", ">") if pattern.endswith("*") else pattern for pattern in overlapping(1000)[500:]]
    subscribe = b"".join(command("subscribe", topic=pattern) for pattern in narrower)
    yield
    play({attacker: subscribe + repeat(command("ping", id=1), 30_000) for attacker in attackers}, DURATION)


def subscribe_and_unsubscribe_in_a_loop(clients: Clients) -> Iterator[None]:
    """Patterns that come and go, beside 4,000 routes."""
    topics = [f"busy.t{number}" for number in range(4000)]
    clients.subscribe([f"busy.*.{number}" for number in range(100)])
    publisher = clients.connect(*(publish(topic, 1) for topic in topics))
    attackers = clients.crowd(3)
    again = command("subscribe", topic="other.*") + command("unsubscribe", topic="other.*")
    yield
    sends = {attacker: repeat(again, 200_000) for attacker in attackers}
    play(sends | {publisher: b"".join(publish(topic, 1) for topic in topics)}, DURATION)


def publish_to_many_without_credit(clients: Clients) -> Iterator[None]:
    """1,000 subscribers without credit, and one publisher that pipelines 4 MiB."""
    clients.crowd(1000, command("subscribe", topic="t", credit=0))
    publisher = clients.connect(publish("t"))
    yield
    play({publisher: repeat(publish("t"), 4 * MIB)}, DURATION)


def publish_compressed(subscribed: bool) -> Attack:
    """2.5 MB of well compressed publishes, of 1 MB each."""

    def attack(clients: Clients) -> Iterator[None]:
        topics = [f"big.t{number}" for number in range(300)]
        if subscribed:
            clients.subscribe(topics)
        publisher = clients.connect(*(publish(topic, 1) for topic in topics), compression=True)
        texts = (b'{"op":"publish","topic":"%s","data":"%s"}' % (topic.encode(), b"x" * 1_000_000) for topic in topics)
        data = b"".join(frame(deflate(text), compressed=True) for text in texts)
        yield
        play({publisher: repeat(data, 2_500_000)}, DURATION)

    return attack


ISSUE = {
    "a publisher with 1,000 subscriptions, one without echo": publish_with_many_subscriptions,
    "a new pattern that matches no route": subscribe_beside_many_routes("other.*"),
    "a new pattern that matches all routes": subscribe_beside_many_routes("a.b.>"),
    "pings behind 500 order barriers": ping_with_many_barriers,
    "patterns subscribed and unsubscribed in a loop": subscribe_and_unsubscribe_in_a_loop,
}


@pytest.mark.parametrize("attack", ISSUE.values(), ids=ISSUE)
def test_command_that_matches_many_subscriptions_does_not_stop_the_loop(brokers: Brokers, attack: Attack) -> None:
    check(brokers, attack)


def test_pipelined_publishes_to_1000_subscribers_without_credit_do_not_stop_the_loop(brokers: Brokers) -> None:
    check(brokers, publish_to_many_without_credit, most_memory=MEMORY)


@pytest.mark.parametrize("subscribed", [True, False], ids=["with a subscriber", "without subscribers"])
def test_compressed_publishes_do_not_stop_the_loop_or_fill_memory(brokers: Brokers, subscribed: bool) -> None:
    check(brokers, publish_compressed(subscribed), most_memory=MEMORY, **COMPRESSION)


# Others of their kind: reading.


def send(data: bytes, count: int = 1) -> Attack:
    """The same bytes from so many clients at once."""

    def attack(clients: Clients) -> Iterator[None]:
        attackers = clients.crowd(count)
        yield
        # It may be closed as one that does not read its answers, if the broker has more of them than it may keep.
        play(dict.fromkeys(attackers, data), DURATION, may_close=True)

    return attack


def in_fragments(payload: bytes, size: int) -> bytes:
    """One message in fragments of so many bytes."""
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    last = len(parts) - 1
    return b"".join(frame(part, CONTINUATION if place else TEXT, fin=place == last) for place, part in enumerate(parts))


def publish_text(data: bytes) -> bytes:
    return b'{"op":"publish","topic":"t","data":%s}' % data


DEEP = b"[" * 60 + b"]" * 60
TOO_DEEP = b"[" * 500_000 + b"]" * 500_000

READING = {
    "messages of 1 MB in 16 fragments": repeat(
        in_fragments(publish_text(b'"%s"' % (b"x" * 1_000_000)), 65_536), 8 * MIB
    ),
    "messages in 4,000 fragments of one byte": repeat(in_fragments(publish_text(b'"%s"' % (b"x" * 3900)), 1), 8 * MIB),
    "empty fragments": repeat(
        frame(publish_text(b"1"), fin=False) + frame(b"", CONTINUATION, fin=False) * 4000 + frame(b"", CONTINUATION),
        8 * MIB,
    ),
    "JSON nested as deeply as it may be": repeat(frame(publish_text(b"[" + b",".join([DEEP] * 8000) + b"]")), 8 * MIB),
    "JSON nested too deeply, between good commands": repeat(
        frame(publish_text(TOO_DEEP)) + command("ping", id=1), 8 * MIB
    ),
    "strings of 1 MB that are not ASCII": repeat(frame(publish_text(('"' + "é" * 500_000 + '"').encode())), 8 * MIB),
    "WebSocket pings": repeat(frame(b"", PING), 4 * MIB),
    "WebSocket pings with 125 bytes": repeat(frame(b"x" * 125, PING), 8 * MIB),
    "ping commands": repeat(command("ping", id=1), 2 * MIB),
    "errors": repeat(command("unsubscribe", id=1, topic="nothing"), 2 * MIB),
    "publishes to a topic without subscribers": repeat(publish("t"), 8 * MIB),
    "publishes to ever new topics": b"".join(publish(f"t{number}", 1) for number in range(30_000)),
}


@pytest.mark.parametrize("data", READING.values(), ids=READING)
def test_pipelined_input_does_not_stop_the_loop(brokers: Brokers, data: bytes) -> None:
    check(brokers, send(data))


SLOW_PATH = command("publish", topic="t", key="é", data=1)
"""Its key has an escape, so the fast path leaves it to the session."""


def test_commands_pipelined_by_many_clients_do_not_stop_the_loop(brokers: Brokers) -> None:
    check(brokers, send(repeat(SLOW_PATH, 50_000), count=60))


# Others of their kind: subscriptions, queues, policies.


def publish_by_slow_path_to_many(clients: Clients) -> Iterator[None]:
    """Keys with escapes, to 500 subscribers that do not read."""
    clients.crowd(500, command("subscribe", topic="t"), receive_buffer=4096)
    publisher = clients.connect()
    yield
    play({publisher: repeat(SLOW_PATH, MIB)}, DURATION)


def conflate_many_keys(clients: Clients) -> Iterator[None]:
    """300 subscribers without credit that want the newest event of each of 64 keys, in long queues."""
    clients.crowd(300, command("subscribe", topic="t", overflow="latest", max_queue=65_536, credit=0))
    events = b"".join(publish("t", 50, key=f"k{number}") for number in range(64))
    publisher = clients.connect(events)
    yield
    play({publisher: repeat(events, 4 * MIB)}, DURATION)


def change_policy_of_long_queue(clients: Clients) -> Iterator[None]:
    """A queue of thousands of keys whose policy changes again and again, on each of 10 connections."""
    attackers = clients.crowd(10, command("subscribe", topic="t", overflow="drop_oldest", max_queue=65_536, credit=0))
    publisher = clients.connect()
    assert play({publisher: b"".join(publish("t", 1, key=f"k{number}") for number in range(30_000))}, 30)
    latest = command("subscribe", topic="t", overflow="latest")
    drop_oldest = command("subscribe", topic="t", overflow="drop_oldest")
    yield
    play(dict.fromkeys(attackers, (latest + drop_oldest) * 20), DURATION)


def shrink_long_queues(clients: Clients) -> Iterator[None]:
    """Long queues on 10 connections that are all cut down to one event at once."""
    attackers = clients.crowd(10, command("subscribe", topic="t", max_queue=65_536, credit=0))
    publisher = clients.connect()
    assert play({publisher: repeat(publish("t", 1), 40 * 30_000)}, 30)
    yield
    play(dict.fromkeys(attackers, command("subscribe", topic="t", max_queue=1)), DURATION)


def pile_up_under_block(clients: Clients) -> Iterator[None]:
    """300 publishers wait for 20 subscribers under `block`, which then all go at once."""
    subscribers = clients.crowd(20, command("subscribe", topic="t", overflow="block", max_queue=1, credit=0))
    publishers = clients.crowd(300)
    for publisher in publishers:
        publisher.send(repeat(publish("t", 50), 3000))
    yield
    for subscriber in subscribers:
        subscriber.reset()
    play(dict.fromkeys(publishers, b""), DURATION)


def close_with_many_patterns(clients: Clients) -> Iterator[None]:
    """A connection with 511 patterns closes while the route cache is full of topics that they match."""
    attacker = clients.subscribe([f"{pattern}.*" for pattern in overlapping(511, WORDS.removesuffix(".j"))])
    topics = [f"{WORDS.removesuffix('.j')}.t{number}" for number in range(2000)]
    clients.subscribe(topics[:1000])
    clients.subscribe(topics[1000:])
    publisher = clients.connect()
    assert play({publisher: b"".join(publish(topic, 1) for topic in topics)}, 30)
    yield
    attacker.reset()
    play({publisher: b""}, DURATION)


def close_with_patterns_beside_other_routes(clients: Clients) -> Iterator[None]:
    """A connection with 1,000 patterns closes while the route cache is full of topics that none of them matches."""
    attacker = clients.subscribe([f"none.*.t{number}" for number in range(1000)])
    publisher = clients.connect()
    assert play({publisher: b"".join(publish(f"busy.t{number}", 1) for number in range(4000))}, 30)
    yield
    attacker.reset()
    play({publisher: b""}, DURATION)


def unsubscribe_from_many_patterns(clients: Clients) -> Iterator[None]:
    """10 connections give up 1,000 patterns each, in one go."""
    patterns = [f"none.*.t{number}" for number in range(1000)]
    attackers = [clients.subscribe(patterns) for _ in range(10)]
    publisher = clients.connect()
    assert play({publisher: b"".join(publish(f"busy.t{number}", 1) for number in range(4000))}, 30)
    unsubscribe = b"".join(command("unsubscribe", topic=pattern) for pattern in patterns)
    yield
    play(dict.fromkeys(attackers, unsubscribe), DURATION)


def flood_with_credit(clients: Clients) -> Iterator[None]:
    """Credit, event by event, for 1,000 subscriptions with something queued under each."""
    topics = [f"t{number}" for number in range(1000)]
    attacker = clients.subscribe(topics, credit=0)
    clients.connect(*(publish(topic) for topic in topics))
    pieces = b"".join(command("credit", topic=topic, add=1) for topic in topics)
    yield
    play({attacker: repeat(pieces, 2 * MIB)}, DURATION)


def publish_1_mib_to_stalled(clients: Clients) -> Iterator[None]:
    """Publishes of 1 MiB to 1,000 subscribers that do not read, and whose sockets are full."""
    clients.crowd(1000, command("subscribe", topic="t"), receive_buffer=4096)
    publisher = clients.connect()
    assert play({publisher: repeat(publish("t", 100_000), 3 * MIB)}, 30)
    yield
    play({publisher: repeat(publish("t", MIB - 100), 12 * MIB)}, DURATION)


def close_many_subscribers(clients: Clients) -> Iterator[None]:
    """1,000 subscribers of one topic and one pattern go at once, while it is published to."""
    crowd = clients.crowd(1000, command("subscribe", topic="t"), command("subscribe", topic="*"))
    publisher = clients.connect(publish("t"))
    yield
    for client in crowd:
        client.reset()
    play({publisher: repeat(publish("t"), 500_000)}, DURATION)


def publish_to_thousands_of_topics(clients: Clients) -> Iterator[None]:
    """100 subscribers of `>`, and 4,000 topics that are all published to in one turn."""
    readers = clients.crowd(100, command("subscribe", topic=">"))
    data = b"".join(publish(f"t{number}", 1) for number in range(4000))
    publisher = clients.connect()
    assert play({publisher: data}, 30, readers)
    yield
    play({publisher: repeat(data, MIB)}, DURATION, readers)


def publish_to_thousands_of_topics_without_reading(clients: Clients) -> Iterator[None]:
    """The same, and the subscribers do not read."""
    clients.crowd(100, command("subscribe", topic=">"), receive_buffer=4096)
    data = b"".join(publish(f"t{number}", 1) for number in range(4000))
    publisher = clients.connect()
    assert play({publisher: data}, 30)
    yield
    play({publisher: repeat(data, MIB)}, DURATION)


def overflow_under_close(clients: Clients) -> Iterator[None]:
    """1,000 subscribers without credit that are all closed for being slow, by one event."""
    clients.crowd(1000, command("subscribe", topic="t", overflow="close", max_queue=1, credit=0))
    publisher = clients.connect(publish("t"))
    yield
    play({publisher: repeat(publish("t"), 10_000)}, DURATION)


def patterns_that_almost_match(clients: Clients) -> Iterator[None]:
    """1,000 long patterns that match all of a topic but its end, and publishes to ever new topics of this kind."""
    chosen = random.Random(1)
    patterns = {".".join(chosen.choices("a*", k=60)) + ".end" for _ in range(1000)}
    clients.subscribe(sorted(patterns))
    attacker = clients.connect()
    topics = [".".join("a" * 60) + f".t{number}" for number in range(1000)]
    yield
    play({attacker: b"".join(publish(topic, 1) for topic in topics)}, DURATION)


SUBSCRIPTIONS = {
    "slow path publishes to subscribers that do not read": publish_by_slow_path_to_many,
    "latest of 64 keys for subscribers without credit": conflate_many_keys,
    "changes of the policy of long queues": change_policy_of_long_queue,
    "long queues that are cut": shrink_long_queues,
    "publishers let go by blocking subscribers that close": pile_up_under_block,
    "a close of a connection with patterns that all routes match": close_with_many_patterns,
    "a close of a connection with patterns that no route matches": close_with_patterns_beside_other_routes,
    "unsubscribes from many patterns": unsubscribe_from_many_patterns,
    "credit in small pieces": flood_with_credit,
    "publishes of 1 MiB to stalled subscribers": publish_1_mib_to_stalled,
    "a close of 1,000 subscribers at once": close_many_subscribers,
    "thousands of topics in one turn, for `>` subscribers": publish_to_thousands_of_topics,
    "thousands of topics in one turn, for stalled `>` subscribers": publish_to_thousands_of_topics_without_reading,
    "1,000 slow consumers closed by one event": overflow_under_close,
    "patterns that almost match": patterns_that_almost_match,
}


@pytest.mark.parametrize("attack", SUBSCRIPTIONS.values(), ids=SUBSCRIPTIONS)
def test_subscriptions_queues_and_policies_do_not_stop_the_loop(brokers: Brokers, attack: Attack) -> None:
    check(brokers, attack)
