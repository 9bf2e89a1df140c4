"""The values that the application gets: events, gaps, receipts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

import orjson

from wsbroker_client.errors import InvalidEvent

T = TypeVar("T")

Decoder = Callable[[bytes], Any]
"""Decodes the data of an event. Raises ValueError for data that does not fit."""


class Gap(NamedTuple):
    """Events that a subscription missed, at their place in the stream.

    `topic` is that of this subscription, or of a more specific one of the same client, under which the broker sends the
    events of both. `missed` is None if the number is not known. `start` and `stop` are the first and last offset.
    `reason` is the broker's word, or one of this library:

    - `disconnected`: the connection was lost, and the topic keeps no history.
    - `unsubscribed`: the more specific subscription has ended, and with it the events that the broker had queued for
      both.
    - `overlap`: a more specific subscription has begun with a replay. Events that were queued for this one at that
      moment cannot be told from the replay.
    """

    topic: str
    missed: int | None
    reason: str
    start: int | None = None
    stop: int | None = None


class Live(NamedTuple):
    """The replay that `since` or `last` asked for is complete."""

    topic: str
    offset: int | None


class Join(NamedTuple):
    """A client has subscribed to the topic."""

    topic: str
    session: str
    identity: str | None
    info: Any


class Leave(NamedTuple):
    """A client is no longer subscribed to the topic."""

    topic: str
    session: str
    identity: str | None
    info: Any


class Member(NamedTuple):
    """A member of a topic, from `presence`."""

    session: str
    identity: str | None
    info: Any


class Position(NamedTuple):
    """A place in a topic's history: after the event with this offset. It can be kept, and given as `since`."""

    epoch: str
    offset: int


class Receipt(NamedTuple):
    """The answer of the broker to a publish. `epoch` and `offset` are set on topics with history."""

    receivers: int
    queued: int
    dropped: int
    epoch: str | None = None
    offset: int | None = None
    duplicate: bool = False


def receipt_of(answer: dict[str, Any]) -> Receipt:
    """Make the receipt from the `ok` of a publish."""
    return Receipt(
        answer.get("receivers", 0),
        answer.get("queued", 0),
        answer.get("dropped", 0),
        answer.get("epoch"),
        answer.get("offset"),
        bool(answer.get("duplicate")),
    )


class Event(Generic[T]):
    """An event. `raw` is the JSON of its data as it was published; `data` is decoded from it on first use.

    `gaps` are the gaps that stand directly before this event.
    """

    __slots__ = ("_data", "_decode", "gaps", "key", "offset", "raw", "topic")

    def __init__(
        self, topic: str, key: str | None, raw: bytes, offset: int | None = None, decode: Decoder | None = None
    ) -> None:
        self.topic = topic
        self.key = key
        self.raw = raw
        self.offset = offset
        self.gaps: tuple[Gap, ...] = ()
        self._decode = decode
        self._data: Any = _ABSENT

    @property
    def data(self) -> T:
        """The data. Raises InvalidEvent, each time, if it does not fit the type that the subscription asked for."""
        if self._data is _ABSENT:
            try:
                self._data = (self._decode or orjson.loads)(self.raw)
            except ValueError as error:
                raise InvalidEvent(f"an event of {self.topic} does not fit: {error}") from error
        return self._data  # type: ignore[no-any-return]  # a decoder may return any type

    def __repr__(self) -> str:
        return f"Event(topic={self.topic!r}, key={self.key!r}, offset={self.offset!r}, raw={self.raw!r})"


_ABSENT: Final = object()


def decoder_for(kind: Any) -> Decoder | None:
    """Make the decoder for `subscribe(..., type=kind)`: a pydantic model, or a type that msgspec knows; None: any JSON.

    Raises TypeError where neither library is installed that could.
    """
    if kind is None:
        return None
    validate = getattr(kind, "model_validate_json", None)
    if validate is not None:
        return validate  # type: ignore[no-any-return]  # pydantic's ValidationError is a ValueError
    try:
        import msgspec
    except ImportError:
        raise TypeError("`type` needs msgspec, or a pydantic model: pip install wsbroker-client[types]") from None
    decode: Decoder = msgspec.json.Decoder(kind).decode  # its ValidationError is a ValueError
    return decode
