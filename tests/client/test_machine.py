"""What the client decides, without a network: all orders of events that hypothesis finds, against the model broker."""

from __future__ import annotations

import json
import re
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.client.model import Broker, Peer
from wsbroker_client.actions import Changed, Close, FetchToken, Finished, Open, Send
from wsbroker_client.errors import ClientError, Closed, NotABroker, Refused, TimedOut, TokenFailed, Unreachable
from wsbroker_client.machine import Machine
from wsbroker_client.model import Event, Gap, Live
from wsbroker_client.reconnection import FIRST_DELAY, MAX_DELAY, is_permanent
from wsbroker_client.states import (
    TRANSITIONS,
    Request,
    RequestState,
    State,
    SubscriptionCore,
    SubscriptionState,
)
from wsbroker_client.wire import overlap

LOST = Closed("lost", close_code=1006, retry=True)
WELCOME = {"op": "welcome", "version": 1, "session": "s", "server": "f", "ping": 25, "max_size": 4096, "max_queue": 256}
DOCS = Path(__file__).parents[2] / "docs" / "clients-python.md"


def encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def connected(now: float = 0.0, **options: Any) -> Machine:
    machine = Machine(**options)
    machine.connect()
    machine.received([encoded(WELCOME)], now)
    machine.take_actions()
    return machine


# The table


def test_every_state_is_in_the_table_and_the_ends_have_no_way_out() -> None:
    assert set(TRANSITIONS) == {*State, *SubscriptionState, *RequestState}
    assert {state for state, next_ones in TRANSITIONS.items() if not next_ones} == {
        State.CLOSED, SubscriptionState.ENDED, RequestState.DONE
    }  # fmt: skip


def test_transition_that_is_not_in_the_table_fails() -> None:
    machine = Machine()
    with pytest.raises(AssertionError, match="IDLE"):
        machine._change(State.CONNECTED)


# When to come back


@pytest.mark.parametrize("losses", range(1, 12))
def test_wait_is_anything_up_to_a_bound_that_doubles(losses: int) -> None:
    bounds: list[float] = []

    def highest(low: float, high: float) -> float:
        assert low == 0.0
        bounds.append(high)
        return high

    machine = Machine(rng=highest)
    machine.connect()
    now = 0.0
    for _ in range(losses):
        machine.lost(Unreachable("nobody"), now)
        assert machine.deadline is not None
        now = machine.deadline
        machine.tick(now)
    assert bounds[-1] == min(MAX_DELAY, FIRST_DELAY * 2 ** (losses - 1))


@pytest.mark.parametrize(("lasted", "attempts"), [(4.9, 4), (5.0, 1)])
def test_connection_that_lasted_begins_the_waits_anew(lasted: float, attempts: int) -> None:
    machine = Machine()
    machine.connect()
    for _ in range(3):
        machine.lost(Unreachable("nobody"), 0.0)
        machine.connect()
    machine.received([encoded(WELCOME)], 0.0)
    machine.lost(LOST, lasted)
    assert machine._reconnection.attempts == attempts


@pytest.mark.parametrize(
    ("failure", "at_first", "later"),
    [
        (LOST, False, False),
        (Closed("", close_code=4499, retry=True), False, False),
        (Closed("", close_code=4500, retry=False), True, True),
        (Closed("", close_code=4999, retry=False), True, True),
        (Closed("", close_code=5000, retry=False), False, False),
        (Refused("", status=401), True, True),
        (Refused("", status=403), True, True),
        (Refused("", status=404), True, False),
        (Refused("", status=502), False, False),
        (Refused("", status=503), False, False),
        (NotABroker(""), True, False),
        (Unreachable(""), False, False),
        (TokenFailed(""), False, False),
    ],
)
def test_what_is_permanent(failure: ClientError, at_first: bool, later: bool) -> None:
    assert (is_permanent(failure, False), is_permanent(failure, True)) == (at_first, later)


def test_retry_after_of_a_refusal_is_waited_for() -> None:
    machine = Machine()
    machine.connect()
    machine.lost(Refused("full", status=503, retry_after=7), 0.0)
    assert machine.deadline is not None
    assert 7.0 <= machine.deadline <= 7.0 + 4 * FIRST_DELAY


def test_invalid_message_ends_the_connection_and_not_the_client() -> None:
    machine = connected()
    machine.received([b'{"op":"gap"}', encoded(WELCOME)], 1.0)
    actions = machine.take_actions()
    assert isinstance(actions[0], Close)
    assert isinstance(actions[0].failure, NotABroker)
    assert machine.state is State.WAITING


def test_token_is_fetched_in_time_and_again_after_a_failure() -> None:
    machine = Machine(token_function=True)
    machine.connect()
    machine.received([encoded(WELCOME | {"expires_in": 100})], 0.0)
    machine.take_actions()
    assert machine.deadline is not None
    assert 80.0 <= machine.deadline <= 90.0
    machine.tick(90.0)
    assert FetchToken() in machine.take_actions()
    machine.renew(TokenFailed("no"), 90.0)
    assert machine.deadline is not None
    assert machine.deadline <= 90.0 + FIRST_DELAY


def test_timers_of_answered_requests_do_not_pile_up() -> None:
    machine = connected()
    for number in range(1000):
        request = machine.publish("t", b"1", 0.0, timeout=10.0)
        machine.received([encoded({"op": "ok", "id": request.id})], 0.0)
        assert request.state is RequestState.DONE
        assert len(machine._requests._timers) < 100, number
    assert machine.deadline is None


# Everything at once


class Everything(RuleBasedStateMachine):
    """A machine, the model broker, and between them a network that delays, and cuts where it likes."""

    @initialize(window=st.integers(1, 5), keep=st.integers(1, 6))
    def begin(self, window: int, keep: int) -> None:
        self.now = 0.0
        self.broker = Broker()
        self.broker.keep = keep
        self.other = Peer(None, "other")  # type: ignore[arg-type]
        self.machine = Machine()
        self.peer: Peer | None = None
        self.opening = False
        self.commands: deque[bytes] = deque()
        self.messages: deque[bytes] = deque()
        self.window = window
        self.subscriptions: list[tuple[SubscriptionCore, list[Any]]] = []
        self.requests: list[Request] = []
        self.outcomes: dict[int, list[Any]] = {}
        self.reliable: list[tuple[Request, int]] = []
        self.numbers = 0
        self.published: dict[str, list[int]] = {"h.t": [], "t.a": []}
        self.machine.connect()
        self.act()

    def act(self) -> None:
        for action in self.machine.take_actions():
            if isinstance(action, Send):
                assert self.peer is not None
                self.commands.extend(action.payloads)
            elif isinstance(action, Open):
                assert self.peer is None
                self.opening = True
            elif isinstance(action, Finished):
                self.outcomes.setdefault(action.request.id, []).append(action.outcome)
            elif isinstance(action, Close) and action.failure is not None:
                raise AssertionError(f"nothing here breaks the protocol: {action}")
            elif isinstance(action, Changed):
                assert action.state in State

    # The network

    @precondition(lambda self: self.opening)
    @rule()
    def accept(self) -> None:
        self.opening = False
        self.peer = Peer(None, "me")  # type: ignore[arg-type]
        self.broker.peers.append(self.peer)
        self.messages.append(encoded(WELCOME))

    @precondition(lambda self: self.opening)
    @rule()
    def refuse(self) -> None:
        self.opening = False
        self.machine.lost(Unreachable("nobody"), self.now)
        self.act()

    @precondition(lambda self: self.peer is not None)
    @rule(carried_out=st.integers(0, 5))
    def cut(self, carried_out: int) -> None:
        """Some of what was sent still arrives; nothing comes back."""
        self.carry_out(carried_out)
        self.drop()
        self.machine.lost(LOST, self.now)
        self.act()

    def drop(self) -> None:
        assert self.peer is not None
        self.broker.peers.remove(self.peer)
        self.peer = None
        self.commands.clear()
        self.messages.clear()

    @precondition(lambda self: self.peer is not None)
    @rule(count=st.integers(1, 5))
    def carry_out(self, count: int) -> None:
        peer = self.peer
        assert peer is not None
        for _ in range(min(count, len(self.commands))):
            command = json.loads(self.commands.popleft())
            if command["op"] == "publish":
                self.note(command)
            answer = self.broker.carry_out(peer, command)
            if answer is not None and "id" in command:
                peer.out.appendleft({"id": command["id"], **answer})
            self.collect()

    def collect(self) -> None:
        if self.peer is not None:
            self.messages.extend(map(encoded, self.peer.out))
            self.peer.out.clear()

    @precondition(lambda self: self.messages)
    @rule(count=st.integers(1, 8))
    def receive(self, count: int) -> None:
        payloads = [self.messages.popleft() for _ in range(min(count, len(self.messages)))]
        self.machine.received(payloads, self.now)
        self.act()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 6.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.machine.tick(self.now)
        self.act()

    # The application

    @rule(topic=st.sampled_from(["h.t", "t.a", "t.*", ">"]), last=st.sampled_from([None, 1, 3, "all"]))
    def subscribe(self, topic: str, last: Any) -> None:
        if topic in self.machine.subscriptions:
            return
        start = {"last": last} if last is not None and topic == "h.t" else {}
        subscription = self.machine.subscribe(topic, {}, start, self.now, window=self.window)
        self.subscriptions.append((subscription, []))
        self.act()

    @precondition(lambda self: self.subscriptions)
    @rule(choose=st.randoms(use_true_random=False))
    def unsubscribe(self, choose: Any) -> None:
        self.machine.unsubscribe(choose.choice(self.subscriptions)[0], self.now)
        self.act()

    @precondition(lambda self: self.subscriptions)
    @rule(choose=st.randoms(use_true_random=False), count=st.integers(1, 6))
    def take(self, choose: Any, count: int) -> None:
        subscription, taken = choose.choice(self.subscriptions)
        for _ in range(count):
            message = self.machine.take(subscription)
            if message is not None:
                taken.append(message)
        self.act()

    @rule(topic=st.sampled_from(["h.t", "t.a"]))
    def publish_by_others(self, topic: str) -> None:
        self.numbers += 1
        command = {"op": "publish", "topic": topic, "data": self.numbers}
        self.note(command)
        self.broker.carry_out(self.other, command)
        self.collect()

    @rule(topic=st.sampled_from(["h.t", "t.a"]), reliable=st.booleans())
    def publish(self, topic: str, reliable: bool) -> None:
        self.numbers += 1
        dedup = f"d{self.numbers}" if reliable else None
        request = self.machine.publish(topic, b"%d" % self.numbers, self.now, timeout=30.0, dedup=dedup)
        self.requests.append(request)
        if reliable:
            self.reliable.append((request, self.numbers))
        self.act()

    def note(self, command: dict[str, Any]) -> None:
        topic = self.broker.topic(command["topic"])
        if command.get("dedup") not in topic.dedups or "dedup" not in command:
            self.published[command["topic"]].append(command["data"])

    # What must hold

    @invariant()
    def inboxes_are_bounded_by_the_credit(self) -> None:
        for subscription, _ in getattr(self, "subscriptions", []):
            assert subscription.held >= 0
            # What was on its way under a more specific subscription that has ended comes under this one's account.
            assert subscription.held + subscription.granted <= self.window * len(self.subscriptions)
            assert subscription.held + subscription.granted <= self.window * len(self.subscriptions)

    @invariant()
    def requests_finish_once(self) -> None:
        for request in getattr(self, "requests", []):
            assert len(self.outcomes.get(request.id, [])) == (request.state is RequestState.DONE)

    @invariant()
    def what_came_is_in_order_and_holes_are_announced(self) -> None:
        for subscription, taken in getattr(self, "subscriptions", []):
            check_stream(subscription.topic, taken, self.published)

    def teardown(self) -> None:
        """Let the network recover: everything that was kept comes, and every request has ended."""
        if not hasattr(self, "machine"):
            return
        for _ in range(200):
            if self.opening:
                self.accept()
            self.wait(1.0)
            if self.peer is not None:
                self.carry_out(100)
            if self.messages:
                self.receive(100)
            for subscription, taken in self.subscriptions:
                while (message := self.machine.take(subscription)) is not None:
                    taken.append(message)
            self.act()
        self.what_came_is_in_order_and_holes_are_announced()
        self.requests_finish_once()
        assert all(request.state is RequestState.DONE for request in self.requests)
        for subscription, taken in self.subscriptions:
            if subscription.state is SubscriptionState.ENDED:
                continue
            assert subscription.state is SubscriptionState.LIVE
            assert subscription.held == 0
            if subscription.topic == "h.t":
                topic = self.broker.topic("h.t")
                events = [each for each in taken if isinstance(each, Event)]
                assert not events or events[-1].offset == topic.top, (subscription.position, topic.top, taken[-6:])
        for request, number in self.reliable:
            times = self.published["h.t"].count(number) + self.published["t.a"].count(number)
            (outcome,) = self.outcomes[request.id]
            if isinstance(outcome, TimedOut) and not outcome.sent:
                assert times == 0
            elif isinstance(outcome, TimedOut):
                assert times <= 1
            else:
                assert times == 1
        self.machine.close()
        self.act()
        assert self.machine.state is State.CLOSED
        assert not self.machine.subscriptions


def check_stream(topic: str, taken: list[Any], published: dict[str, list[int]]) -> None:
    """Each event once, in the order of the topic; between two that are not neighbours stands a gap."""
    last: dict[str, int] = {}
    holes: set[str] = set()
    offset: int | None = None
    for message in taken:
        if isinstance(message, Gap):
            holes |= {each for each in published if overlap(each, message.topic)}
            if message.stop is not None and topic == "h.t":
                assert offset is None or message.start == offset + 1
                offset = message.stop
        elif isinstance(message, Event):
            place = published[message.topic].index(message.data)
            if message.topic in last:
                assert place > last[message.topic]
                assert message.topic in holes or place == last[message.topic] + 1
            if topic == "h.t":
                assert message.offset is not None
                assert offset is None or message.offset == offset + 1
                offset = message.offset
            last[message.topic] = place
            holes.discard(message.topic)
        else:
            assert isinstance(message, Live)


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_states_are_in_the_docs() -> None:
    text = DOCS.read_text()
    for state in (*State, *SubscriptionState):
        assert re.search(rf"^\| `{state.name}` \|", text, re.MULTILINE), state
