"""The decisions of the client, without I/O: calls say what has happened, actions say what to do.

The Machine is the state of the client and gives the work to its parts: `requests` for commands, `subscriptions`,
`reconnection` for when to connect again and to renew the token. Their states and transitions are in `states`, the
actions in `actions`.

Time is a number of seconds that only grows, given by the caller with each call. `deadline` says when `tick` is due.
The order of the actions of one call is the order in which they must be done.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from wsbroker_client.actions import Action, Changed, Close, FetchToken, Open, Outbox, Report
from wsbroker_client.errors import ClientClosed, ClientError, CommandRefused, NotABroker, NotConnected
from wsbroker_client.model import Decoder
from wsbroker_client.reconnection import Backoff, Reconnection, Renewal
from wsbroker_client.requests import Requests
from wsbroker_client.states import Message, Request, State, SubscriptionCore, check_transition
from wsbroker_client.subscriptions import WINDOW, Subscriptions
from wsbroker_client.wire import EVENT, VERSION, decode_message, encode_command, encode_publish, publish_fields

RELIABLE_AGE: Final = 120.0
"""Seconds in which the broker knows a `dedup` again, unless it is configured: no publish is repeated after them."""


class Machine:
    """The state of one client."""

    def __init__(self, *, token_function: bool = False, rng: Callable[[float, float], float] = random.uniform) -> None:
        """`token_function`: whether a fresh token can be had. `rng(a, b)` gives a random number between both."""
        self.state = State.IDLE
        self.failure: ClientError | None = None
        """Why there is no connection, in WAITING and CLOSED; the last reason, in CONNECTING."""
        self.welcome: dict[str, Any] = {}
        """The `welcome` of the last connection."""
        backoff = Backoff(rng)
        self._outbox = Outbox()
        self._requests = Requests(self._outbox, backoff)
        self._subscriptions = Subscriptions(self._outbox, self._requests, backoff, token_function)
        self._reconnection = Reconnection(backoff, token_function)
        self._reconnect_at: float | None = None
        self._renewal = Renewal(backoff, token_function)

    @property
    def subscriptions(self) -> dict[str, SubscriptionCore]:
        """The subscriptions that have not ended, by topic or pattern."""
        return self._subscriptions.by_topic

    # Calls of the application

    def connect(self) -> None:
        """Connect, if that was not done yet; if the client waits, connect at once: the network may be back."""
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
        """Begin a subscription. Raises AlreadySubscribed, ClientClosed or the error that closed the client."""
        self._check_open()
        subscription = SubscriptionCore(topic, options, start, window, decode)
        self._subscriptions.add(subscription, now)
        return subscription

    def unsubscribe(self, subscription: SubscriptionCore, now: float) -> None:
        """End a subscription. The messages in its inbox are dropped."""
        self._subscriptions.end(subscription, now)

    def take(self, subscription: SubscriptionCore) -> Message | None:
        """Take the next message out of the inbox; None if it is empty. Gives the credit of an event back."""
        return self._subscriptions.take(subscription)

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
        request = self._requests.new("the publish", now, timeout, repeat=dedup is not None)
        request.payload = encode_publish(request.id, publish_fields(topic, key, dedup), data)
        return self._submit(request, now, queue)

    def ask(self, op: str, now: float, *, timeout: float, **fields: Any) -> Request:
        """Send a command that changes nothing (`history`, `presence`, `ping`) and may be repeated."""
        request = self._requests.new(f"`{op}`", now, timeout, repeat=True)
        request.payload = encode_command(op, id=request.id, **fields)
        return self._submit(request, now, True)

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request any more."""
        self._requests.cancel(request)

    # Events of the connection

    def received(self, payloads: list[bytes], now: float) -> None:
        """Messages have come, in this order."""
        for payload in payloads:
            if self.state not in (State.CONNECTING, State.CONNECTED):
                return
            try:
                if payload.startswith(EVENT):
                    self._subscriptions.event(payload)
                else:
                    self._message(decode_message(payload), now)
            except (ValueError, KeyError, TypeError) as error:
                self._break(NotABroker(f"not a message of the protocol: {error!r}"), now)

    def lost(self, failure: ClientError, now: float) -> None:
        """The connection could not be had, or has ended."""
        if self.state not in (State.CONNECTING, State.CONNECTED):
            return
        delay = self._reconnection.delay(failure, now)
        if delay is None:
            self._end(failure)
            return
        self.failure = failure
        self._outbox.drop_messages()
        self._renewal.stop()
        self._subscriptions.disconnected()
        self._requests.disconnected(failure)
        self._reconnect_at = now + delay
        self._change(State.WAITING, delay=delay, failure=failure)

    def renew(self, token: str | ClientError, now: float) -> None:
        """The outcome of FetchToken: a token, or why there is none."""
        if self.state is not State.CONNECTED:
            return
        if isinstance(token, ClientError):
            self._not_renewed(token, now)
            return
        request = self._requests.new("`auth`", now, float("inf"), repeat=False)
        request.payload = encode_command("auth", id=request.id, token=token)
        request.answered = lambda answer, now: self._renewal.identified(answer.get("expires_in"), now)
        request.refused = self._not_renewed
        self._submit(request, now, False)

    def tick(self, now: float) -> None:
        """Carry out everything that is due by now."""
        if self._reconnect_at is not None and self._reconnect_at <= now:
            self._connect()
        if self._renewal.is_due(now):
            self._outbox.add(FetchToken())
        self._requests.tick(now, self.failure)
        if self._subscriptions.due is not None and self._subscriptions.due <= now:
            self._subscriptions.ask_all(now)

    @property
    def deadline(self) -> float | None:
        """When `tick` is due; None: not by itself."""
        times = (self._reconnect_at, self._renewal.due, self._subscriptions.due, self._requests.deadline)
        return min((time for time in times if time is not None), default=None)

    @property
    def busy(self) -> bool:
        """Whether `take_actions` gives any action."""
        return self._outbox.busy

    def take_actions(self) -> list[Action]:
        """Give all actions, and forget them."""
        return self._outbox.take()

    # The client

    def _connect(self) -> None:
        self._reconnect_at = None
        self._reconnection.begin()
        self._change(State.CONNECTING, failure=self.failure)
        self._outbox.add(Open())

    def _break(self, failure: ClientError, now: float) -> None:
        """End a connection on which the broker broke the protocol."""
        self._outbox.add(Close(failure))
        self.lost(failure, now)

    def _end(self, failure: ClientError | None) -> None:
        """Close for good: by the application where `failure` is None."""
        had_connection = self.state in (State.CONNECTING, State.CONNECTED)
        self.failure = failure or ClientClosed("the application closed this client")
        self._reconnect_at = None
        self._renewal.stop()
        self._outbox.drop_messages()
        self._requests.fail_all(self.failure)
        self._subscriptions.finish_all(failure)
        if had_connection and failure is None:
            self._outbox.add(Close())
        self._change(State.CLOSED, failure=failure)

    def _submit(self, request: Request, now: float, queue: bool) -> Request:
        self._check_open()
        if self.state is not State.CONNECTED and not queue:
            because = "" if self.failure is None else f" ({self.failure})"
            raise NotConnected(f"there is no connection to the broker{because}")
        self._requests.submit(request, now)
        return request

    def _not_renewed(self, error: ClientError, now: float) -> None:
        self._renewal.failed(now)
        self._outbox.add(Report(error))

    def _check_open(self) -> None:
        if self.state is State.CLOSED:
            assert self.failure is not None
            raise self.failure

    def _change(self, state: State, delay: float | None = None, failure: ClientError | None = None) -> None:
        check_transition(self.state, state)
        self.state = state
        self._outbox.add(Changed(state, delay, failure))

    # Messages of the broker

    def _message(self, message: dict[str, Any], now: float) -> None:
        handler = _HANDLERS.get(message["op"])
        if handler is not None:  # other messages are of a later version of the broker
            handler(self, message, now)

    def _welcomed(self, message: dict[str, Any], now: float) -> None:
        if self.state is not State.CONNECTING:
            return
        if message["version"] != VERSION:
            found = f"the broker speaks version {message['version']} of the protocol, this client version {VERSION}"
            self._break(NotABroker(found), now)
            return
        max_size = int(message["max_size"])
        float(message["ping"])  # it must be a number
        self.welcome = message
        self.failure = None
        self._reconnection.connected(now)
        self._renewal.identified(message.get("expires_in"), now)
        self._change(State.CONNECTED)
        self._requests.connected(max_size)
        self._subscriptions.ask_all(now)
        self._requests.send_queued(now)

    def _answer(self, message: dict[str, Any], now: float) -> None:
        self._requests.answered(message, now)

    def _error(self, message: dict[str, Any], now: float) -> None:
        error = CommandRefused(
            message["code"],
            message.get("message", ""),
            retry=bool(message.get("retry")),
            retry_after_ms=message.get("retry_after_ms"),
        )
        found = self._requests.refused(message, error, now)
        if error.code == "unauthorized":
            self._renewal.unauthorized(now)
        if found:
            return
        subscription = self.subscriptions.get(message.get("topic", ""))
        if subscription is not None and error.code == "forbidden":
            self._subscriptions.finish(subscription, error)
        elif message.get("id") is None and error.code != "draining":
            # Not reported: a late answer to a call that has timed out, and what the client itself sent to a broker that
            # is shutting down.
            self._outbox.add(Report(error))

    def _gap(self, message: dict[str, Any], _now: float) -> None:
        self._subscriptions.gap(message)

    def _live(self, message: dict[str, Any], _now: float) -> None:
        self._subscriptions.live(message)

    def _member(self, message: dict[str, Any], _now: float) -> None:
        self._subscriptions.member(message)

    def _bye(self, message: dict[str, Any], _now: float) -> None:
        self._reconnection.bye(int(message["retry_after_ms"]))

    def _event(self, message: dict[str, Any], _now: float) -> None:
        """An event in another format than the broker's."""
        self._subscriptions.event(encode_command(**message))


_HANDLERS: Final[dict[str, Callable[[Machine, dict[str, Any], float], None]]] = {
    "welcome": Machine._welcomed,
    "ok": Machine._answer,
    "pong": Machine._answer,
    "error": Machine._error,
    "gap": Machine._gap,
    "live": Machine._live,
    "join": Machine._member,
    "leave": Machine._member,
    "bye": Machine._bye,
    "event": Machine._event,
}
