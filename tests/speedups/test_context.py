"""What all connections of a loop share: the bound on what is remembered of audiences, the cadence of the pings."""

from __future__ import annotations

from itertools import pairwise

import pytest

import broker._speedups
from broker._speedups import Audience, Connection, Filter, LoopContext, Subscription
from broker.messages import encode_event
from tests.speedups.turns import Loop, Pipe
from tests.speedups.wire import PONG, client_frame, closed_with, server_frames

FREE_SLOTS = 65536
"""Members that may be remembered beyond those that the number of subscriptions allows (`context.pxi`)."""


class TestMembers:
    """Of audiences that overlap widely, only so many lists of members are kept."""

    def test_memory_of_audiences_is_bounded_by_the_subscriptions(self) -> None:
        loop, context, pipes = _crowd(500)
        wide = Filter(">")
        subscriptions = [Subscription(pipe.connection, wide, max_queue=9) for pipe in pipes if pipe.connection]
        audiences = [Audience(context, (Filter(f"t.{number}"), wide)) for number in range(400)]
        for audience in audiences:
            assert audience.receivers == 500
            assert context.member_slots <= 2 * context.subscriptions + FREE_SLOTS
        assert context.member_slots > FREE_SLOTS // 2  # it remembers what it may
        for subscription in subscriptions:
            subscription.cancel()
        assert context.member_slots == 0
        del audiences
        _part(pipes, loop)

    def test_events_are_delivered_after_an_audience_was_evicted(self) -> None:
        loop, context, pipes = _crowd(300)
        wide = Filter(">")
        subscriptions = [Subscription(pipe.connection, wide, max_queue=9) for pipe in pipes if pipe.connection]
        audiences = [Audience(context, (wide, Filter(f"t.{number}"))) for number in range(300)]
        # In one turn, and each topic twice: what is forgotten in between is sent first, and found again.
        for round_ in range(2):
            for number, audience in enumerate(audiences):
                payload = encode_event(f"t.{number}", b"%d" % round_)
                assert audience.publish(f"t.{number}", payload) == (300, 0, 0)
        loop.turn()
        expected = sorted(encode_event(f"t.{number}", b"%d" % round_) for number in range(300) for round_ in range(2))
        for pipe in pipes:
            events = [payload for _, payload in server_frames(pipe.take())]
            assert sorted(events) == expected
            for number in range(300):
                first, second = encode_event(f"t.{number}", b"0"), encode_event(f"t.{number}", b"1")
                assert events.index(first) < events.index(second)
        for subscription in subscriptions:
            subscription.cancel()
        _part(pipes, loop)


class TestPings:
    """Pings come at their interval also where there is more time to answer than there is between two of them."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        clock = [1000.0]
        monkeypatch.setattr(broker._speedups, "monotonic", lambda: clock[0])
        return clock

    def test_short_ping_interval_is_kept(self, clock: list[float]) -> None:
        loop, context, (pipe,) = _crowd(1, ping_interval=1, ping_timeout=10)
        pinged = []
        for _ in range(300):
            _pass_by(clock, context, loop)
            if pipe.take():
                pinged.append(clock[0])
                assert pipe.connection is not None
                pipe.connection.data_received(client_frame(PONG))
        assert len(pinged) >= 25
        assert all(late - early < 1.3 for early, late in pairwise(pinged))
        _part([pipe], loop)

    def test_silent_connection_is_closed_at_the_timeout(self, clock: list[float]) -> None:
        loop, context, (pipe,) = _crowd(1, ping_interval=1, ping_timeout=10)
        while not pipe.take():
            _pass_by(clock, context, loop)
        asked = clock[0]
        connection = pipe.connection
        assert connection is not None
        while connection.state == 1:
            _pass_by(clock, context, loop)
        assert 10 <= clock[0] - asked < 11.5
        assert closed_with(server_frames(pipe.take())) == 4001
        _part([pipe], loop)

    @pytest.mark.parametrize(("interval", "timeout"), [(25, 10), (1, 10)])
    def test_reading_queued_data_counts_as_a_sign_of_life(
        self, clock: list[float], interval: float, timeout: float
    ) -> None:
        loop, context, (pipe,) = _crowd(1, ping_interval=interval, ping_timeout=timeout)
        connection = pipe.connection
        assert connection is not None
        # A slow reader: our ping stands behind much that it has to read first, and all the time it reads.
        for _ in range(100):
            connection.pause_writing()
            for _ in range(40):
                _pass_by(clock, context, loop)
            connection.resume_writing()
        assert connection.state_name == "open"
        _part([pipe], loop)


def _crowd(size: int, **limits: float) -> tuple[Loop, LoopContext, list[Pipe]]:
    loop = Loop()
    context = loop.context(**limits)  # type: ignore[arg-type]
    pipes = [Pipe() for _ in range(size)]
    for pipe in pipes:
        Connection(context, _Silent()).start(pipe)
    return loop, context, pipes


def _pass_by(clock: list[float], context: LoopContext, loop: Loop) -> None:
    """Let a tenth of a second pass."""
    clock[0] += 0.1
    context.sweep()
    loop.turn()


def _part(pipes: list[Pipe], loop: Loop) -> None:
    for pipe in pipes:
        pipe.lose()
    loop.turn()


class _Silent:
    def message(self, payload: bytes, text: bool) -> None: ...

    def on_close(self, code: int, reason: str) -> None: ...
