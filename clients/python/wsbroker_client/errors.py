"""One exception for each way to fail. All are a `ClientError`, with a `code` for programs and `retry`.

A failure of the connection ends the client only if it is permanent (`reconnection.is_permanent`). Otherwise it is the
reason of the state `waiting`. The tables at the end are those of the protocol.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class ClientError(Exception):
    """Anything that fails in this library. Its text is one line for people."""

    code: str = "client"
    """A word for programs. For `CommandRefused` it is the broker's own."""
    retry: bool = False
    """Whether the same may work a little later, as far as the broker says."""


class Unreachable(ClientError):
    """Nobody answers at the address: no such host, connection refused, no trusted certificate, no answer in time."""

    code = "unreachable"


class Refused(ClientError):
    """The broker answered in HTTP instead of opening a WebSocket. `retry_after` is in seconds, where it was given."""

    code = "refused"

    def __init__(self, message: str, *, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        # RFC 9110, section 15.6.4: 503 says that the state is temporary, as 429 does (RFC 6585).
        self.retry = status in (429, 503)


class NotABroker(ClientError):
    """A program answers at the address, but does not speak this protocol, or another version of it."""

    code = "not_a_broker"


class Closed(ClientError):
    """The connection has ended: the broker closed it, or the network did, or this client has left.

    `close_code` is the one of the close frame (RFC 6455, section 7.4), 1006 where there was none. `retry_after_ms` is
    in milliseconds, from the `bye` before it, where there was one.
    """

    code = "closed"

    def __init__(self, message: str, *, close_code: int, retry: bool, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.close_code = close_code
        self.retry = retry
        self.retry_after_ms = retry_after_ms


class TokenFailed(ClientError):
    """The application's token function raised an exception, which is the `__cause__`."""

    code = "token"
    retry = True


class CommandRefused(ClientError):
    """The broker answered a command with an `error`. Its code may be one that this version does not know.

    `retry_after_ms` is in milliseconds, where the broker gave it.
    """

    def __init__(self, code: str, message: str, *, retry: bool = False, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after_ms = retry_after_ms


class ConnectionLost(ClientError):
    """The connection ended while a command was under way. Whether the broker carried it out is not known."""

    code = "connection_lost"
    retry = True


class NotConnected(ClientError):
    """There is no connection, and the call did not want to wait for one (`queue=False`). Nothing was sent."""

    code = "not_connected"
    retry = True


class TimedOut(ClientError):
    """No answer came in time. `sent` says whether the command was sent, so that it may have been carried out."""

    code = "timeout"
    retry = True

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ClientClosed(ClientError):
    """The application closed this client."""

    code = "client_closed"


class AlreadySubscribed(ClientError):
    """This client has a subscription to that topic or pattern. One connection has one subscription to each."""

    code = "already_subscribed"


class InvalidEvent(ClientError):
    """The data of an event does not fit the type that the subscription was made with."""

    code = "invalid_event"


class LoadFailed(ClientError):
    """A load (`wsbroker bench`) could not be kept up: events were lost or late, or its program failed."""

    code = "load"


class CloseCode(NamedTuple):
    """A close code of the broker: the text of its close frame, when it is sent, whether to come back."""

    name: str
    meaning: str
    reconnect: bool


CLOSE_CODES: Final = {
    1000: CloseCode("normal", "the client closed the connection", False),
    1001: CloseCode("going_away", "the broker shuts down; a `bye` came before", True),
    1002: CloseCode("protocol_error", "a frame that breaks the rules of RFC 6455", False),
    1007: CloseCode("invalid_data", "text that is not UTF-8, or compressed data that cannot be decompressed", False),
    1009: CloseCode("too_big", "a message over `max_size`, or in too many fragments", False),
    1011: CloseCode("internal", "an error in the broker", True),
    1013: CloseCode("try_again", "the broker cannot serve this connection now", True),
    4000: CloseCode("slow_consumer", "a subscription with the policy `close` or `block` fell too far behind", True),
    4001: CloseCode("ping_timeout", "the client answered no ping in time", True),
    4002: CloseCode("rate_limited", "the client kept sending too fast after the error `rate_limited`", True),
    4003: CloseCode("not_reading", "the client sends commands and does not read the answers", True),
    4500: CloseCode("unauthorized", "the client sent no valid token in time", False),
    4501: CloseCode("expired", "the identity expired and was not renewed", False),
    4502: CloseCode("bad_commands", "ten commands in a row could not be understood", False),
    4503: CloseCode("disconnected", "an operator ended the connection", False),
}

REFUSALS: Final = {
    400: "the request is malformed, or offers only subprotocols that the broker does not know",
    401: "the token is not valid",
    403: "a page of this origin may not connect",
    404: "there is nothing at this path",
    426: "the path is for WebSockets, and the request is not a WebSocket handshake of version 13",
    429: "the client's address or identity has too many connections; `Retry-After` says after how many seconds to try "
    "again",
    431: "the head of the request is too long or has too many lines",
    503: "the broker is full or shuts down, or nobody can tell who the client is; `Retry-After` says after how many "
    "seconds to try again",
}
"""When the broker answers with which HTTP status instead of opening a WebSocket."""
