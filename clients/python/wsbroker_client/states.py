"""The objects with a state: the client, its subscriptions, its requests. TRANSITIONS lists the allowed changes.

`move` is the only function that changes the state of a subscription or a request; `Machine._change` that of the client.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Union

from wsbroker_client.errors import ClientError, CommandRefused
from wsbroker_client.model import Decoder, Event, Gap, Join, Leave, Live, Position


class State(enum.Enum):
    """The state of a client."""

    IDLE = "idle"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    CLOSED = "closed"


class SubscriptionState(enum.Enum):
    """The state of a subscription. OFFLINE: the broker does not know it. ASKED: the broker has not answered yet."""

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


class Request:
    """A command that the broker answers. `repeat`: it may be sent again over another connection."""

    __slots__ = (
        "answered",
        "deadline",
        "id",
        "not_before",
        "payload",
        "refusals",
        "refused",
        "repeat",
        "state",
        "tag",
        "tried",
        "what",
    )

    def __init__(self, id: int, what: str, deadline: float, repeat: bool) -> None:
        self.id = id
        self.what = what
        self.state = RequestState.QUEUED
        self.deadline = deadline
        self.repeat = repeat
        self.payload = b""
        self.answered: Callable[[dict[str, Any], float], None] | None = None
        """Where the answer goes; None: to the application, as the action Finished."""
        self.refused: Callable[[CommandRefused, float], None] | None = None
        """Where an error goes; None: to the application."""
        self.not_before = 0.0
        """When it may be sent again, after an error with `retry`."""
        self.refusals = 0
        self.tried = False
        """Whether it was ever sent, maybe over an earlier connection."""
        self.tag: Any = None
        """For the caller; not read here."""


class SubscriptionCore:
    """One subscription, over all connections of the client."""

    __slots__ = (
        "confirmed",
        "decode",
        "doubt",
        "epoch",
        "error",
        "granted",
        "held",
        "inbox",
        "not_before",
        "offset",
        "options",
        "refusals",
        "replay_top",
        "start",
        "state",
        "tag",
        "topic",
        "window",
    )

    def __init__(
        self, topic: str, options: dict[str, Any], start: dict[str, Any], window: int, decode: Decoder | None
    ) -> None:
        self.topic = topic
        self.options = options
        """Fields of `subscribe` that are the same each time."""
        self.start = start
        """`since` or `last` of the application, until the replay is complete."""
        self.window = window
        """Events that may be on their way or in the inbox."""
        self.decode = decode
        self.state = SubscriptionState.OFFLINE
        self.error: ClientError | None = None
        self.epoch: str | None = None
        self.offset: int | None = None
        """The newest event that came, on a topic with history; None: not known yet."""
        self.confirmed = False
        """Whether the broker has ever answered `ok`."""
        self.replay_top = -1
        """The newest offset when the replay began; events up to it are old for other subscriptions."""
        self.not_before = 0.0
        """When it may be asked for again, after an error with `retry`."""
        self.refusals = 0
        self.granted = 0
        """Events that the broker may still send."""
        self.doubt = 0
        """Events that were counted for a more specific subscription, and that the broker may have counted for this."""
        self.held = 0
        """Events that came and were not taken."""
        self.inbox: deque[Item] = deque()
        self.tag: Any = None
        """For the caller; not read here."""

    @property
    def position(self) -> Position | None:
        """Where a new connection goes on; None: the topic keeps no history, or nothing of it is known yet."""
        return None if self.epoch is None or self.offset is None else Position(self.epoch, self.offset)

    @property
    def live(self) -> bool:
        """Whether the broker sends it new events."""
        return self.state in (SubscriptionState.LIVE, SubscriptionState.REPLAYING)


class Shares:
    """One event in several inboxes: `left` of them did not give it out yet. At 0 the credit goes back to `owner`."""

    __slots__ = ("left", "matching", "owner")

    def __init__(self, owner: SubscriptionCore, matching: Sequence[SubscriptionCore], left: int) -> None:
        self.left = left
        self.owner = owner
        self.matching = matching


class Delivery(NamedTuple):
    """An event in an inbox."""

    event: Event[Any]
    shares: Shares


Message = Union[Event[Any], Gap, Live, Join, Leave]
"""The messages that an application takes from a subscription."""
Item = Union[Delivery, Gap, Live, Join, Leave]
"""The items of an inbox."""


def move(what: Request | SubscriptionCore, state: RequestState | SubscriptionState) -> None:
    """Change the state of a request or a subscription."""
    check_transition(what.state, state)
    what.state = state


def check_transition(before: enum.Enum, after: enum.Enum) -> None:
    """Check that a transition is in the table."""
    assert after in TRANSITIONS[before], f"{before} → {after}"
