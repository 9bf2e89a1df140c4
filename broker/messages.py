"""The wire protocol, version 1: one Struct for each op, decoding and encoding.

Messages are compact JSON. A Struct's fields are in the order of the wire. A field that may be absent reads as None;
null on the wire is not absence but a value of the wrong type. The session decodes commands and encodes answers, the
command line the other way round. Nothing here knows about limits that are configured: what is too much for
this broker, and not for the protocol, the session says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias, TypeVar, get_args

import msgspec

from broker._speedups import check_json
from broker.errors import ERRORS, CommandError
from broker.overflow import OVERFLOWS, Overflow

VERSION: Final = 1
"""The version of the protocol, in `welcome` and in the name of the subprotocol."""

SUBPROTOCOL: Final = "wsbroker.v1"
"""The subprotocol that a client names in Sec-WebSocket-Protocol (RFC 6455, section 11.3.4)."""

MAX_INTEGER: Final = 2**53 - 1
"""The largest integer in the protocol: the largest that JavaScript holds exactly (Number.MAX_SAFE_INTEGER)."""

_T = TypeVar("_T")
if TYPE_CHECKING:
    Given: TypeAlias = _T | None
else:
    # For the reader of a field: absent is None. For msgspec: null is not of the type, and is refused like any other
    # value that is not.
    Given = Annotated[_T, msgspec.Meta()]

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_INTEGER)]
Last = Positive | Literal["all"]
Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)] | Annotated[str, msgspec.Meta(max_length=64)]


# Client to broker


class Subscribe(msgspec.Struct, tag_field="op", tag="subscribe", frozen=True, gc=False, omit_defaults=True):
    """Starts, or changes, the subscription to a topic or pattern."""

    topic: str
    id: Given[Id] = None
    max_queue: Given[Positive] = None
    overflow: Given[Overflow] = None
    echo: Given[bool] = None
    credit: Given[Count] = None
    since: Given[Since] = None
    last: Given[Last] = None
    presence: Given[bool] = None
    info: Given[msgspec.Raw] = None
    """JSON that others see of this member. Null is a value."""


class Since(msgspec.Struct, frozen=True, gc=False):
    """A place in a topic's history: after the event with this offset."""

    epoch: str
    offset: Count


class Unsubscribe(msgspec.Struct, tag_field="op", tag="unsubscribe", frozen=True, gc=False, omit_defaults=True):
    """Ends the subscription to a topic or pattern."""

    topic: str
    id: Given[Id] = None


class Publish(msgspec.Struct, tag_field="op", tag="publish", frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Publishes one event. `data` is the JSON value as it was sent, byte for byte."""

    id: Given[Id] = None
    topic: str
    key: Given[str] = None
    data: msgspec.Raw
    dedup: Given[Annotated[str, msgspec.Meta(max_length=64)]] = None


class Ping(msgspec.Struct, tag_field="op", tag="ping", frozen=True, gc=False, omit_defaults=True):
    """Is answered `pong`, for clients that cannot send a WebSocket ping."""

    id: Given[Id] = None


class Auth(msgspec.Struct, tag_field="op", tag="auth", frozen=True, gc=False, omit_defaults=True):
    """Identifies the connection, or renews its identity."""

    token: str
    id: Given[Id] = None


class Credit(msgspec.Struct, tag_field="op", tag="credit", frozen=True, gc=False, omit_defaults=True):
    """Lets `add` more events of a subscription come."""

    topic: str
    add: Positive
    id: Given[Id] = None


class History(msgspec.Struct, tag_field="op", tag="history", frozen=True, gc=False, omit_defaults=True):
    """Reads kept events without subscribing."""

    topic: str
    id: Given[Id] = None
    since: Given[Since] = None
    last: Given[Last] = None
    limit: Given[Positive] = None


class Presence(msgspec.Struct, tag_field="op", tag="presence", frozen=True, gc=False, omit_defaults=True):
    """Asks for the members of a topic: those behind the cursor `after`."""

    topic: str
    id: Given[Id] = None
    after: Given[str] = None
    limit: Given[Positive] = None


Command = Auth | Subscribe | Unsubscribe | Publish | Credit | History | Presence | Ping


class BadCommand(CommandError):  # noqa: N818 -- the protocol's name for it
    """A message that is no command: `bad_json` or `bad_command`. `id` is the command's, where it could be read."""

    def __init__(self, code: str, message: str, id: int | str | None = None) -> None:
        super().__init__(code, message)
        self.id = id


def decode(payload: bytes | memoryview, depth: int) -> Command:
    """Decode one message of a client, which may be nested `depth` levels deep.

    Where a field is there more than once, the last one counts. The `data` of a `Publish` is no copy.
    Raises BadCommand, in which the message names the field and what is allowed there.
    """
    try:
        check_json(payload, depth)
    except ValueError as error:
        raise BadCommand("bad_json", _locate(str(error), payload)) from None
    try:
        # msgspec takes the last of each field, but refuses every invalid duplicate and an `op` unlike the first one.
        return _COMMANDS.decode(payload)
    except msgspec.ValidationError:
        return _decode_invalid(bytes(payload))
    except msgspec.DecodeError as error:  # should check_json and msgspec ever disagree
        raise BadCommand("bad_json", str(error)) from None


def explain_json(text: bytes | memoryview) -> str:
    """Say where a text stops being JSON; where that is not found out, only that it is none."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        found = _JSON_FAULT.fullmatch(str(error))
        if found is None:
            return f"{NOT_JSON}: it ends too early"
        end = int(found[2]) - (found[1] == "trailing characters")  # of these msgspec counts from 1
        character = len(bytes(text[:end]).decode(errors="replace")) + 1
        return f"{NOT_JSON} at character {character}: {found[1]}"
    except RecursionError:
        pass
    return NOT_JSON


def _locate(message: str, text: bytes | memoryview) -> str:
    return explain_json(text) if message == NOT_JSON else message


def _decode_invalid(payload: bytes) -> Command:
    """Decode a message that msgspec has refused. The mistake may be in a duplicate field, which the protocol ignores.

    Raises BadCommand.
    """
    if not payload.lstrip(_JSON_SPACE).startswith(b"{"):
        raise BadCommand("bad_json", "a command is a JSON object")
    payload = _without_duplicates(payload)
    try:
        return _COMMANDS.decode(payload)
    except msgspec.ValidationError as error:
        raise BadCommand("bad_command", _explain(str(error)), id_of(payload)) from None


def _without_duplicates(payload: bytes) -> bytes:
    """Encode an object again with only the last one of each field. Raises msgspec.ValidationError for anything else."""
    return _encode(_FIELDS.decode(payload))


# Broker to client


class Welcome(msgspec.Struct, tag_field="op", tag="welcome", frozen=True, kw_only=True, omit_defaults=True):
    """The first message of a connection. `ping` is in seconds, `max_size` in bytes.

    `max_queue` is how many events may wait under a subscription that does not say itself how many.
    """

    version: int
    session: str
    server: str
    ping: int | float
    max_size: int
    max_queue: int
    identity: Given[str] = None
    expires_in: Given[Count] = None
    """Seconds until the identity expires."""


class Ok(msgspec.Struct, tag_field="op", tag="ok", frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a successful command: its `id` and the results."""

    id: Id
    topic: Given[str] = None
    receivers: Given[Count] = None
    queued: Given[Count] = None
    dropped: Given[Count] = None
    epoch: Given[str] = None
    offset: Given[Count] = None
    duplicate: Given[bool] = None
    recovered: Given[bool] = None
    events: Given[msgspec.Raw] = None
    members: Given[msgspec.Raw] = None
    count: Given[Count] = None
    more: Given[bool | str] = None
    """Whether kept events follow; of members the cursor of the next page, if there is one."""
    identity: Given[str] = None
    expires_in: Given[Count] = None
    """Seconds until the identity expires."""


class ErrorAnswer(msgspec.Struct, tag_field="op", tag="error", frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a command that was not carried out, with its `id` if it had one."""

    id: Given[Id] = None
    code: str
    message: str
    retry: bool
    retry_after_ms: Given[Count] = None
    topic: Given[str] = None
    """The subscription that has ended, where it was the broker that ended it."""


class EventMessage(msgspec.Struct, tag_field="op", tag="event", frozen=True, kw_only=True, omit_defaults=True):
    """An event, the same bytes for every subscriber."""

    topic: str
    key: Given[str] = None
    data: msgspec.Raw
    offset: Given[Count] = None


class Gap(msgspec.Struct, tag_field="op", tag="gap", frozen=True, kw_only=True, omit_defaults=True):
    """Events that the subscription to `topic` missed, at their place in the stream. `missed` is None where unknown."""

    topic: str
    missed: Count | None
    reason: str
    from_: Given[Count] = msgspec.field(name="from", default=None)
    to: Given[Count] = None


class Live(msgspec.Struct, tag_field="op", tag="live", frozen=True):
    """All that a subscription to `topic` had to catch up with has come; what comes now is live."""

    topic: str
    offset: Count


class Pong(msgspec.Struct, tag_field="op", tag="pong", frozen=True, omit_defaults=True):
    """The answer to `ping`."""

    id: Given[Id] = None


class Bye(msgspec.Struct, tag_field="op", tag="bye", frozen=True):
    """The broker is about to close; the client may come back after `retry_after_ms` milliseconds."""

    reason: str
    retry_after_ms: Count


class Join(msgspec.Struct, tag_field="op", tag="join", frozen=True, omit_defaults=True):
    """A client has subscribed to `topic`, or has another `identity` or `info` there."""

    topic: str
    session: str
    identity: Given[str] = None
    info: Given[msgspec.Raw] = None


class Leave(msgspec.Struct, tag_field="op", tag="leave", frozen=True, omit_defaults=True):
    """A client is no longer subscribed to `topic`."""

    topic: str
    session: str
    identity: Given[str] = None
    info: Given[msgspec.Raw] = None


ServerMessage = Welcome | Ok | ErrorAnswer | EventMessage | Gap | Live | Join | Leave | Pong | Bye


def encode_welcome(
    *,
    session: str,
    server: str,
    ping: float,
    max_size: int,
    max_queue: int,
    identity: str | None = None,
    expires_in: int | None = None,
) -> bytes:
    """Encode the first message of a connection. `ping` in seconds (0: the broker sends none), `max_size` in bytes."""
    return _encode(
        Welcome(
            version=VERSION,
            session=session,
            server=server,
            ping=int(ping) if ping == int(ping) else ping,  # 25, not 25.0
            max_size=max_size,
            max_queue=max_queue,
            identity=identity,
            expires_in=expires_in,
        )
    )


def encode_ok(id: int | str, **fields: object) -> bytes:
    """Encode the answer to a command with this `id`, followed by the results."""
    return _encode({"op": "ok", "id": id, **fields})


def encode_receipt(
    id: int | str,
    receivers: int,
    queued: int,
    dropped: int,
    epoch: str | None = None,
    offset: int | None = None,
    duplicate: bool = False,
) -> bytes:
    """Encode the answer to a publish. `epoch` and `offset` only where the topic keeps history."""
    answer: dict[str, object] = {"op": "ok", "id": id, "receivers": receivers, "queued": queued, "dropped": dropped}
    if offset is not None:
        answer |= {"epoch": epoch, "offset": offset}
    if duplicate:
        answer["duplicate"] = True
    return _encode(answer)


def encode_kept(offset: int, key: str | None, data: msgspec.Raw | bytes) -> bytes:
    """Encode an event as it stands in the answer to `history`."""
    return _encode(_KeptEvent(offset=offset, key=key, data=msgspec.Raw(data)))


def encode_history(
    id: int | str, epoch: str, offset: int, events: Sequence[bytes], more: bool, recovered: bool | None
) -> bytes:
    """Encode the answer to `history`. `events` are encoded already, by `encode_kept`."""
    answer: dict[str, object] = {"op": "ok", "id": id, "epoch": epoch, "offset": offset}
    if recovered is not None:
        answer["recovered"] = recovered
    return _encode({**answer, "events": msgspec.Raw(b"[%b]" % b",".join(events)), "more": more})


def encode_join(topic: str, session: str, identity: str | None, info: bytes | None) -> bytes:
    """Encode that a session is a member of a topic. `info` is one JSON value."""
    return _encode(Join(topic=topic, session=session, identity=identity, info=_raw(info)))


def encode_leave(topic: str, session: str, identity: str | None, info: bytes | None) -> bytes:
    """Encode that a session is no member of a topic any more."""
    return _encode(Leave(topic=topic, session=session, identity=identity, info=_raw(info)))


def encode_member(session: str, identity: str | None, info: bytes | None) -> bytes:
    """Encode a member as it stands in the answer to `presence`."""
    return _encode(_Member(session=session, identity=identity, info=_raw(info)))


def encode_members(id: int | str, topic: str, members: Sequence[bytes], count: int, more: str | None) -> bytes:
    """Encode the answer to `presence`. `members` are encoded already; `more` is the cursor of the next page."""
    answer: dict[str, object] = {"op": "ok", "id": id, "topic": topic}
    answer |= {"members": msgspec.Raw(b"[%b]" % b",".join(members)), "count": count}
    return _encode(answer if more is None else {**answer, "more": more})


def encode_live(topic: str, offset: int) -> bytes:
    """Encode that all up to `offset` has been sent to a subscription that recovers."""
    return _encode(Live(topic=topic, offset=offset))


def encode_error(
    id: int | str | None, code: str, message: str, retry_after_ms: int | None = None, topic: str | None = None
) -> bytes:
    """Encode the answer to a command that is not carried out. `code` must be in `ERRORS`, which knows `retry`."""
    return _encode(
        ErrorAnswer(
            id=id,
            code=code,
            message=message,
            retry=ERRORS[code].retry,
            retry_after_ms=retry_after_ms,
            topic=topic,
        )
    )


def encode_event(
    topic: str, data: msgspec.Raw | bytes | memoryview, key: str | None = None, offset: int | None = None
) -> bytes:
    """Encode an event. `data` is one JSON value and goes out as it is."""
    return _encode(EventMessage(topic=topic, key=key, data=msgspec.Raw(data), offset=offset))


def encode_gap(topic: str, missed: int | None, reason: str, from_: int | None = None, to: int | None = None) -> bytes:
    """Encode a gap of the subscription to `topic` (as subscribed): the number of events, or None if it is unknown."""
    return _encode(Gap(topic=topic, missed=missed, reason=reason, from_=from_, to=to))


def encode_pong(id: int | str | None) -> bytes:
    """Encode the answer to `ping`."""
    return _encode(Pong(id=id))


def encode_bye(reason: str, retry_after_ms: int) -> bytes:
    """Encode the last message before the broker closes; the client is to stay away for so many milliseconds."""
    return _encode(Bye(reason=reason, retry_after_ms=retry_after_ms))


def encode_command(command: Command) -> bytes:
    """Encode a command, for clients."""
    return _encode(command)


def decode_server(payload: bytes | memoryview | str) -> ServerMessage | None:
    """Decode one message of the broker, for clients. None means an op that this version does not know, to be ignored.

    Raises ValueError for anything that a broker does not send.
    """
    try:
        return _ANSWERS.decode(payload)
    except msgspec.ValidationError as error:
        if str(error).startswith("Invalid value") and _path_of(str(error)) == "op":
            return None
        raise ValueError(f"not a message of the protocol: {error}") from None


# Details


class _KeptEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    offset: int
    key: str | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Member(msgspec.Struct, frozen=True, omit_defaults=True):
    session: str
    identity: str | None = None
    info: msgspec.Raw | None = None


def _raw(value: bytes | None) -> msgspec.Raw | None:
    return None if value is None else msgspec.Raw(value)


_encode = msgspec.json.Encoder().encode
_COMMANDS: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANSWERS: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)

NOT_JSON: Final = "not valid JSON"
"""What the native code says of a text that breaks the grammar, without the place."""
_JSON_FAULT: Final = re.compile(r"JSON is malformed: (.+) \(byte (\d+)\)")
"""What msgspec says of it."""
_JSON_SPACE = b" \t\n\r"

_ALLOWED: Final[dict[str, str]] = {
    "op": f"one of {', '.join(str(kind.__struct_config__.tag) for kind in get_args(Command))}",
    "id": "an integer from 0 to 2^53-1 or a string of up to 64 characters",
    "topic": "a string",
    "data": "a JSON value",
    "key": "a string",
    "dedup": "a string of up to 64 characters",
    "token": "a string",
    "max_queue": "an integer from 1 to 2^53-1",
    "overflow": f"one of {', '.join(OVERFLOWS)}",
    "echo": "true or false",
    "presence": "true or false",
    "credit": "an integer from 0 to 2^53-1",
    "add": "an integer from 1 to 2^53-1",
    "last": 'an integer from 1 to 2^53-1 or "all"',
    "limit": "an integer from 1 to 2^53-1",
    "after": "a string",
    "info": "a JSON value",
    "since": "an object with `epoch` and `offset`",
    "since.epoch": "a string",
    "since.offset": "an integer from 0 to 2^53-1",
}
"""The allowed values of each field of a command, in the words of the protocol."""

# The error messages of msgspec. A test checks them for every field, so a change in msgspec is noticed.
_MISSING = re.compile(r"missing required field `(\w+)`")
_GOT = re.compile(r", got `(\w+)`")
_PATH = re.compile(r" - at `\$\.([\w.]+)`$")

_JSON_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
}


class _WithId(msgspec.Struct):
    id: Given[Id] = None


_IDS = msgspec.json.Decoder(_WithId)


def id_of(payload: bytes) -> int | str | None:
    """Read the `id` of a command of which something else is wrong, so that the error can be told apart by it."""
    try:
        return _IDS.decode(payload).id
    except ValueError:
        return None


def _explain(wrong: str) -> str:
    """Say in the words of the protocol what msgspec found wrong."""
    path = _path_of(wrong)
    allowed = _ALLOWED.get(path)
    if allowed is None:  # cannot happen as long as the table has every field, and would still be understood
        return wrong[:200].replace("$.", "")
    if _MISSING.search(wrong):
        return f"`{path}` is missing: it must be {allowed}"
    got = _GOT.search(wrong)
    return f"`{path}` must be {allowed}" + (f", not {_JSON_TYPES.get(got[1], got[1])}" if got else "")


def _path_of(wrong: str) -> str:
    """Find the name of the field, with dots where it is inside another one."""
    at, missing = _PATH.search(wrong), _MISSING.search(wrong)
    return ".".join(part[1] for part in (at, missing) if part)
