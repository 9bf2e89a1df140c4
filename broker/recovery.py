"""Subscribers that are fed from history: those that come back, and those that lag behind under the policy `replay`.

A subscription that recovers is attached first, and leaves every event to history (broker._speedups, `hold`). Once its
`ok` is on its way, history is read a page at a time, and fed into its queue when that is empty: so it waits for the
client, under its bound and credit, and never holds more than a page. When nothing lacks any more, the client is told
(`live`), and the subscription is live.

`gap` and `live` go ahead of queued events. They are sent only while nothing is queued, so they stand at their place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from broker import messages
from broker._speedups import Event as KeptEvent
from broker._speedups import LoopContext, Subscription
from broker.engines.base import Engine, Event, HistoryPage, NoHistory, Position, Unavailable
from broker.errors import CommandError
from broker.rules import Rules
from broker.session import Done, Subscribed
from broker.topics import is_pattern

PAGE: Final = 256
"""Events that are read at once for one subscription, at the most."""
RETRY: Final = 1.0
"""Seconds after which history is read again that was not available."""

NOTHING_TO_SAY: Final = Subscribed()


class Replay(msgspec.Struct, eq=False):
    """What is known of a subscription that is fed from history, or may be."""

    topic: str
    epoch: str
    top: int
    """The newest offset that history was known to have when it was read last."""
    announced: int
    """Up to this offset whatever is missing has been announced."""


class Recovery:
    """The subscriptions of one node that are, or may be, fed from history."""

    def __init__(self, engine: Engine, context: LoopContext, rules: Callable[[], Rules]) -> None:
        self._engine = engine
        self._rules = rules
        self._replays: dict[Subscription, Replay] = {}
        self._loop = asyncio.get_running_loop
        context.catch_up = self.catch_up

    def __len__(self) -> int:
        return len(self._replays)

    def check(self, command: messages.Subscribe) -> None:
        """Raise CommandError if a subscription cannot have what it asks for by `since` or `last`. If it can, the caller
        has it leave events to history (`hold`) before the engine is asked for them."""
        name = "last" if command.since is None else "since"
        if command.since is not None and command.last is not None:
            raise messages.BadCommand("bad_command", "`since` and `last` exclude each other")
        if is_pattern(command.topic):
            raise messages.BadCommand("bad_command", f"`{name}` needs a topic, and `{command.topic}` is a pattern")
        if not self._rules().retention(command.topic).events:
            raise _no_history(command.topic)

    def begin(self, subscription: Subscription, command: messages.Subscribe, done: Done[Subscribed]) -> None:
        """The engine delivers the events of a subscription: find where it is, answer by `done`, and have it fed."""
        topic = command.topic
        if is_pattern(topic) or not self._rules().retention(topic).events:
            done(NOTHING_TO_SAY)
        elif command.since is not None:
            since = Position(command.since.epoch, command.since.offset)
            self._engine.history(topic, since, 1, partial(self._found, subscription, since, done))
        elif command.last is not None:
            count = messages.MAX_INTEGER if command.last == "all" else command.last
            self._engine.locate(topic, count, partial(self._located, subscription, done))
        else:
            self._engine.position(topic, partial(self._positioned, subscription, done))

    def forget(self, subscription: Subscription) -> None:
        """A subscription has ended."""
        self._replays.pop(subscription, None)

    # Where a subscription begins.

    def _positioned(self, subscription: Subscription, done: Done[Subscribed], result: Position | Unavailable) -> None:
        if isinstance(result, Unavailable):
            done(CommandError("unavailable", result.message))
            return
        if (
            subscription.connection is not None
            and subscription.overflow == "replay"
            and subscription not in self._replays
        ):
            self._note(subscription, result)
        done(Subscribed(result.epoch, result.offset))

    def _located(
        self, subscription: Subscription, done: Done[Subscribed], result: tuple[Position, Position] | Unavailable
    ) -> None:
        if isinstance(result, Unavailable):
            done(CommandError("unavailable", result.message))
            return
        begin, top = result
        done(Subscribed(top.epoch, top.offset))
        self._replay(subscription, top, begin.offset or 0)

    def _found(
        self,
        subscription: Subscription,
        since: Position,
        done: Done[Subscribed],
        result: HistoryPage | NoHistory | Unavailable,
    ) -> None:
        match result:
            case Unavailable(message):
                done(CommandError("unavailable", message))
                return
            case NoHistory(topic):
                self._engine.position(topic, partial(self._found_nothing, subscription, since, done))
                return
            case page:
                top = Position(page.epoch, page.top)
        done(Subscribed(page.epoch, page.top, page.complete))
        offset, announced = since.offset or 0, 0
        if not page.complete:
            offset, announced = self._announce(subscription, since, page), page.top
            if self._rules().retention(subscription.filter.topic).compact:
                offset = page.first - 1  # all that is kept comes again, so that a table of it is right
        self._replay(subscription, top, offset, announced)

    def _found_nothing(
        self, subscription: Subscription, since: Position, done: Done[Subscribed], result: Position | Unavailable
    ) -> None:
        """Nothing was kept of a topic yet: the client is at its beginning, or was there in another numbering."""
        if isinstance(result, Unavailable):
            done(CommandError("unavailable", result.message))
            return
        recovered = (since.epoch, since.offset) == (result.epoch, 0)
        done(Subscribed(result.epoch, result.offset, recovered))
        if not recovered:
            self._send(subscription, messages.encode_gap(subscription.filter.topic, None, "epoch"))
        self._replay(subscription, result, result.offset or 0)

    def _note(self, subscription: Subscription, top: Position) -> Replay:
        replay = Replay(subscription.filter.topic, top.epoch or "", top.offset or 0, 0)
        self._replays[subscription] = replay
        return replay

    def _replay(self, subscription: Subscription, top: Position, offset: int, announced: int = 0) -> None:
        """Feed a subscription from behind this offset."""
        if subscription.connection is None or not subscription.replaying:
            return
        replay = self._note(subscription, top)
        replay.announced = announced
        # Of an engine on this node every event up to the top was offered by now.
        subscription.replay(offset, replay.top if self._is_local(replay.topic) else 0)

    # Feeding.

    def catch_up(self, subscription: Subscription) -> None:
        """Nothing is queued for a subscription that is replaying, and there is room (LoopContext)."""
        replay = self._replays.get(subscription)
        if replay is None:
            replay = self._note(subscription, Position())
        if max(subscription.newest, replay.top) > subscription.cursor:
            self._read(subscription, replay)
        else:
            self._complete(subscription, replay)

    def _read(self, subscription: Subscription, replay: Replay) -> None:
        if self._is_over(subscription, replay):
            return
        since = Position(replay.epoch or None, subscription.cursor)
        limit = min(PAGE, subscription.room)
        self._engine.history(replay.topic, since, limit, partial(self._feed, subscription, replay, since))

    def _feed(
        self,
        subscription: Subscription,
        replay: Replay,
        since: Position,
        result: HistoryPage | NoHistory | Unavailable,
    ) -> None:
        if self._is_over(subscription, replay):
            return
        match result:
            case Unavailable():
                self._loop().call_later(RETRY, self._read, subscription, replay)
                return
            case NoHistory():  # the topic keeps none any more
                self._send(subscription, messages.encode_gap(replay.topic, None, "expired"))
                self._end(subscription)
                return
            case page:
                pass
        if not replay.epoch:  # it has lagged behind before anybody asked where it was
            replay.epoch = page.epoch
            since = Position(page.epoch, since.offset)
        if not page.complete and (page.epoch != replay.epoch or subscription.cursor >= replay.announced):
            offset = self._announce(subscription, since, page)
            replay.announced = page.top
            if page.epoch != replay.epoch:
                replay.epoch = page.epoch
                subscription.replay(offset)
            elif self._rules().retention(replay.topic).compact:
                replay.top = page.top
                subscription.replay(page.first - 1)  # all that is kept comes again, so that a table of it is right
                return
            else:
                subscription.advance(offset)
        replay.top = page.top
        events = [to_kept(event) for event in page.events]
        if subscription.feed(events) == len(events) and not page.more:
            subscription.advance(page.top)  # what lacks up to there was superseded

    def _is_over(self, subscription: Subscription, replay: Replay) -> bool:
        """Whether a replay has ended, or made room for another one, while its page was read."""
        if subscription.connection is None or self._replays.get(subscription) is not replay:
            return True
        if not subscription.replaying:  # its policy is no longer `replay`
            self._replays.pop(subscription)
            return True
        return False

    def _complete(self, subscription: Subscription, replay: Replay) -> None:
        """A subscription lacks nothing."""
        if subscription.recovering:
            self._send(subscription, messages.encode_live(replay.topic, subscription.cursor))
        # An event that was fed may be delivered only now: until it has come, events are left to history.
        if self._is_local(replay.topic) or subscription.newest == subscription.cursor:
            self._end(subscription)
        else:
            subscription.end_recovery()

    def _is_local(self, topic: str) -> bool:
        return self._engine.is_local(topic, self._rules().retention(topic))

    def _end(self, subscription: Subscription) -> None:
        subscription.end_replay()
        if subscription.overflow != "replay":
            self._replays.pop(subscription, None)

    def _announce(self, subscription: Subscription, since: Position, page: HistoryPage) -> int:
        """Announce that events after `since` are no longer kept. Returns the offset after which the feed continues."""
        topic = subscription.filter.topic
        offset = since.offset or 0
        if page.epoch != since.epoch or offset > page.top:
            self._send(subscription, messages.encode_gap(topic, None, "epoch"))
            return page.first - 1
        if self._rules().retention(topic).compact:
            # Their number is not known: some were superseded.
            self._send(subscription, messages.encode_gap(topic, None, "expired"))
            return offset
        last = page.first - 1
        if last <= offset:  # only tombstones, of a topic that is no longer compacted
            self._send(subscription, messages.encode_gap(topic, None, "expired"))
            return offset
        self._send(subscription, messages.encode_gap(topic, last - offset, "expired", offset + 1, last))
        return last

    @staticmethod
    def _send(subscription: Subscription, payload: bytes) -> None:
        if subscription.connection is not None:
            subscription.connection.answer(payload)


def to_kept(event: Event | KeptEvent) -> KeptEvent:
    """Give an event as the data path feeds it."""
    if isinstance(event, KeptEvent):
        return event
    offset, data = event.offset or 0, bytes(event.data)
    payload = messages.encode_event(event.topic, data, event.key, offset)
    return KeptEvent(event.topic, payload, offset, len(data), None if event.key is None else event.key.encode())


def _no_history(topic: str) -> CommandError:
    return CommandError("no_history", f"`{topic}` keeps no history")
