"""What the client decides. No I/O: what happens goes in by calls, and what is to be done comes out as actions.

All that can change the state of a client is in this file. Three things have a state: the client, each subscription,
each request; their transitions are the tables below, and `_move` is the only function that changes one.

Time is a number of seconds that only grows, given by the caller with each call. `deadline` says when `tick` is due.
The order of the actions of one call is the order in which they must be done.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Union

from wsbroker_client.errors import (
    AlreadySubscribed,
    ClientClosed,
    ClientError,
    Closed,
    CommandRefused,
    ConnectionLost,
    NotABroker,
    NotConnected,
    Refused,
    TimedOut,
)
from wsbroker_client.model import Decoder, Event, Gap, Join, Leave, Live, Position, Receipt
from wsbroker_client.wire import (
    EVENT,
    VERSION,
    decode_event,
    decode_message,
    encode_command,
    encode_publish,
    matches,
    overlap,
    publish_fields,
    rank,
)

FIRST_DELAY: Final = 0.25
MAX_DELAY: Final = 30.0
"""Seconds. The bound of the first wait after a lost connection, and of the longest; it doubles in between."""

LASTED: Final = 5.0
"""Seconds that a connection must last before the waits begin with the first again."""

WINDOW: Final = 256
"""Events that may be on their way to a subscription and not yet taken by the application."""

MAX_ROUTES: Final = 4096
"""Topics for which it is remembered which subscriptions get their events."""

RELIABLE_AGE: Final = 120.0
"""Seconds in which the broker knows a `dedup` again, unless it is configured: no publish is repeated after them."""


class State(enum.Enum):
    """The state of a client."""

    IDLE = "idle"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    CLOSED = "closed"


class SubscriptionState(enum.Enum):
    """The state of a subscription. OFFLINE: it will be asked for. ASKED: not yet answered."""

    OFFLINE = "offline"
    ASKED = "asked"
    REPLAYING = "replaying"
    LIVE = "live"
    ENDED = "ended"


class RequestState(enum.Enum):
    """The state of a command that is answered."""

    QUEUED = "queued"
    SENT = "sent"
    DONE = "done"


TRANSITIONS: Final[dict[enum.Enum, tuple[enum.Enum, ...]]] = {
    State.IDLE: (State.CONNECTING, State.CLOSED),
    State.CONNECTING: (State.CONNECTED, State.WAITING, State.CLOSED),
    State.CONNECTED: (State.WAITING, State.CLOSED),
    State.WAITING: (State.CONNECTING, State.CLOSED),
    State.CLOSED: (),
    SubscriptionState.OFFLINE: (SubscriptionState.ASKED, SubscriptionState.ENDED),
    SubscriptionState.ASKED: (
        SubscriptionState.REPLAYING,
        SubscriptionState.LIVE,
        SubscriptionState.OFFLINE,
        SubscriptionState.ENDED,
    ),
    SubscriptionState.REPLAYING: (SubscriptionState.LIVE, SubscriptionState.OFFLINE, SubscriptionState.ENDED),
    SubscriptionState.LIVE: (SubscriptionState.OFFLINE, SubscriptionState.ENDED),
    SubscriptionState.ENDED: (),
    RequestState.QUEUED: (RequestState.SENT, RequestState.DONE),
    RequestState.SENT: (RequestState.QUEUED, RequestState.DONE),
    RequestState.DONE: (),
}


# What is to be done


class Open(NamedTuple):
    """Open a connection, with a fresh token where there is a function for it; then call `received` and `lost`."""


class Send(NamedTuple):
    """Send these messages."""

    payloads: list[bytes]


class Close(NamedTuple):
    """Close the connection, which `lost` need not be called for: properly with 1000, or at once for `failure`."""

    failure: ClientError | None = None


class Changed(NamedTuple):
    """Tell the application the state. `delay` in seconds goes with WAITING; `failure` is why it came to it."""

    state: State
    delay: float | None = None
    failure: ClientError | None = None


class Wake(NamedTuple):
    """The subscription has something in its inbox, was answered, or has ended."""

    subscription: SubscriptionCore


class Finished(NamedTuple):
    """A request has its outcome: the answer of the broker, or an exception."""

    request: Request
    outcome: dict[str, Any] | ClientError


class FetchToken(NamedTuple):
    """Call the application's token function, and then `renew`."""


class Report(NamedTuple):
    """Tell the application of an error that no call waits for."""

    error: ClientError


Action = Union[Open, Send, Close, Changed, Wake, Finished, FetchToken, Report]
Message = Union[Event[Any], Gap, Live, Join, Leave]
_Item = Union[Gap, Live, Join, Leave, "_Delivery"]


class Request:
    """A command that the broker answers. `repeat`: it may be sent again over another connection."""

    def __init__(self, id: int, what: str, deadline: float, repeat: bool) -> None:
        self.id = id
        self.what = what
        self.state = RequestState.QUEUED
        self.deadline = deadline
        self.repeat = repeat
        self.payload = b""
        self.answered: Callable[[dict[str, Any], float], None] | None = None
        """Where the answer goes; None: to the application, as `Finished`."""
        self.refused: Callable[[CommandRefused, float], None] | None = None
        self.not_before = 0.0
        self.refusals = 0
        self.tried = False
        """Whether it was ever sent, maybe over an earlier connection."""
        self.tag: Any = None
        """For the caller; never read here."""


class _Delivery:
    """An event in an inbox. The credit goes back to the owner when the last inbox that has it gives it out."""

    __slots__ = ("event", "owner", "shares")

    def __init__(self, event: Event[Any], owner: SubscriptionCore, shares: list[int]) -> None:
        self.event = event
        self.owner = owner
        self.shares = shares


class SubscriptionCore:
    """One subscription, over as many connections as it takes."""

    def __init__(
        self, machine: Machine, topic: str, options: dict[str, Any], window: int, decode: Decoder | None
    ) -> None:
        self.machine = machine
        self.topic = topic
        self.options = options
        """Fields of `subscribe` that are the same each time."""
        self.start: dict[str, Any] = {}
        """`since` or `last` of the application, until the first event has come."""
        self.window = window
        self.decode = decode
        self.state = SubscriptionState.OFFLINE
        self.error: ClientError | None = None
        self.epoch: str | None = None
        self.offset: int | None = None
        """The newest event that came, on a topic with history; None: not known yet."""
        self.confirmed = False
        """Whether the broker has ever answered `ok`."""
        self.replay_top = -1
        self.not_before = 0.0
        self.refusals = 0
        self.granted = 0
        """Events that the broker may still send."""
        self.held = 0
        """Events that came and were not taken."""
        self.inbox: deque[_Item] = deque()
        self.tag: Any = None

    @property
    def position(self) -> Position | None:
        """Where a new connection goes on; None: the topic keeps no history, or nothing of it is known yet."""
        return None if self.epoch is None or self.offset is None else Position(self.epoch, self.offset)

    @property
    def live(self) -> bool:
        """Whether events that are published now come."""
        return self.state in (SubscriptionState.LIVE, SubscriptionState.REPLAYING)


class Machine:
    """The state of one client."""

    def __init__(self, *, token_function: bool = False, rng: Callable[[float, float], float] = random.uniform) -> None:
        """`token_function`: whether a fresh token can be had. `rng(a, b)` gives a random number between both."""
        self.state = State.IDLE
        self.failure: ClientError | None = None
        """Why there is no connection, in WAITING and CLOSED; the last reason, in CONNECTING."""
        self.welcome: dict[str, Any] = {}
        self.subscriptions: dict[str, SubscriptionCore] = {}
        self.attempts = 0
        """Connections that failed since the last one that lasted."""
        self._actions: list[Action] = []
        self._outgoing: list[bytes] = []
        self._ids = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._timers: list[tuple[float, int]] = []
        self._routes: dict[str, tuple[SubscriptionCore, list[SubscriptionCore]]] = {}
        self._woken: dict[SubscriptionCore, None] = {}
        self._token_function = token_function
        self._token_refusals = 0
        self._ever_connected = False
        self._connected_at = 0.0
        self._reconnect_at: float | None = None
        self._renew_at: float | None = None
        self._ask_again_at: float | None = None
        self._bye_ms: int | None = None
        self._rng = rng

    # Calls of the application

    def connect(self, now: float) -> None:
        """Connect, where that was not done yet, or at once where the client waits: the network may be back."""
        if self.state in (State.IDLE, State.WAITING):
            self._connect()

    def close(self) -> None:
        """End everything. Nothing happens if the client is closed."""
        if self.state is not State.CLOSED:
            self._end(None)

    def subscribe(
        self,
        topic: str,
        options: dict[str, Any],
        start: dict[str, Any],
        now: float,
        *,
        window: int = WINDOW,
        decode: Decoder | None = None,
    ) -> SubscriptionCore:
        """Begin a subscription. Raises AlreadySubscribed, ClientClosed or what closed the client."""
        self._check_open()
        if topic in self.subscriptions:
            raise AlreadySubscribed(f"this client has a subscription to {topic}: use that one")
        subscription = SubscriptionCore(self, topic, options, window, decode)
        subscription.start = start
        self.subscriptions[topic] = subscription
        if self.state is State.CONNECTED:
            self._ask(subscription, now)
        return subscription

    def unsubscribe(self, subscription: SubscriptionCore) -> None:
        """End a subscription. What it has in its inbox is dropped."""
        if subscription.state is SubscriptionState.ENDED:
            return
        asked = subscription.state is not SubscriptionState.OFFLINE
        self._finish_subscription(subscription, None)
        while subscription.inbox:
            self._release(subscription.inbox.popleft())
        if asked and self.state is State.CONNECTED:
            self._outgoing.append(encode_command("unsubscribe", topic=subscription.topic))

    def take(self, subscription: SubscriptionCore) -> Message | None:
        """Take the next message out of the inbox; None if it is empty. Gives the credit of an event back."""
        if not subscription.inbox:
            return None
        item = subscription.inbox.popleft()
        self._release(item)
        return item.event if isinstance(item, _Delivery) else item

    def publish(
        self,
        topic: str,
        data: bytes,
        now: float,
        *,
        timeout: float,
        key: str | None = None,
        dedup: str | None = None,
        queue: bool = True,
    ) -> Request:
        """Publish one event whose data is JSON. With `dedup` it is repeated until it is answered."""
        request = self._request("the publish", now, timeout, repeat=dedup is not None)
        request.payload = encode_publish(request.id, publish_fields(topic, key, dedup), data)
        return self._submit(request, now, queue)

    def ask(self, op: str, now: float, *, timeout: float, **fields: Any) -> Request:
        """Send a command that changes nothing (`history`, `presence`, `ping`) and may be repeated."""
        request = self._request(f"`{op}`", now, timeout, repeat=True)
        request.payload = encode_command(op, id=request.id, **fields)
        return self._submit(request, now, True)

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request any more."""
        if request.state is not RequestState.DONE:
            self._move(request, RequestState.DONE)
            self._requests.pop(request.id, None)

    # What happens to the connection

    def received(self, payloads: list[bytes], now: float) -> None:
        """Messages have come, in this order."""
        for payload in payloads:
            if self.state not in (State.CONNECTING, State.CONNECTED):
                return
            try:
                if payload.startswith(EVENT):
                    self._event(payload)
                else:
                    self._message(decode_message(payload), now)
            except (ValueError, KeyError, TypeError) as error:
                self._break(NotABroker(f"not a message of the protocol: {error!r}"), now)

    def lost(self, failure: ClientError, now: float) -> None:
        """The connection could not be had, or has ended."""
        if self.state not in (State.CONNECTING, State.CONNECTED):
            return
        if isinstance(failure, Closed) and self._bye_ms is not None:
            failure.retry_after_ms = self._bye_ms
        if self.state is State.CONNECTED and now - self._connected_at >= LASTED:
            self.attempts = 0
            self._token_refusals = 0
        self.attempts += 1
        delay = self._delay(failure)
        if delay is None:
            self._end(failure)
            return
        self.failure = failure
        self._renew_at = None
        self._disconnect_all(failure)
        self._reconnect_at = now + delay
        self._change(State.WAITING, delay=delay, failure=failure)

    def renew(self, token: str | ClientError, now: float) -> None:
        """What FetchToken asked for: a token, or why there is none."""
        if self.state is not State.CONNECTED:
            return
        if isinstance(token, ClientError):
            self._actions.append(Report(token))
            self._renew_at = now + self._back_off(1)
            return
        request = self._request("`auth`", now, RELIABLE_AGE, repeat=False)
        request.payload = encode_command("auth", id=request.id, token=token)
        request.answered = self._renewed
        request.refused = lambda error, _now: self._actions.append(Report(error))
        self._submit(request, now, False)

    def tick(self, now: float) -> None:
        """Do what is due by now."""
        if self._reconnect_at is not None and self._reconnect_at <= now:
            self._connect()
        if self._renew_at is not None and self._renew_at <= now:
            self._renew_at = None
            self._actions.append(FetchToken())
        while self._timers and self._timers[0][0] <= now:
            request = self._requests.get(heapq.heappop(self._timers)[1])
            if request is None:
                continue
            if request.deadline <= now:
                self._done(request, self._timed_out(request))
            elif request.state is RequestState.QUEUED and request.not_before <= now:
                self._send(request, now)
        if self._ask_again_at is not None and self._ask_again_at <= now:
            self._ask_all(now)

    @property
    def deadline(self) -> float | None:
        """When `tick` is due; None: not by itself."""
        times = [time for time in (self._reconnect_at, self._renew_at, self._ask_again_at) if time is not None]
        while self._timers and self._timers[0][1] not in self._requests:
            heapq.heappop(self._timers)
        if self._timers:
            times.append(self._timers[0][0])
        return min(times, default=None)

    @property
    def busy(self) -> bool:
        """Whether there is something to be done: `take_actions` gives more than nothing."""
        return bool(self._outgoing or self._actions or self._woken)

    def take_actions(self) -> list[Action]:
        """Give what is to be done, and forget it."""
        if self._outgoing:
            self._actions.append(Send(self._outgoing))
            self._outgoing = []
        if self._woken:
            self._actions += map(Wake, self._woken)
            self._woken = {}
        actions, self._actions = self._actions, []
        return actions

    # The client

    def _connect(self) -> None:
        self._reconnect_at = None
        self._bye_ms = None
        self._change(State.CONNECTING, failure=self.failure)
        self._actions.append(Open())

    def _welcomed(self, message: dict[str, Any], now: float) -> None:
        if self.state is not State.CONNECTING:
            return
        if message["version"] != VERSION:
            found = f"the broker speaks version {message['version']} of the protocol, this client version {VERSION}"
            self._break(NotABroker(found), now)
            return
        self.welcome = message
        self._ever_connected = True
        self._connected_at = now
        self.failure = None
        self._plan_renewal(message.get("expires_in"), now)
        self._change(State.CONNECTED)
        self._ask_all(now)
        for request in list(self._requests.values()):
            if request.state is RequestState.QUEUED and request.not_before <= now:
                self._send(request, now)

    def _delay(self, failure: ClientError) -> float | None:
        """Decide how many seconds to wait before the next attempt. None: there is none."""
        if self._token_function and _is_token_refused(failure) and self._token_refusals < 1:
            self._token_refusals += 1  # a fresh token is what may change it
            return 0.0
        if is_permanent(failure, self._ever_connected):
            return None
        if self._bye_ms is not None:
            return self._bye_ms / 1000
        if isinstance(failure, Refused) and failure.retry_after is not None:
            # All who were refused together were told the same.
            return failure.retry_after + self._rng(0.0, FIRST_DELAY * 4)
        return self._back_off(self.attempts)

    def _back_off(self, attempts: int) -> float:
        """Full jitter: anything up to a bound that doubles."""
        return self._rng(0.0, min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempts - 1, 30)))

    def _break(self, failure: ClientError, now: float) -> None:
        """End a connection on which the broker did what it must not do."""
        self._actions.append(Close(failure))
        self.lost(failure, now)

    def _end(self, failure: ClientError | None) -> None:
        """Close for good: by the application where `failure` is None."""
        had_connection = self.state in (State.CONNECTING, State.CONNECTED)
        self.failure = failure or ClientClosed("the application closed this client")
        self._reconnect_at = self._renew_at = self._ask_again_at = None
        self._outgoing = []
        for subscription in list(self.subscriptions.values()):
            self._finish_subscription(subscription, failure)
        for request in list(self._requests.values()):
            self._done(request, self.failure)
        if had_connection and failure is None:
            self._actions.append(Close())
        self._change(State.CLOSED, failure=failure)

    def _plan_renewal(self, expires_in: float | None, now: float) -> None:
        if expires_in is None or not self._token_function:
            self._renew_at = None
            return
        # A tenth earlier, at most half a minute; and not all clients whose tokens are of one moment at once.
        self._renew_at = now + expires_in - min(30.0, expires_in * self._rng(0.1, 0.2))

    def _renewed(self, answer: dict[str, Any], now: float) -> None:
        self._plan_renewal(answer.get("expires_in"), now)

    def _check_open(self) -> None:
        if self.state is State.CLOSED:
            assert self.failure is not None
            raise self.failure

    def _disconnect_all(self, failure: ClientError) -> None:
        """The connection is gone: what may be repeated is, and the rest is told so."""
        self._outgoing = []
        self._ask_again_at = None
        self._routes.clear()
        for subscription in self.subscriptions.values():
            if subscription.state is not SubscriptionState.OFFLINE:
                self._move(subscription, SubscriptionState.OFFLINE)
            subscription.granted = 0
            subscription.not_before = 0.0
        for request in list(self._requests.values()):
            if request.state is not RequestState.SENT:
                continue
            if request.repeat:
                self._move(request, RequestState.QUEUED)
            else:
                self._done(request, ConnectionLost(f"{failure}; whether {request.what} was carried out is not known"))

    # Messages

    def _message(self, message: dict[str, Any], now: float) -> None:
        handler = _HANDLERS.get(message["op"])
        if handler is not None:  # other messages are of a later version of the broker
            handler(self, message, now)

    def _answer(self, message: dict[str, Any], now: float) -> None:
        request = self._requests.get(message["id"]) if "id" in message else None
        if request is None or request.state is not RequestState.SENT:
            return
        if request.answered is None:
            self._done(request, message)
            return
        self._move(request, RequestState.DONE)
        del self._requests[request.id]
        request.answered(message, now)

    def _error(self, message: dict[str, Any], now: float) -> None:
        error = CommandRefused(
            message["code"],
            message.get("message", ""),
            retry=bool(message.get("retry")),
            retry_after_ms=message.get("retry_after_ms"),
        )
        if error.code == "unauthorized" and self._token_function and self._renew_at is None:
            self._actions.append(FetchToken())
        request = self._requests.get(message["id"]) if message.get("id") is not None else None
        if request is None:
            subscription = self.subscriptions.get(message.get("topic", ""))
            if subscription is not None and error.code == "forbidden":
                self._finish_subscription(subscription, error)
            else:
                self._actions.append(Report(error))
        elif request.refused is not None:
            self._move(request, RequestState.DONE)
            del self._requests[request.id]
            request.refused(error, now)
        elif error.retry and request.repeat:
            request.refusals += 1
            self._move(request, RequestState.QUEUED)
            request.not_before = now + self._retry_delay(error, request.refusals)
            heapq.heappush(self._timers, (request.not_before, request.id))
        else:
            self._done(request, error)

    def _retry_delay(self, error: CommandRefused, refusals: int) -> float:
        asked = (error.retry_after_ms or 0) / 1000
        return asked + self._back_off(refusals)

    def _bye(self, message: dict[str, Any], _now: float) -> None:
        self._bye_ms = int(message["retry_after_ms"])

    def _gap(self, message: dict[str, Any], _now: float) -> None:
        gap = Gap(message["topic"], message["missed"], message["reason"], message.get("from"), message.get("to"))
        owner = self.subscriptions.get(gap.topic)
        if owner is not None and owner.live:
            self._put(owner, gap)
            if gap.stop is not None and owner.epoch is not None:
                owner.offset = max(gap.stop, owner.offset or 0)  # or it would come after all, by recovery
        self._put_broader(gap)

    def _put_broader(self, gap: Gap) -> None:
        """Broader subscriptions get the events of a more specific one too, and so have missed the same."""
        for each in self.subscriptions.values():
            if each.live and rank(each.topic) > rank(gap.topic) and overlap(each.topic, gap.topic):
                self._put(each, gap)

    def _live(self, message: dict[str, Any], _now: float) -> None:
        subscription = self.subscriptions.get(message["topic"])
        if subscription is not None and subscription.state is SubscriptionState.REPLAYING:
            self._move(subscription, SubscriptionState.LIVE)
            subscription.start = {}
            offset = message.get("offset")
            if offset is not None:
                subscription.offset = max(offset, subscription.offset or 0)
            self._put(subscription, Live(subscription.topic, offset))

    def _join(self, message: dict[str, Any], _now: float) -> None:
        subscription = self.subscriptions.get(message["topic"])
        if subscription is not None and subscription.live:
            kind = Join if message["op"] == "join" else Leave
            self._put(
                subscription,
                kind(message["topic"], message["session"], message.get("identity"), message.get("info")),
            )

    # Subscriptions

    def _ask_all(self, now: float) -> None:
        """Ask for each subscription that is offline and whose time has come, in the order in which they were made."""
        self._ask_again_at = None
        for subscription in list(self.subscriptions.values()):
            if subscription.state is not SubscriptionState.OFFLINE:
                continue
            if subscription.not_before <= now:
                self._ask(subscription, now)
            else:
                self._ask_again_at = min(subscription.not_before, self._ask_again_at or subscription.not_before)

    def _ask(self, subscription: SubscriptionCore, now: float) -> None:
        """Send `subscribe`, with the place to go on from where there is one."""
        request = self._request("`subscribe`", now, float("inf"), repeat=False)
        fields = dict(subscription.options)
        if (position := subscription.position) is not None:
            fields["since"] = position._asdict()
        else:
            fields |= subscription.start
        subscription.granted = max(0, subscription.window - subscription.held)
        fields["credit"] = subscription.granted
        request.payload = encode_command("subscribe", id=request.id, topic=subscription.topic, **fields)
        replays = "since" in fields or "last" in fields
        request.answered = lambda answer, _: self._subscribed(subscription, answer, replays)
        request.refused = lambda error, at: self._not_subscribed(subscription, error, at)
        self._move(subscription, SubscriptionState.ASKED)
        self._submit(request, now, False)

    def _subscribed(self, subscription: SubscriptionCore, answer: dict[str, Any], replays: bool) -> None:
        if subscription.state is not SubscriptionState.ASKED:
            return
        epoch, top = answer.get("epoch"), int(answer.get("offset") or 0)
        missed = subscription.confirmed and not (replays and epoch is not None)
        if epoch != subscription.epoch:
            # The numbering has begun anew: no event of it has come. (The broker announces what that cost.)
            subscription.offset = 0 if subscription.offset is not None else None
        subscription.epoch = epoch
        if epoch is None:
            subscription.offset = None
            subscription.start = {}
        elif not replays:
            subscription.offset = top
        replaying = replays and epoch is not None
        subscription.replay_top = top if replaying else -1
        subscription.refusals = 0
        subscription.confirmed = True
        self._routes.clear()
        self._move(subscription, SubscriptionState.REPLAYING if replaying else SubscriptionState.LIVE)
        self._woken[subscription] = None
        if missed:
            self._put(subscription, Gap(subscription.topic, None, "disconnected"))
        self._grant(subscription)

    def _not_subscribed(self, subscription: SubscriptionCore, error: CommandRefused, now: float) -> None:
        if subscription.state is not SubscriptionState.ASKED:
            return
        subscription.refusals += 1
        if error.code == "no_history" and subscription.position is not None:
            # The topic does not keep history any more. What was missed becomes a gap when it goes on.
            subscription.epoch = subscription.offset = None
            self._move(subscription, SubscriptionState.OFFLINE)
            self._ask(subscription, now)
        elif error.retry or (error.code == "unauthorized" and self._token_function and subscription.refusals < 4):
            self._move(subscription, SubscriptionState.OFFLINE)
            subscription.not_before = now + self._retry_delay(error, subscription.refusals)
            self._ask_again_at = min(subscription.not_before, self._ask_again_at or subscription.not_before)
        else:
            self._finish_subscription(subscription, error)

    def _finish_subscription(self, subscription: SubscriptionCore, error: ClientError | None) -> None:
        if subscription.live and self.state is State.CONNECTED:
            # The broker forgets what it had queued, and broader subscriptions were to get that too.
            self._put_broader(Gap(subscription.topic, None, "unsubscribed"))
        self._move(subscription, SubscriptionState.ENDED)
        subscription.error = error
        self.subscriptions.pop(subscription.topic, None)
        self._routes.clear()
        self._woken[subscription] = None

    def _event(self, payload: bytes) -> None:
        raw = decode_event(payload)
        route = self._routes.get(raw.topic) or self._find_route(raw.topic)
        if route is None:
            return  # it was on its way when the subscription ended
        owner, receivers = route
        owner.granted = max(0, owner.granted - 1)
        if raw.offset is not None and owner.epoch is not None:
            if owner.offset is not None and raw.offset <= owner.offset:
                self._grant(owner)
                return
            owner.offset = raw.offset
            if raw.offset <= owner.replay_top:
                receivers = [owner]  # for the others it is not new: it was published before the owner subscribed
        owner.held += 1
        shares = [len(receivers)]
        for each in receivers:
            event: Event[Any] = Event(raw.topic, raw.key, raw.data, raw.offset, each.decode)
            self._put(each, _Delivery(event, owner, shares))

    def _find_route(self, topic: str) -> tuple[SubscriptionCore, list[SubscriptionCore]] | None:
        """Find under which subscription the broker sends the events of a topic, and which get them."""
        receivers = [each for each in self.subscriptions.values() if each.live and matches(each.topic, topic)]
        if not receivers:
            return None
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[topic] = route = (min(receivers, key=lambda each: rank(each.topic)), receivers)
        return route

    def _put(self, subscription: SubscriptionCore, item: _Item) -> None:
        subscription.inbox.append(item)
        self._woken[subscription] = None

    def _release(self, item: _Item) -> None:
        """An inbox has given this out. The credit goes back when all have."""
        if isinstance(item, _Delivery):
            item.shares[0] -= 1
            if item.shares[0] == 0:
                item.owner.held -= 1
                self._grant(item.owner)

    def _grant(self, subscription: SubscriptionCore) -> None:
        """Let more events come, where half of what may be under way is free."""
        free = subscription.window - subscription.granted - subscription.held
        if subscription.live and free >= max(1, subscription.window // 2):
            subscription.granted += free
            self._outgoing.append(encode_command("credit", topic=subscription.topic, add=free))

    # Requests

    def _request(self, what: str, now: float, timeout: float, *, repeat: bool) -> Request:
        return Request(next(self._ids), what, now + timeout, repeat)

    def _submit(self, request: Request, now: float, queue: bool) -> Request:
        self._check_open()
        if self.state is not State.CONNECTED and not queue:
            raise NotConnected(f"there is no connection to the broker{self._because()}")
        self._requests[request.id] = request
        if request.deadline != float("inf"):
            if len(self._timers) > 64 + 4 * len(self._requests):
                self._timers = [each for each in self._timers if each[1] in self._requests]
                heapq.heapify(self._timers)
            heapq.heappush(self._timers, (request.deadline, request.id))
        if self.state is State.CONNECTED:
            self._send(request, now)
        return request

    def _send(self, request: Request, now: float) -> None:
        size, most = len(request.payload), self.welcome["max_size"]
        if size > most:
            message = f"the command has {size:,} bytes, the broker takes at most {most:,}"
            self._done(request, CommandRefused("limit", message))
            return
        self._move(request, RequestState.SENT)
        request.tried = True
        self._outgoing.append(request.payload)

    def _done(self, request: Request, outcome: dict[str, Any] | ClientError) -> None:
        self._move(request, RequestState.DONE)
        del self._requests[request.id]
        self._actions.append(Finished(request, outcome))

    def _timed_out(self, request: Request) -> TimedOut:
        if request.tried:
            return TimedOut(
                f"{request.what} was not answered in time; whether it was carried out is not known", sent=True
            )
        return TimedOut(f"{request.what} was not sent in time: there was no connection{self._because()}", sent=False)

    def _because(self) -> str:
        return f" ({self.failure})" if self.failure is not None else ""

    # States

    def _change(self, state: State, delay: float | None = None, failure: ClientError | None = None) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} → {state}"
        self.state = state
        self._actions.append(Changed(state, delay, failure))

    def _move(self, what: Request | SubscriptionCore, state: RequestState | SubscriptionState) -> None:
        assert state in TRANSITIONS[what.state], f"{what.state} → {state}"
        what.state = state


def is_permanent(failure: ClientError, ever_connected: bool) -> bool:
    """Whether to connect again is of no use: until something changes, it would end the same way."""
    if isinstance(failure, Closed):
        return 4500 <= failure.close_code <= 4999
    if isinstance(failure, Refused):
        # What is not about the token may be a proxy's own answer while the broker behind it is away.
        return failure.status in (401, 403) or (not failure.retry and not ever_connected and failure.status < 500)
    return isinstance(failure, NotABroker) and not ever_connected


def _is_token_refused(failure: ClientError) -> bool:
    if isinstance(failure, Closed):
        return failure.close_code in (4500, 4501)
    return isinstance(failure, Refused) and failure.status == 401


def receipt_of(answer: dict[str, Any]) -> Receipt:
    """What the application gets for the `ok` of a publish."""
    return Receipt(
        answer.get("receivers", 0),
        answer.get("queued", 0),
        answer.get("dropped", 0),
        answer.get("epoch"),
        answer.get("offset"),
        bool(answer.get("duplicate")),
    )


_HANDLERS: Final[dict[str, Callable[[Machine, dict[str, Any], float], None]]] = {
    "welcome": Machine._welcomed,
    "ok": Machine._answer,
    "pong": Machine._answer,
    "error": Machine._error,
    "gap": Machine._gap,
    "live": Machine._live,
    "join": Machine._join,
    "leave": Machine._join,
    "bye": Machine._bye,
    "event": lambda machine, message, _now: machine._event(encode_command(**message)),
}
