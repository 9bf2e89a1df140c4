"""What may go wrong, as the client sees it: one table of error codes, one of close codes, one of HTTP refusals.

A code is written out here, and elsewhere only to name a row. The tables are also the source of the documentation: a
test fails when `docs/protocol.md` lacks a row.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Self

import msgspec


class Error(msgspec.Struct, frozen=True):
    """A row of the table of error codes."""

    code: str
    """The word on the wire, `code` of an `error`."""
    retry: bool
    """Whether the same command may succeed later."""
    meaning: str
    """When a client gets it."""


class CommandError(Exception):
    """A command that is not carried out. It becomes one `error` to the client, and the connection stays open.

    `code` must be in `ERRORS` (else KeyError: a mistake in the broker). `message` is for people and says what was wrong
    in the words of the protocol. `retry_after_ms` (milliseconds) goes with `rate_limited`.
    """

    def __init__(self, code: str, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry = ERRORS[code].retry
        self.retry_after_ms = retry_after_ms


class Place(msgspec.Struct, frozen=True):
    """Where a value of the configuration comes from: a file, an environment variable or a flag; else the defaults."""

    file: str = ""
    line: int | None = None
    column: int | None = None
    variable: str = ""
    flag: str = ""

    def __str__(self) -> str:
        if self.file:
            return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return self.variable or self.flag or "default"


class Problem(msgspec.Struct, frozen=True):
    """A mistake in the configuration."""

    message: str
    """What is wrong, and what to write."""
    key: str = ""
    """The setting, like `limits.max_size` or `topics[1].match`; empty if it is none."""
    place: Place | None = None
    """Where its value comes from; None: not known."""

    def __str__(self) -> str:
        where = "" if self.place is None else str(self.place)
        text = f"{self.key} ({where})" if self.key and where else self.key or where
        line = f"{text}: {self.message}" if text else self.message
        return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)

    def fields(self) -> dict[str, object]:
        """Give the key and the place for programs; what is not known is None."""
        place = self.place or Place()
        return {name: value or None for name, value in {"key": self.key, **msgspec.structs.asdict(place)}.items()}


class ConfigError(Exception):
    """A configuration that the broker does not start with. `problems` holds every mistake that was found.

    A text stands for a problem without a key or a place.
    """

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = [Problem(each) if isinstance(each, str) else each for each in problems]
        super().__init__("\n".join(map(str, self.problems)))


class CloseCode(enum.IntEnum):
    """Why the broker closes a connection: RFC 6455, section 7.4.1, and the range 4000 to 4999 for the broker's own.

    `reason` is the text in the close frame, `meaning` explains it, `reconnect` says whether a client should come back.
    """

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    NORMAL = 1000, "the client closed the connection"
    GOING_AWAY = 1001, "the broker shuts down; a `bye` came before"
    PROTOCOL_ERROR = 1002, "a frame that breaks the rules of RFC 6455"
    INVALID_DATA = 1007, "text that is not UTF-8, or compressed data that cannot be decompressed"
    TOO_BIG = 1009, "a message over `max_size`, or in too many fragments"
    INTERNAL = 1011, "an error in the broker"
    TRY_AGAIN = 1013, "the broker cannot serve this connection now"
    SLOW_CONSUMER = 4000, "a subscription with the policy `close` or `block` fell too far behind"
    PING_TIMEOUT = 4001, "the client answered no ping in time"
    RATE_LIMITED = 4002, "the client kept sending too fast after the error `rate_limited`"
    NOT_READING = 4003, "the client sends commands and does not read the answers"
    UNAUTHORIZED = 4500, "the client sent no valid token in time"
    EXPIRED = 4501, "the identity expired and was not renewed"
    BAD_COMMANDS = 4502, "ten commands in a row could not be understood"
    DISCONNECTED = 4503, "an operator ended the connection"

    @property
    def reason(self) -> str:
        """The name on the wire, which is the text of the close frame."""
        return self.name.lower()

    @property
    def reconnect(self) -> bool:
        """Whether a client should come back, after a pause that grows with each attempt.

        The broker's own codes say it by their range. Of RFC 6455's those say yes for which the client is not to blame.
        """
        return 4000 <= self < 4500 or self in (1001, 1011, 1013)


CLOSE_REASONS = {int(code): code.reason for code in CloseCode}
"""The text of the close frame for each code, for the data path."""


class Refusal(msgspec.Struct, frozen=True):
    """An HTTP answer in place of the upgrade to a WebSocket."""

    status: int
    name: str
    """The reason phrase of the status line."""
    meaning: str
    """When a client gets it."""


BAD_COMMANDS_IN_A_ROW = 10
"""So many `bad_json` and `bad_command` in a row close a connection with `CloseCode.BAD_COMMANDS`."""

ERRORS: dict[str, Error] = {
    error.code: error
    for error in (
        Error("bad_json", False, "not JSON, not an object, or nested too deeply"),
        Error("bad_command", False, "no or unknown `op`, a field missing, of the wrong type or out of range"),
        Error("bad_topic", False, "the topic or pattern breaks the rules for names"),
        Error("unauthorized", False, "no valid identity yet, or it has expired"),
        Error("forbidden", False, "the identity may not do this on this topic"),
        Error("not_subscribed", False, "`unsubscribe` or `credit` without a subscription"),
        Error("no_history", False, "the topic keeps no history"),
        Error("no_presence", False, "the topic has no presence"),
        Error("limit", False, "too many subscriptions, or a value over the broker's limit"),
        Error("rate_limited", True, "too much in too short a time; `retry_after_ms` says how long to wait"),
        Error("unavailable", True, "the engine, or the service that knows who clients are, does not answer"),
        Error("draining", True, "the broker is shutting down"),
        Error("internal", True, "an error in the broker; the log shows it with the session id"),
    )
}

REFUSALS: dict[int, Refusal] = {
    refusal.status: refusal
    for refusal in (
        Refusal(
            400, "Bad Request", "the request is malformed, or offers only subprotocols that the broker does not know"
        ),
        Refusal(401, "Unauthorized", "the token is not valid"),
        Refusal(403, "Forbidden", "a page of this origin may not connect"),
        Refusal(404, "Not Found", "there is nothing at this path"),
        Refusal(
            426,
            "Upgrade Required",
            "the path is for WebSockets, and the request is not a WebSocket handshake of version 13",
        ),
        Refusal(
            429,
            "Too Many Requests",
            "the client's address or identity has too many connections; `Retry-After` says after how many seconds to "
            "try again",
        ),
        Refusal(431, "Request Header Fields Too Large", "the head of the request is too long or has too many lines"),
        Refusal(
            503,
            "Service Unavailable",
            "the broker is full or shuts down, or nobody can tell who the client is; `Retry-After` says after how many "
            "seconds to try again",
        ),
    )
}
