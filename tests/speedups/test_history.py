"""The history of topics: the native logs beside a plain model; ages; what it takes up."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker import messages
from broker._speedups import Event, HistoryStore, TopicLog, append_event, frame

EVENT_COST, TOPIC_COST = 112, 640
"""What an event, and a topic, are counted as beside frames and names (history.pxi)."""


def store(max_bytes: int = 1 << 30, max_topics: int = 1000) -> HistoryStore:
    numbers = itertools.count()
    return HistoryStore(max_bytes=max_bytes, max_topics=max_topics, new_epoch=lambda: f"e{next(numbers)}")


def publish(log: TopicLog, data: Any, key: str | None = None) -> int:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    payload = messages.encode_event(log.topic, text, key, log.top + 1)
    return append_event(log, payload, None if key is None else key.encode(), len(text))


def read(events: list[Event]) -> list[tuple[int, str | None, Any]]:
    return [(event.offset, event.key, json.loads(event.data)) for event in events]


@dataclass
class Kept:
    offset: int
    key: str | None
    data: bytes
    size: int

    @property
    def bytes(self) -> int:
        return len(self.data) + len((self.key or "").encode())


@dataclass
class Topic:
    """A topic as the model has it."""

    name: str
    log: TopicLog
    retention: dict[str, Any]
    top: int = 0
    floor: int = 0
    kept: list[Kept] = field(default_factory=list)

    def publish(self, event: Kept) -> None:
        self.top = event.offset
        if self.retention["compact"] and event.key is not None:
            self.kept = [each for each in self.kept if each.key != event.key]
        self.kept.append(event)
        self.trim()

    def compact(self) -> None:
        newest = {event.key: event for event in self.kept if event.key is not None}
        self.kept = [event for event in self.kept if event.key is None or newest[event.key] is event]

    def trim(self) -> None:
        most = self.retention["bytes"]
        while len(self.kept) > self.retention["events"] or (
            most and sum(event.bytes for event in self.kept) > most and len(self.kept) > 1
        ):
            self.floor = self.kept.pop(0).offset

    @property
    def memory(self) -> int:
        return TOPIC_COST + len(self.name) + sum(event.size + EVENT_COST for event in self.kept)


TOPICS = ("a", "b.c", "d", "lönger.than.the.others")
RETENTIONS = st.fixed_dictionaries(
    {
        "events": st.sampled_from([1, 2, 3, 10, 1000]),
        "bytes": st.sampled_from([0, 0, 1, 10, 100]),
        "compact": st.booleans(),
    }
)
KEYS = st.sampled_from([None, "", "k", "other", 'ü"\\', "k2", "k3"])
DATA = st.sampled_from([b"null", b"1", b'"text"', b'{"offset":5}', b"[1, 2,  3]", b'"' + b"x" * 200 + b'"'])


@settings(max_examples=200, stateful_step_count=60)
class HistoryMachine(RuleBasedStateMachine):
    """Topics published to, read, changed and forgotten, within totals."""

    @initialize(max_bytes=st.sampled_from([3000, 6000, 1 << 30]), max_topics=st.integers(1, 4))
    def begin(self, max_bytes: int, max_topics: int) -> None:
        self.store = store(max_bytes, max_topics)
        self.max_bytes, self.max_topics = max_bytes, max_topics
        self.topics: dict[str, Topic] = {}
        self.order: list[str] = []
        """Those published to least recently first."""

    def forget(self, name: str) -> None:
        topic = self.topics.pop(name)
        self.order.remove(name)
        assert topic.log.dropped
        assert topic.log.count == 0
        with pytest.raises(ValueError, match="ended"):
            publish(topic.log, 1)

    def oldest(self) -> str:
        """The topic that is to be forgotten first: without events, or published to least recently."""
        return min(self.order, key=lambda name: (bool(self.topics[name].kept), self.order.index(name)))

    @rule(name=st.sampled_from(TOPICS), retention=RETENTIONS)
    def configure(self, name: str, retention: dict[str, Any]) -> None:
        forgotten = None
        if name not in self.topics and len(self.topics) >= self.max_topics:
            forgotten = self.oldest()
        log = self.store.log(name, **retention)
        if forgotten is not None:
            self.forget(forgotten)
        topic = self.topics.setdefault(name, Topic(name, log, retention))
        assert topic.log is log
        assert self.store.find(name) is log
        was_compact = topic.retention["compact"]
        topic.retention = retention
        if retention["compact"] and not was_compact:
            topic.compact()
        if name not in self.order:
            self.order.append(name)
        topic.trim()

    @rule(name=st.sampled_from(TOPICS), key=KEYS, data=DATA)
    def publish(self, name: str, key: str | None, data: bytes) -> None:
        topic = self.topics.get(name)
        if topic is None:
            return
        offset = publish(topic.log, data, key)
        assert offset == topic.top + 1
        size = len(frame(1, messages.encode_event(name, data, key, offset)))
        topic.publish(Kept(offset, key, data, size))
        self.order.remove(name)
        self.order.append(name)
        self.evict(topic)

    def evict(self, last: Topic) -> None:
        def total() -> int:
            return sum(topic.memory for topic in self.topics.values())

        for name in [name for name in self.order if self.topics[name].kept]:
            topic = self.topics[name]
            while total() > self.max_bytes and len(topic.kept) > (topic is last):
                dropped, topic.kept = (topic.kept[:1], topic.kept[1:]) if topic is last else (topic.kept, [])
                topic.floor = dropped[-1].offset
        while total() > self.max_bytes and any(not topic.kept for topic in self.topics.values()):
            self.forget(self.oldest())

    @rule(name=st.sampled_from(TOPICS), offset=st.integers(0, 40), limit=st.integers(1, 8))
    def read_after(self, name: str, offset: int, limit: int) -> None:
        topic = self.topics.get(name)
        if topic is None:
            assert self.store.find(name) is None
            return
        events, more = topic.log.after(offset, limit)
        behind = [event for event in topic.kept if event.offset > offset]
        assert read(events) == [(event.offset, event.key, json.loads(event.data)) for event in behind[:limit]]
        assert more == (len(behind) > limit)
        assert [event.data for event in events] == [event.data for event in behind[:limit]]
        assert {event.topic for event in events} <= {name}

    @rule(name=st.sampled_from(TOPICS), count=st.integers(0, 12))
    def read_latest(self, name: str, count: int) -> None:
        topic = self.topics.get(name)
        if topic is None:
            return
        newest = topic.kept[-count:] if count else []
        assert topic.log.before(count) == (newest[0].offset - 1 if newest else topic.top)
        assert [event.offset for event in topic.log.latest(count)] == [event.offset for event in newest]

    @rule(name=st.sampled_from(TOPICS))
    def drop(self, name: str) -> None:
        epoch = self.store.epoch
        self.store.drop(name)
        if name in self.topics:
            self.forget(name)
            assert self.store.epoch != epoch

    @rule()
    def sweep(self) -> None:
        assert self.store.sweep() == 0

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        assert len(self.store) == len(self.topics) <= self.max_topics
        assert self.store.memory == sum(topic.memory for topic in self.topics.values())
        assert self.store.events == sum(len(topic.kept) for topic in self.topics.values())
        for topic in self.topics.values():
            log = topic.log
            assert (log.top, log.floor, log.count) == (topic.top, topic.floor, len(topic.kept)), topic
            assert log.bytes == sum(event.bytes for event in topic.kept)
            assert log.oldest == (topic.kept[0].offset if topic.kept else topic.top + 1)
            assert not log.dropped


TestHistory = HistoryMachine.TestCase


def test_frames_are_kept_as_they_were_sent() -> None:
    kept = store()
    log = kept.log("a", events=10)
    payload = messages.encode_event("a", b'{ "x" : 1.50 }', "k", 1)
    append_event(log, payload, b"k", 14)
    [event], _ = log.after(0, 10)
    assert (event.data, event.key, event.offset, event.topic) == (b'{ "x" : 1.50 }', "k", 1, "a")
    assert log.after(0, 10)[0] == [event], "one object for all who read it"


def test_epoch_is_another_one_once_a_numbering_has_ended() -> None:
    kept = store()
    first = kept.log("a", events=1)
    assert first.epoch == kept.epoch == kept.log("b", events=1).epoch
    kept.drop("a")
    assert kept.log("a", events=1).epoch == kept.epoch != first.epoch
    assert kept.log("b", events=1).epoch == first.epoch, "its numbering goes on"


def wait_until_old(log: TopicLog, seconds: float) -> None:
    """Until its events are that old. The clock of the logs moves every few milliseconds."""
    time.sleep(seconds + 0.02)


def test_old_events_are_dropped() -> None:
    kept = store()
    log = kept.log("a", events=10, age=0.05)
    for n in range(3):
        publish(log, n)
    wait_until_old(log, 0.05)
    publish(log, 3)
    assert read(log.after(0, 10)[0]) == [(4, None, 3)]
    assert (log.floor, log.top) == (3, 4)
    wait_until_old(log, 0.05)
    assert kept.sweep() == 0
    assert (log.count, kept.events, log.top, log.oldest) == (0, 0, 4, 5)
    assert kept.memory == TOPIC_COST + 1


def test_tombstone_is_dropped_after_its_time_and_is_missed() -> None:
    kept = store()
    log = kept.log("a", events=10, compact=True, tombstone_age=0.05)
    publish(log, 1, "k")
    publish(log, None, "k")
    publish(log, None)
    publish(log, 2, "l")
    assert kept.sweep() == 0
    assert read(log.after(0, 10)[0]) == [(2, "k", None), (3, None, None), (4, "l", 2)]
    assert log.floor == 0, "what a newer one superseded is not missing"
    wait_until_old(log, 0.05)
    kept.sweep()
    assert read(log.after(0, 10)[0]) == [(3, None, None), (4, "l", 2)]
    assert log.floor == 2


def test_compacted_log_keeps_no_trace_of_superseded_events() -> None:
    kept = store()
    log = kept.log("a", events=1000, compact=True)
    publish(log, "quiet", "q")
    for n in range(20_000):
        publish(log, n, f"k{n % 10}")
    events, _ = log.after(0, 100)
    assert read(events) == [(1, "q", "quiet"), *((n + 2, f"k{n % 10}", n) for n in range(19_990, 20_000))]
    assert log.after(15_000, 2)[0] == events[1:3]


def test_topic_published_to_least_recently_loses_its_events_first() -> None:
    kept = store(max_bytes=11_000)
    logs = [kept.log(f"t{n}", events=100) for n in range(3)]
    for log in logs:
        publish(log, "x" * 1000)
    publish(logs[0], "x" * 1000)
    for _ in range(4):
        publish(logs[2], "x" * 1000)
    assert [log.count for log in logs] == [2, 0, 5]
    assert kept.events_evicted == 1
    assert (logs[1].floor, logs[1].top, logs[1].dropped) == (1, 1, False)


def test_lowered_totals_are_enforced() -> None:
    kept = store()
    logs = [kept.log(f"t{n}", events=100) for n in range(10)]
    for log in logs:
        publish(log, "x" * 1000)
    kept.max_topics, kept.max_bytes = 5, 4000
    kept.enforce()
    assert [log.dropped for log in logs] == [True] * 5 + [False] * 5
    assert kept.memory <= 4000
    assert kept.topics_evicted == 5
    assert logs[-1].count == 0 or kept.events <= 1
