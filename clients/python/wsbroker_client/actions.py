"""The actions of the machine. The code around it carries them out, in the order in which they are given."""

from __future__ import annotations

from typing import Any, NamedTuple, Union

from wsbroker_client.errors import ClientError
from wsbroker_client.states import Request, State, SubscriptionCore


class Open(NamedTuple):
    """Open a connection, with a fresh token if the application gave a function; then call `received` and `lost`."""


class Send(NamedTuple):
    """Send these messages."""

    payloads: list[bytes]


class Close(NamedTuple):
    """Close the connection, with 1000 or, for `failure`, at once. `lost` need not be called for it."""

    failure: ClientError | None = None


class Changed(NamedTuple):
    """Tell the application the state. `delay` in seconds comes with WAITING; `failure` is the reason."""

    state: State
    delay: float | None = None
    failure: ClientError | None = None


class Wake(NamedTuple):
    """The subscription has a message in its inbox, was confirmed, or has ended."""

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


class Outbox:
    """Collects actions. Messages to send become one action, and a subscription is woken once."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._messages: list[bytes] = []
        self._woken: dict[SubscriptionCore, None] = {}

    def add(self, action: Action) -> None:
        """Add an action."""
        self._actions.append(action)

    def send(self, message: bytes) -> None:
        """Send a message to the broker."""
        self._messages.append(message)

    def wake(self, subscription: SubscriptionCore) -> None:
        """Wake the iterators of a subscription."""
        self._woken[subscription] = None

    def drop_messages(self) -> None:
        """Drop the messages that were not sent: the connection has ended."""
        self._messages = []

    @property
    def busy(self) -> bool:
        """Whether `take` gives anything."""
        return bool(self._messages or self._actions or self._woken)

    def take(self) -> list[Action]:
        """Give all actions, and forget them."""
        if self._messages:
            self._actions.append(Send(self._messages))
            self._messages = []
        if self._woken:
            self._actions += map(Wake, self._woken)
            self._woken = {}
        actions, self._actions = self._actions, []
        return actions
