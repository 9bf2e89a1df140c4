"""The wire protocol, version 1: commands to bytes, bytes to messages. Knows no connection and no state.

`data` of an event stays as the bytes that the publisher sent, and is decoded when the application asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import orjson

VERSION: Final = 1
"""The version of the protocol, in `welcome` and in the name of the subprotocol."""

SUBPROTOCOL: Final = "wsbroker.v1"

DEFAULT_URL: Final = "ws://127.0.0.1:8765"
"""Where a broker without any configuration listens."""

PAGE: Final = 1000
"""The most events or members that the broker gives in one answer."""

EVENT: Final = b'{"op":"event",'
"""How the broker begins an event. Other messages are decoded as a whole."""

OK: Final = b'{"op":"ok","id":'
"""How the broker begins the answer to a command that was carried out."""

Default = Callable[[Any], Any]
"""Called for a value that orjson cannot serialise."""


class RawEvent(NamedTuple):
    """An event as it came: `data` is the bytes of one JSON value."""

    topic: str
    key: str | None
    data: bytes
    offset: int | None


def encode_command(op: str, **fields: Any) -> bytes:
    """Encode a command. Fields that are None are left out."""
    return orjson.dumps({"op": op, **{name: value for name, value in fields.items() if value is not None}})


def encode_data(data: Any, default: Default | None = None) -> bytes:
    """Encode the data of an event: all that orjson serialises, numpy arrays too. Raises TypeError for anything else."""
    return orjson.dumps(data, default=default, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_publish(id: int, fields: bytes, data: bytes) -> bytes:
    """Put a publish together from parts that are JSON already: `fields` is from `publish_fields`."""
    return b'{"op":"publish","id":%d%b%b}' % (id, fields, data)


def encode_publish_head(topic: str, key: str | None) -> bytes:
    """Encode many publishes to one topic: a format that takes the id and the JSON of the data."""
    fields = publish_fields(topic, key).replace(b"%", b"%%")
    return b'{"op":"publish","id":%d' + fields + b"%b}"


def publish_fields(topic: str, key: str | None = None, dedup: str | None = None) -> bytes:
    """Encode the fields between the id and the data of a publish."""
    fields = b',"topic":' + orjson.dumps(topic)
    if key is not None:
        fields += b',"key":' + orjson.dumps(key)
    if dedup is not None:
        fields += b',"dedup":' + orjson.dumps(dedup)
    return fields + b',"data":'


def decode_message(payload: bytes) -> dict[str, Any]:
    """Decode a message of the broker. Raises ValueError if it is not a JSON object with an `op`."""
    message = orjson.loads(payload)
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ValueError("not a message of the protocol: a JSON object with an `op` was expected")
    return message


def decode_event(payload: bytes) -> RawEvent:
    """Decode an event; its data is cut out and not decoded. Raises ValueError for a message that is not an event."""
    head = _HEAD.match(payload)
    if head is None or payload[-1:] != b"}":
        return _decode_event_slowly(payload)
    topic, key, offset = head.groups()
    end = len(payload) - 1
    tail = _TAIL.search(payload, max(head.end(), end - _MAX_TAIL))
    if tail is not None:
        end, offset = tail.start(), tail[1]
    return RawEvent(
        topic.decode(),
        None if key is None else key.decode(),
        payload[head.end() : end],
        None if offset is None else int(offset),
    )


# What the broker writes. Names with an escape are rare, and take the slow way.
_HEAD: Final = re.compile(
    rb'\{"op":"event","topic":"([^"\\]*)",(?:"key":"([^"\\]*)",)?(?:"offset":([0-9]{1,16}),)?"data":'
)
# A number before the last brace is a field of the event: the data, where it is an object, has a brace of its own.
_TAIL: Final = re.compile(rb',"offset":([0-9]{1,16})\}\Z')
_MAX_TAIL: Final = 40


def _decode_event_slowly(payload: bytes) -> RawEvent:
    message = decode_message(payload)
    topic, key, offset = message.get("topic"), message.get("key"), message.get("offset")
    if message["op"] != "event" or not isinstance(topic, str) or "data" not in message:
        raise ValueError("not an event of the protocol")
    return RawEvent(topic, key, orjson.dumps(message["data"]), offset)


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription to `pattern` gets the events of `topic`: `*` is one token, `>` at the end one or more."""
    if topic.startswith("$") and not pattern.startswith("$"):
        return False
    wanted, tokens = pattern.split("."), topic.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
    elif len(tokens) != len(wanted):
        return False
    return all(want in ("*", token) for want, token in zip(wanted, tokens))


def overlap(one: str, other: str) -> bool:
    """Whether some topic is matched by both topics or patterns."""
    if (one.startswith("$") and other[0] in "*>") or (other.startswith("$") and one[0] in "*>"):
        return False
    left, right = one.split("."), other.split(".")
    for mine, theirs in zip(left, right):
        if ">" in (mine, theirs):
            return True
        if mine != theirs and "*" not in (mine, theirs):
            return False
    return len(left) == len(right)


def rank(pattern: str) -> tuple[int, ...]:
    """Give the sort key that puts the most specific pattern first: a name before `*` before `>`."""
    return tuple({"*": 1, ">": 2}.get(token, 0) for token in pattern.split("."))


def is_pattern(topic: str) -> bool:
    """Whether it may match more than the one topic of that name."""
    return "*" in topic or ">" in topic
