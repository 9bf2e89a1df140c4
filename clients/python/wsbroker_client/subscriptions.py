"""Subscriptions over many connections: subscribe again, go on at the same place, count what was missed.

The broker sends an event once to a connection, under the most specific subscription that matches (its owner). Here
each subscription that matches gets it. The credit goes back to the owner when all of them have given the event out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from wsbroker_client.actions import Outbox
from wsbroker_client.errors import AlreadySubscribed, ClientError, CommandRefused
from wsbroker_client.model import Event, Gap, Join, Leave, Live
from wsbroker_client.reconnection import Backoff
from wsbroker_client.requests import Requests, retry_delay
from wsbroker_client.states import Delivery, Item, Message, Shares, SubscriptionCore, SubscriptionState, move
from wsbroker_client.wire import decode_event, encode_command, matches, overlap, rank

WINDOW: Final = 256
"""Events that may be on their way to a subscription and not yet taken by the application."""

MAX_ROUTES: Final = 4096
"""Topics for which it is remembered which subscriptions get their events."""

MAX_UNAUTHORIZED: Final = 3
"""How often a subscription is asked for again with a fresh token, where the broker knows no identity."""


class Subscriptions:
    """All subscriptions of a client that have not ended."""

    def __init__(self, outbox: Outbox, requests: Requests, backoff: Backoff, token_function: bool) -> None:
        """`token_function`: whether a fresh token can be had."""
        self.by_topic: dict[str, SubscriptionCore] = {}
        """By topic or pattern, in the order in which they were made."""
        self.due: float | None = None
        """When a subscription that was refused is asked for again."""
        self._outbox = outbox
        self._requests = requests
        self._backoff = backoff
        self._token_function = token_function
        self._ending: list[SubscriptionCore] = []
        """Ended here, while the broker has confirmed no `unsubscribe` yet: it still sends their events."""
        self._routes: dict[str, tuple[SubscriptionCore, list[SubscriptionCore]]] = {}

    # Calls of the application

    def add(self, subscription: SubscriptionCore, now: float) -> None:
        """Begin a subscription. Raises AlreadySubscribed."""
        topic = subscription.topic
        if topic in self.by_topic:
            raise AlreadySubscribed(f"this client has a subscription to {topic}: use that one")
        self.by_topic[topic] = subscription
        if self._connected:
            self._ask(subscription, now)

    def end(self, subscription: SubscriptionCore, now: float) -> None:
        """End a subscription. The messages in its inbox are dropped."""
        if subscription.state is SubscriptionState.ENDED:
            return
        if subscription.live:
            self._ending.append(subscription)
        asked = subscription.state is not SubscriptionState.OFFLINE
        self.finish(subscription, None)
        while subscription.inbox:
            self._release(subscription.inbox.popleft())
        if not asked or not self._connected:
            return
        request = self._requests.new("`unsubscribe`", now, float("inf"), repeat=False)
        request.payload = encode_command("unsubscribe", id=request.id, topic=subscription.topic)
        request.answered = lambda _answer, _now: self._unsubscribed(subscription)
        request.refused = lambda _error, _now: self._unsubscribed(subscription)
        self._requests.submit(request, now)

    def take(self, subscription: SubscriptionCore) -> Message | None:
        """Take the next message out of the inbox; None if it is empty. Gives the credit of an event back."""
        if not subscription.inbox:
            return None
        item = subscription.inbox.popleft()
        self._release(item)
        return item.event if isinstance(item, Delivery) else item

    # Events of the connection

    def ask_all(self, now: float) -> None:
        """Ask for each subscription that the broker does not know and whose time has come, in their order."""
        self.due = None
        for subscription in list(self.by_topic.values()):
            if subscription.state is not SubscriptionState.OFFLINE:
                continue
            if subscription.not_before <= now:
                self._ask(subscription, now)
            else:
                self._ask_later(subscription)

    def disconnected(self) -> None:
        """The connection has ended: the broker knows no subscription any more."""
        self.due = None
        self._routes.clear()
        self._ending.clear()
        for subscription in self.by_topic.values():
            if subscription.state is not SubscriptionState.OFFLINE:
                move(subscription, SubscriptionState.OFFLINE)
            subscription.granted = 0
            subscription.not_before = 0.0

    def finish_all(self, error: ClientError | None) -> None:
        """The client is closed, for `error` or by the application."""
        self.due = None
        for subscription in list(self.by_topic.values()):
            self.finish(subscription, error)

    def finish(self, subscription: SubscriptionCore, error: ClientError | None) -> None:
        """A subscription has ended, for `error` or by the application. The messages in its inbox can still be taken."""
        move(subscription, SubscriptionState.ENDED)
        subscription.error = error
        self.by_topic.pop(subscription.topic, None)
        self._routes.clear()
        self._outbox.wake(subscription)

    # Messages of the broker

    def event(self, payload: bytes) -> None:
        """An event has come. Raises ValueError for a message that is not an event."""
        raw = decode_event(payload)
        route = self._routes.get(raw.topic) or self._find_route(raw.topic)
        if route is None:
            return  # it was on its way when the subscription ended
        owner, matching = route
        receivers = matching
        owner.granted -= 1
        if raw.offset is not None and owner.epoch is not None:
            if owner.offset is not None and raw.offset <= owner.offset:
                self._settle(owner, matching)
                return
            owner.offset = raw.offset
            if raw.offset <= owner.replay_top:
                # For the others it is not new: it was published before the owner subscribed.
                receivers = [owner] if owner.live else []
        if not receivers:
            self._settle(owner, matching)
            return
        owner.held += 1
        shares = Shares(owner, matching, len(receivers))
        for each in receivers:
            event: Event[Any] = Event(raw.topic, raw.key, raw.data, raw.offset, each.decode)
            self._put(each, Delivery(event, shares))

    def gap(self, message: dict[str, Any]) -> None:
        """The broker announces missed events."""
        gap = Gap(message["topic"], message["missed"], message["reason"], message.get("from"), message.get("to"))
        owner = self.by_topic.get(gap.topic)
        if owner is not None and owner.live:
            self._put(owner, gap)
            if gap.stop is not None and owner.epoch is not None:
                owner.offset = max(gap.stop, owner.offset or 0)  # or it would come after all, by recovery
            if owner.state is SubscriptionState.REPLAYING and (gap.stop or 0) <= owner.replay_top:
                return  # events missing in the replay are old for the others
        self._put_broader(gap)

    def live(self, message: dict[str, Any]) -> None:
        """A replay is complete."""
        subscription = self.by_topic.get(message["topic"])
        if subscription is None or subscription.state is not SubscriptionState.REPLAYING:
            return
        move(subscription, SubscriptionState.LIVE)
        subscription.start = {}
        offset = message.get("offset")
        if offset is not None:
            subscription.offset = max(offset, subscription.offset or 0)
        self._put(subscription, Live(subscription.topic, offset))

    def member(self, message: dict[str, Any]) -> None:
        """A member has come or gone."""
        subscription = self.by_topic.get(message["topic"])
        if subscription is not None and subscription.live:
            kind = Join if message["op"] == "join" else Leave
            found = kind(message["topic"], message["session"], message.get("identity"), message.get("info"))
            self._put(subscription, found)

    # Asking

    @property
    def _connected(self) -> bool:
        return self._requests.max_size is not None

    def _ask(self, subscription: SubscriptionCore, now: float) -> None:
        """Send `subscribe`, with the place to go on from where there is one."""
        request = self._requests.new("`subscribe`", now, float("inf"), repeat=False)
        fields = dict(subscription.options)
        if (position := subscription.position) is not None:
            fields["since"] = position._asdict()
        else:
            fields |= subscription.start
        subscription.granted = max(0, subscription.window - subscription.held)
        fields["credit"] = subscription.granted
        request.payload = encode_command("subscribe", id=request.id, topic=subscription.topic, **fields)
        replays = "since" in fields or "last" in fields
        request.answered = lambda answer, _now: self._subscribed(subscription, answer, replays)
        request.refused = lambda error, now: self._not_subscribed(subscription, error, now)
        move(subscription, SubscriptionState.ASKED)
        self._requests.submit(request, now)

    def _ask_later(self, subscription: SubscriptionCore) -> None:
        self.due = min(subscription.not_before, self.due or subscription.not_before)

    def _subscribed(self, subscription: SubscriptionCore, answer: dict[str, Any], replays: bool) -> None:
        epoch, top = answer.get("epoch"), int(answer.get("offset") or 0)
        replaying = replays and epoch is not None
        missed = subscription.confirmed and not replaying
        if epoch != subscription.epoch:
            # The numbering has begun anew: no event of it has come. The broker sends a gap for it.
            subscription.offset = 0 if subscription.offset is not None else None
        subscription.epoch = epoch
        if epoch is None:
            subscription.offset = None
            subscription.start = {}
        elif not replays:
            subscription.offset = top
        subscription.replay_top = top if replaying else -1
        self._routes.clear()
        if subscription.state is not SubscriptionState.ASKED:
            self._ending.append(subscription)  # its `unsubscribe` is on its way
            return
        subscription.refusals = 0
        subscription.confirmed = True
        move(subscription, SubscriptionState.REPLAYING if replaying else SubscriptionState.LIVE)
        self._outbox.wake(subscription)
        if missed:
            self._put(subscription, Gap(subscription.topic, None, "disconnected"))
        if replaying:
            # Events that the broker has queued for broader subscriptions cannot be told from the replay. They are
            # not given to them.
            self._put_broader(Gap(subscription.topic, None, "overlap"))
        self._grant(subscription)

    def _not_subscribed(self, subscription: SubscriptionCore, error: CommandRefused, now: float) -> None:
        if subscription.state is not SubscriptionState.ASKED:
            return
        subscription.refusals += 1
        fresh_token = self._token_function and subscription.refusals <= MAX_UNAUTHORIZED
        if error.code == "no_history" and subscription.position is not None:
            # The topic does not keep history any more. The next answer puts a gap for the missed events.
            subscription.epoch = subscription.offset = None
            move(subscription, SubscriptionState.OFFLINE)
            self._ask(subscription, now)
        elif error.retry or (error.code == "unauthorized" and fresh_token):
            subscription.not_before = now + retry_delay(error, subscription.refusals, self._backoff)
            move(subscription, SubscriptionState.OFFLINE)
            self._ask_later(subscription)
        else:
            self.finish(subscription, error)

    def _unsubscribed(self, subscription: SubscriptionCore) -> None:
        """The broker has forgotten a subscription, and the events that it had queued for it."""
        if subscription in self._ending:
            self._ending.remove(subscription)
            self._routes.clear()
            self._put_broader(Gap(subscription.topic, None, "unsubscribed"))

    # Inboxes and credit

    def _put_broader(self, gap: Gap) -> None:
        """Broader subscriptions get the events of a more specific one too, and so have missed the same."""
        for each in self.by_topic.values():
            if each.live and rank(each.topic) > rank(gap.topic) and overlap(each.topic, gap.topic):
                self._put(each, gap)

    def _find_route(self, topic: str) -> tuple[SubscriptionCore, list[SubscriptionCore]] | None:
        """Find the owner of the events of a topic, and all subscriptions that get them."""
        receivers = [each for each in self.by_topic.values() if each.live and matches(each.topic, topic)]
        known = receivers + [each for each in self._ending if matches(each.topic, topic)]
        if not known:
            return None
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[topic] = route = (min(known, key=lambda each: rank(each.topic)), receivers)
        return route

    def _put(self, subscription: SubscriptionCore, item: Item) -> None:
        subscription.inbox.append(item)
        self._outbox.wake(subscription)

    def _release(self, item: Item) -> None:
        """An inbox has given this out. The credit goes back when all have."""
        if not isinstance(item, Delivery):
            return
        shares = item.shares
        shares.left -= 1
        if shares.left == 0:
            shares.owner.held -= 1
            self._settle(shares.owner, shares.matching)

    def _grant(self, subscription: SubscriptionCore) -> None:
        """Let more events come, if half of the window is free."""
        free = subscription.window - subscription.granted - subscription.held
        if subscription.live and free >= max(1, subscription.window // 2):
            subscription.granted += free
            self._outbox.send(encode_command("credit", topic=subscription.topic, add=free))

    def _settle(self, owner: SubscriptionCore, matching: Sequence[SubscriptionCore]) -> None:
        """An event is dealt with, and more may come.

        Events that were queued for a broader subscription when a more specific one began come after its `ok`, and
        cannot be told from those of the specific one. The broker counts them for the broader one, which would run out
        of credit. So `subscribe` sets the remaining credit now and then.
        """
        self._grant(owner)
        for each in matching:
            if each is owner or not each.live:
                continue
            each.doubt += 1
            if each.doubt >= max(1, each.window // 2):
                each.doubt = 0
                if each.granted > 0:
                    self._outbox.send(encode_command("subscribe", topic=each.topic, credit=each.granted))
