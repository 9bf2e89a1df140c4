"""Why a client has no connection, or no longer: one exception for each thing that a program may want to tell apart.

What the broker answers to a single command is not a failure of the connection: see CommandRefused, the last one.
"""

from __future__ import annotations

from broker.errors import CommandError
from broker.messages import ErrorAnswer


class ClientError(Exception):
    """The connection to the broker could not be had, or ended. Its text is one line for people."""

    retry = False
    """Whether the same may work a little later, as far as the broker says."""


class Unreachable(ClientError):  # noqa: N818 -- these read as what happened: `except Closed`
    """Nobody answers at the address: no such host, connection refused, no trusted certificate, no answer in time."""


class Refused(ClientError):  # noqa: N818
    """The broker answered in HTTP instead of opening a WebSocket. `retry_after` is in seconds, where it was given."""

    def __init__(self, message: str, *, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        # RFC 9110, section 15.6.4: 503 is for what will be alleviated after some delay; and so is 429 (RFC 6585).
        self.retry = status in (429, 503)


class NotABroker(ClientError):  # noqa: N818
    """Somebody answers at the address, but does not speak this protocol in a version that is understood here."""


class Closed(ClientError):  # noqa: N818
    """The connection has ended: the broker closed it, or the network did, or this client has left.

    `code` is the one of the close frame (RFC 6455, section 7.4), 1006 where there was none. `retry_after_ms` is in
    milliseconds, from the `bye` before it, where there was one.
    """

    def __init__(self, message: str, *, code: int, retry: bool, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry = retry
        self.retry_after_ms = retry_after_ms


class LoadFailed(ClientError):  # noqa: N818
    """A load (`wsbroker bench`) could not be kept up: events were lost or late, or its program failed."""


class CommandRefused(CommandError):  # noqa: N818
    """The broker answered a command with an `error`. Its code may be one that this version does not know."""

    def __init__(self, answer: ErrorAnswer) -> None:
        Exception.__init__(self, f"{answer.code}: {answer.message}")
        self.code = answer.code
        self.message = answer.message
        self.retry = answer.retry
        self.retry_after_ms = answer.retry_after_ms
