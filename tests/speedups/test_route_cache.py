"""The fast path of publishing does what the slow path does: the same commands give the same bytes to everybody.

Two nodes get the same messages from the same clients. On one the routes are known, so that the native code carries
out what it can; on the other every message goes to the session.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterator
from typing import Any, cast

import msgspec
import pytest
import structlog
from hypothesis import event, given
from hypothesis import strategies as st

from broker._speedups import Audience, Filter, RouteCache
from broker.config import Config, Limits
from broker.engines.memory import MemoryEngine
from broker.net.addresses import UNKNOWN
from broker.node import Node
from tests.speedups.documents import SOUP, SPACE, VALUES, mutated
from tests.speedups.turns import Loop, Pipe
from tests.speedups.wire import BINARY, TEXT, client_frame, examples, server_frames


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Sessions come and go by the thousand: what they log at each is not looked at here."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR), cache_logger_on_first_use=False
    )
    yield
    structlog.configure(**before)


# Near enough for the tests to reach them.
LIMITS = Limits(max_size=2000, max_queue=3, max_queue_limit=10, max_outbox=1024, max_answers=1024, max_subscriptions=5)


class Harness:
    """A node whose clients are pipes."""

    def __init__(self, clients: int, *, fast: bool) -> None:
        self.loop = Loop()
        self.node = Node(Config(limits=LIMITS), MemoryEngine(), self.loop.as_loop())
        self.node.context.command_time = 3600.0  # a machine with other things to do is not to change what comes when
        _finish(self.node.engine.start(self.node.deliver, self.node.lost))
        self.pipes = [Pipe() for _ in range(clients)]
        for pipe in self.pipes:
            self.node.connect(pipe, b"", b"", UNKNOWN)
            if not fast:
                assert pipe.connection is not None
                pipe.connection.routes = None
        self.loop.turn()
        for pipe in self.pipes:
            (welcome,) = server_frames(pipe.take())
            assert b'"welcome"' in welcome[1]

    def send(self, client: int, message: bytes, opcode: int = TEXT) -> None:
        connection = self.pipes[client].connection
        assert connection is not None
        connection.data_received(client_frame(opcode, message))

    def block(self, client: int, *, blocked: bool) -> None:
        """What a transport says when its socket takes no more, or takes it again."""
        connection = self.pipes[client].connection
        assert connection is not None
        if blocked and not connection.blocked:
            connection.pause_writing()
        elif not blocked and connection.blocked:
            connection.resume_writing()

    def turn(self) -> list[bytes]:
        """End the turn of the loop; what each client got in it."""
        self.loop.turn()
        return [pipe.take() for pipe in self.pipes]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.lose()


TOPICS = [
    *("a", "a.b", "é.한"),  # these are used most
    *(r"\u0061.b", r"a\/b", "$sys", "", "a..b", "a.*", "a b", "x" * 255, "x" * 256, "\x7f", "a\u2028"),
]
PATTERNS = ["a", "a.b", "é.한", "a.*", ">", "*", "*.>", "a/b"]
IDS = [
    *("0", "1", "00", "-1", "1.0", "1e3", "999999999999999", "1000000000000000", str(2**53 - 1), str(2**53), "9" * 30),
    *('""', '"a"', '"' + "i" * 64 + '"', '"' + "i" * 65 + '"', '"\\u0041"', '"é"', '"/<&>\x7f"', "null", "true", "[]"),
]
PLAIN = ["0", "-1.5e+3", "null", "[]", "{}", '""', r'"\n\ud83d\ude00é"', r'{"a":[1,{"b":"\""}],"a":2}', '[ 1 ,\n"x"]']
KEYS = ['"k"', '""', '"é"', '"\\n"', '"\\/"', '"\x7f"', '"' + "k" * 300 + '"', "null", "7", "{}"]


def _members(draw: st.DrawFn, fields: list[tuple[str, str]]) -> bytes:
    """Write an object with its fields in any order, and with some kind of white space wherever it may be."""
    fields = draw(st.permutations(fields))
    space = draw(SPACE)
    members = [f'{space}"{name}"{space}:{space}{value}{space}' for name, value in fields]
    return f"{space}{{{','.join(members)}}}{space}".encode()


def _rarely(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 20)) == 13  # somewhere in the middle: hypothesis likes both ends


@st.composite
def _publish(draw: st.DrawFn) -> bytes:
    """A publish that is mostly in order."""
    topic = draw(st.sampled_from(TOPICS if _rarely(draw) else TOPICS[:3]))
    data = draw(VALUES if _rarely(draw) else st.sampled_from(PLAIN))
    fields = [("op", '"publish"'), ("topic", f'"{topic}"'), ("data", data)]
    if draw(st.booleans()):
        fields.append(("id", draw(st.sampled_from(IDS if _rarely(draw) else IDS[:2] + IDS[11:14]))))
    if draw(st.booleans()):
        fields.append(("key", draw(st.sampled_from(KEYS if _rarely(draw) else KEYS[:3]))))
    if _rarely(draw):
        fields.append(draw(st.sampled_from([("more", "1"), ("da\\u0074a", "2"), ("", '""'), *fields])))
    if _rarely(draw):
        fields.remove(draw(st.sampled_from(fields)))
    if _rarely(draw):
        name, _ = fields.pop()
        fields.append((name, draw(VALUES)))
    return _members(draw, fields)


@st.composite
def _nested_publish(draw: st.DrawFn) -> bytes:
    """A publish about as deep as is allowed."""
    depth = draw(st.integers(60, 66))
    return b'{"op":"publish","topic":"a","id":1,"data":' + b"[" * depth + b"]" * depth + b"}"


@st.composite
def _subscribe(draw: st.DrawFn) -> bytes:
    fields = [("op", '"subscribe"'), ("topic", f'"{draw(st.sampled_from(PATTERNS))}"')]
    if draw(st.booleans()):
        fields.append(("max_queue", draw(st.sampled_from(["1", "2", "10", "11", "0"]))))
    if draw(st.booleans()):
        fields.append(("overflow", draw(st.sampled_from(['"drop_oldest"', '"drop_newest"', '"close"', '"latest"']))))
    if draw(st.booleans()):
        fields.append(("echo", draw(st.sampled_from(["false", "false", "true"]))))
    return _members(draw, fields)


OTHERS = st.one_of(
    st.just(b'{"op":"ping","id":5}'),
    st.sampled_from(PATTERNS).map(lambda topic: f'{{"op":"unsubscribe","id":6,"topic":"{topic}"}}'.encode()),
    SOUP,
    _nested_publish(),
)
PUBLISH = _publish()


@st.composite
def _messages(draw: st.DrawFn) -> bytes:
    kinds = (mutated(PUBLISH), _subscribe(), OTHERS)
    return draw(next((kind for kind in kinds if _rarely(draw)), PUBLISH))


CLIENTS = 3
CLIENT = st.integers(0, CLIENTS - 1)
SEND = st.tuples(CLIENT, _messages(), st.sampled_from([TEXT, TEXT, TEXT, BINARY]))
BLOCK = st.tuples(CLIENT, st.booleans())
STEPS = st.lists(st.one_of(*[SEND] * 8, BLOCK, st.none()), min_size=5, max_size=30)


@examples(300)
@given(st.lists(st.tuples(CLIENT, _subscribe()), min_size=1, max_size=4), STEPS)
def test_fast_path_and_slow_path_do_the_same(
    subscribes: list[tuple[int, bytes]], steps: list[tuple[int, bytes, int] | tuple[int, bool] | None]
) -> None:
    fast, slow = Harness(CLIENTS, fast=True), Harness(CLIENTS, fast=False)
    for harness in (fast, slow):
        for client, message in subscribes:
            harness.send(client, message)
        for topic in TOPICS[:3]:
            harness.send(0, f'{{"op":"publish","topic":"{topic}","data":0}}'.encode())
    _assert_same(fast, slow)
    for step in steps:
        if step is None:
            _assert_same(fast, slow)
            continue
        for harness in (fast, slow):
            if len(step) == 3:
                harness.send(*step)
            else:
                harness.block(step[0], blocked=step[1])
    _assert_same(fast, slow)
    for client in range(CLIENTS):
        for harness in (fast, slow):
            harness.block(client, blocked=False)
    _assert_same(fast, slow)
    assert slow.node.context.fast_publishes == 0
    event(f"fast publishes: {min(fast.node.context.fast_publishes, 10)}")
    for harness in (fast, slow):
        harness.end()


# What the fast path takes, and what it leaves


TAKEN = [
    b'{"op":"publish","topic":"a","data":1}',
    b'{"data":{"x":"\\n\\ud83d\\ude00"},"key":"\xc3\xa9","id":"a/b","topic":"a","op":"publish"}',
    b' \r\n{ "op" : "publish" ,\t"topic":"a","id": 0 , "data" : [ 1, 2 ] } ',
    b'{"op":"publish","topic":"a","data":1,"id":999999999999999}',
    b'{"op":"publish","topic":"\xc3\xa9.\xed\x95\x9c","data":"","key":""}',
    b'{"op":"publish","topic":"a","data":1,"id":"' + b"i" * 64 + b'"}',
    b'{"op":"publish","topic":"a","data":' + b"[" * 63 + b"]" * 63 + b"}",
]

LEFT = [
    b'{"op":"publish","topic":"b","data":1}',  # not known yet
    b'{"op":"publish","topic":"\\u0061","data":1}',
    b'{"\\u006fp":"publish","topic":"a","data":1}',
    b'{"op":"publish","topic":"a","data":1,"key":"\\n"}',
    b'{"op":"publish","topic":"a","data":1,"id":"\\u0041"}',
    b'{"op":"publish","topic":"a","data":1,"id":1000000000000000}',
    b'{"op":"publish","topic":"a","data":1,"id":"\xc3\xa9"}',
    b'{"op":"publish","topic":"a","data":1,"id":"' + b"i" * 65 + b'"}',
    b'{"op":"publish","topic":"a","data":' + b"[" * 64 + b"]" * 64 + b"}",
    b'{"op":"publish","topic":"a","data":1,"more":"x"}',
    b'{"op":"publish","op":"publish","topic":"a","data":1}',
    b'{"op":"publish","topic":"a","topic":"a","data":1}',
    b'{"op":"publish","topic":"a","data":1,"data":2}',
    b'{"op":"publish","topic":"a","data":1,"key":"x","key":"y"}',
    b'{"op":"publish","topic":"a","data":1,"id":1,"id":2}',
    b'{"op":"ping"}',
    b'{"op":"ping","topic":"a","data":1}',
]  # fmt: skip


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("message", TAKEN)
def test_a_plain_publish_takes_the_fast_path(message: bytes, opcode: int) -> None:
    harness = _warm_harness()
    before = harness.node.context.fast_publishes
    harness.send(0, message, opcode)
    assert harness.node.context.fast_publishes == before + 1
    harness.end()


@pytest.mark.parametrize("message", LEFT)
def test_publish_that_is_not_plain_takes_the_slow_path(message: bytes) -> None:
    harness = _warm_harness()
    before = harness.node.context.fast_publishes
    harness.send(0, message)
    assert harness.node.context.fast_publishes == before
    harness.end()


@pytest.mark.parametrize("message", TAKEN)
def test_bytes_after_a_message_are_not_read(message: bytes) -> None:
    # The key of zeros leaves the bytes as they are, so that the message goes on behind its frame.
    harness = _warm_harness()
    before = harness.node.context.fast_publishes
    for size in range(len(message.rstrip())):
        pipe = Pipe()
        harness.node.connect(pipe, b"", b"", UNKNOWN)
        assert pipe.connection is not None
        pipe.connection.data_received(client_frame(BINARY, message[:size], key=bytes(4)) + message[size:])
        pipe.lose()
    assert harness.node.context.fast_publishes == before
    harness.end()


def test_data_is_delivered_byte_for_byte() -> None:
    data = b'{ "a" :\t[1.50, -0e0,"\\u00e9\\/ \xc3\xa9"],\r\n"a":{} }'
    event = (TEXT, b'{"op":"event","topic":"a","data":' + data + b"}")
    harness = _warm_harness()
    harness.send(1, b'{"op":"subscribe","topic":"a"}')
    for _ in range(2):  # by the slow path, which installs the route, and by the fast one
        harness.send(0, b'{"op":"publish","topic":"a","data":' + data + b"}")
    assert harness.node.context.fast_publishes == 1
    assert server_frames(harness.turn()[1]) == [event, event]
    harness.end()


def test_invalid_utf8_is_not_delivered() -> None:
    for harness in (Harness(2, fast=True), Harness(2, fast=False)):
        harness.send(1, b'{"op":"subscribe","topic":"a"}')
        harness.send(0, b'{"op":"publish","topic":"a","data":"warm"}')
        harness.turn()
        harness.send(0, b'{"op":"publish","topic":"a","data":"\xff"}', BINARY)
        harness.send(0, b'{"op":"publish","topic":"a","data":"ok"}', TEXT)
        harness.send(0, b'{"op":"publish","topic":"a","data":"\xc3("}', TEXT)
        harness.send(0, b'{"op":"publish","topic":"a","data":"behind"}', TEXT)
        publisher, subscriber = (server_frames(got) for got in harness.turn())
        assert msgspec.json.decode(publisher[0][1])["code"] == "bad_json"
        assert publisher[1][1].startswith((1007).to_bytes(2))
        assert subscriber == [(TEXT, b'{"op":"event","topic":"a","data":"ok"}')]
        harness.end()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 15, 16, 17, 31, 33, 48])
def test_non_ascii_byte_is_detected_at_every_offset(size: int) -> None:
    # Nobody looks at all bytes again to see whether they are UTF-8, unless one of them is beyond ASCII.
    for place in range(size + 1):
        head, tail = b"x" * place, b"x" * (size - place)
        for message in (b'{"op":"publish","topic":"a","data":"%s"}', b' { "op": "publish", "topic":"a", "data":"%s" }'):
            harness = _warm_harness()
            harness.send(1, b'{"op":"subscribe","topic":"a"}')
            harness.send(0, b'{"op":"publish","topic":"a","data":0}')
            harness.turn()
            before = harness.node.context.fast_publishes
            good = head + "é".encode() + tail
            harness.send(0, message % good)
            harness.send(0, message % (head + b"\xff" + tail))
            harness.send(0, message % b"behind")
            publisher, subscriber = (server_frames(got) for got in harness.turn())
            assert harness.node.context.fast_publishes == before + 1
            assert subscriber == [(TEXT, b'{"op":"event","topic":"a","data":"%s"}' % good)]
            assert publisher[0][1].startswith((1007).to_bytes(2))
            harness.end()


def test_valid_publish_resets_the_count_of_bad_commands() -> None:
    for harness in (_warm_harness(), Harness(1, fast=False)):
        for _ in range(3):
            for _ in range(9):
                harness.send(0, b"x")
            harness.send(0, b'{"op":"publish","topic":"a","data":1}')
        connection = harness.pipes[0].connection
        assert connection is not None
        assert (connection.mistakes, connection.state) == (0, 1)
        harness.end()


# Routes are withdrawn in time


@pytest.mark.parametrize("pattern", ["a", "*", ">"])
def test_new_subscriber_gets_the_next_event(pattern: str) -> None:
    harness = _warm_harness()
    harness.send(0, b'{"op":"publish","topic":"a","data":1}')
    harness.send(1, f'{{"op":"subscribe","topic":"{pattern}"}}'.encode())
    harness.send(0, b'{"op":"publish","topic":"a","data":2}')
    harness.send(1, f'{{"op":"unsubscribe","topic":"{pattern}"}}'.encode())
    harness.send(0, b'{"op":"publish","topic":"a","data":3}')
    assert server_frames(harness.turn()[1]) == [(TEXT, b'{"op":"event","topic":"a","data":2}')]
    harness.end()


def test_closed_subscriber_does_not_count_as_receiver() -> None:
    harness = _warm_harness()
    harness.send(1, b'{"op":"subscribe","topic":"a"}')
    harness.send(0, b'{"op":"publish","id":1,"topic":"a","data":1}')
    harness.send(0, b'{"op":"publish","id":2,"topic":"a","data":1}')
    harness.pipes[1].lose()
    harness.send(0, b'{"op":"publish","id":3,"topic":"a","data":1}')
    harness.send(0, b'{"op":"publish","id":4,"topic":"a","data":1}')
    answers = [msgspec.json.decode(payload) for _, payload in server_frames(harness.turn()[0])]
    assert [(answer["id"], answer["receivers"]) for answer in answers] == [(1, 1), (2, 1), (3, 0), (4, 0)]
    harness.end()


def test_cache_keeps_recent_topics_and_at_most_two_generations() -> None:
    loop = Loop()
    audience = Audience(loop.context(), (Filter("a"),))
    routes = RouteCache(limit=4)
    for number in range(100):
        routes.install(f"t{number}", audience, b"")
        assert len(routes) <= 8
        assert "t0" in routes  # to look is to use
        assert all(f"t{recent}" in routes for recent in range(max(0, number - 1), number + 1))
    routes.withdraw("t99")
    routes.withdraw("never there")
    assert "t99" not in routes
    assert "t0" in routes
    routes.clear()
    assert len(routes) == 0
    assert "t0" not in routes


def test_installing_a_topic_twice_keeps_one_route() -> None:
    audience = Audience(Loop().context(), (Filter("a"),))
    routes = RouteCache(limit=2)
    for name in ("a", "b", "c", "a", "b", "c"):
        routes.install(name, audience, b"")
    for name in ("a", "b", "c"):
        routes.withdraw(name)
        assert name not in routes
    assert len(routes) == 0


def test_lookup_finds_more_topics_than_the_recent_table_holds() -> None:
    """Whatever place they share in the table of recent ones, each event goes out under its own topic."""
    harness = Harness(2, fast=True)
    harness.send(1, b'{"op":"subscribe","topic":">"}')
    topics = [f"{'x' * (number % 11)}.{number}".removeprefix(".") for number in range(700)]
    for number in range(3):
        for topic in topics:
            harness.send(0, f'{{"op":"publish","topic":"{topic}","data":{number}}}'.encode())
    events = [msgspec.json.decode(payload) for _, payload in server_frames(harness.turn()[1])][-2100:]
    assert [(event["topic"], event["data"]) for event in events] == [
        (topic, number) for number in range(3) for topic in topics
    ]
    assert harness.node.context.fast_publishes == 2 * len(topics)
    harness.end()


def test_recently_used_topic_can_be_withdrawn() -> None:
    harness = _warm_harness()
    for expected in (1, 2):
        harness.send(0, b'{"op":"publish","topic":"a","data":1}')
        assert harness.node.context.fast_publishes == expected
    harness.node.hub.routes.withdraw("a")
    harness.send(0, b'{"op":"publish","topic":"a","data":1}')
    assert harness.node.context.fast_publishes == 2, "this one went to the session, which installs the route again"
    harness.send(0, b'{"op":"publish","topic":"a","data":1}')
    assert harness.node.context.fast_publishes == 3
    harness.node.hub.routes.clear()
    harness.send(0, b'{"op":"publish","topic":"a","data":1}')
    assert harness.node.context.fast_publishes == 3
    harness.end()


# Details


def _warm_harness() -> Harness:
    """Two clients, and routes to two topics."""
    harness = Harness(2, fast=True)
    for topic in ("a", "é.한"):
        harness.send(0, f'{{"op":"publish","topic":"{topic}","data":0}}'.encode())
    assert len(harness.node.hub.routes) == 2
    return harness


def _assert_same(fast: Harness, slow: Harness) -> None:
    """End the turn on both nodes: every client got the same, and stands the same."""
    theirs, ours = slow.turn(), fast.turn()
    assert ours == theirs
    assert not any(b'"internal"' in got for got in ours)
    for one, other in zip(fast.pipes, slow.pipes, strict=True):
        assert (one.is_closing(), one.ended) == (other.is_closing(), other.ended)
        assert one.connection is not None
        assert other.connection is not None
        assert one.connection.mistakes == other.connection.mistakes
        assert one.connection.state == other.connection.state
        assert one.connection.queued_bytes == other.connection.queued_bytes


def _finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what does not really wait."""
    with pytest.raises(StopIteration):
        cast(Any, coroutine).send(None)
