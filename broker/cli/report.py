"""What commands write: results to standard output, mistakes to standard error, and the exit status."""

from __future__ import annotations

import enum
import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, Self

import click

if TYPE_CHECKING:
    from broker.errors import CommandError, ConfigError
    from wsbroker_client import ClientError, CommandRefused

EXTENSION: Final = "broker._speedups"


class Status(enum.IntEnum):
    """The exit statuses. From 64 on those of sysexits.h, from 128 on what a shell gives for a signal (128 + number)."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "everything was done"
    INCOMPLETE = 1, "some lines were not published, each was reported; or, from `serve`, it could not start"
    USAGE = 2, "the command line is wrong"
    BAD_DATA = os.EX_DATAERR, "the data is not JSON, too large, or the broker does not accept the topic or the command"
    NO_INPUT = os.EX_NOINPUT, "standard input cannot be read"
    UNAVAILABLE = os.EX_UNAVAILABLE, "no broker can be reached there, or it refused or ended the connection"
    FAULT = os.EX_SOFTWARE, "the extension `broker._speedups` is missing"
    NO_OUTPUT = os.EX_IOERR, "standard output cannot be written"
    TRY_AGAIN = (
        os.EX_TEMPFAIL,
        "the broker cannot do it now, or ended the connection for a while: the same may work later",
    )
    NOT_A_BROKER = os.EX_PROTOCOL, "what answers there is not a wsbroker, or one of another version"
    NO_PERMISSION = (
        os.EX_NOPERM,
        "the token is missing, not valid or does not allow it; or an operator ended the connection",
    )
    BAD_CONFIG = os.EX_CONFIG, "the configuration has mistakes, each was reported"
    INTERRUPTED = 128 + signal.SIGINT, "Ctrl-C, or SIGINT; the connection was closed properly"
    BROKEN_PIPE = 128 + signal.SIGPIPE, "whoever read the output has closed it; the connection was closed properly"
    TERMINATED = 128 + signal.SIGTERM, "SIGTERM; the connection was closed properly"


class Report:
    """Says on standard error what went wrong, as a line of text or as a JSON object a line."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def error(self, error: str, message: str, **details: object) -> None:
        """Say one thing: `error` is a word for programs, `message` for people; details that are None are left out."""
        if self.as_json:
            given = {name: value for name, value in details.items() if value is not None}
            text = to_json({"error": error, "message": message, **given})
        else:
            # Some of it comes from the other side, and must not command the terminal.
            text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in f"wsbroker: {message}")
        click.echo(text.encode("utf-8", "replace"), err=True)

    def command_error(self, error: CommandError | CommandRefused, line: int | None = None) -> int:
        """Say why a command was not carried out, and return the status that a program ends with for it alone."""
        message = f"line {line}: {error}" if line is not None and not self.as_json else str(error)
        if self.as_json:
            message = error.message
        self.error(error.code, message, retry=error.retry, retry_after_ms=error.retry_after_ms, line=line)
        if error.retry:
            return Status.TRY_AGAIN
        return Status.NO_PERMISSION if error.code in ("unauthorized", "forbidden") else Status.BAD_DATA

    def config_error(self, error: ConfigError) -> int:
        """Say every mistake in the configuration, and return the status of a program that fails for it."""
        for problem in error.problems:
            self.error("config", problem.message if self.as_json else str(problem), **problem.fields())
        return Status.BAD_CONFIG

    def failure(self, failure: ClientError) -> int:
        """Say why there is no connection, or no longer, and return the status that the program ends with."""
        from broker.errors import CloseCode
        from wsbroker_client import Closed, LoadFailed, NotABroker, Refused

        error, status, details = "unreachable", Status.UNAVAILABLE, {}
        if isinstance(failure, NotABroker):
            error, status = "not_a_broker", Status.NOT_A_BROKER
        elif isinstance(failure, LoadFailed):
            error = "load"
        elif isinstance(failure, Refused):
            error, details = "refused", {"status": failure.status, "retry_after": failure.retry_after}
            status = Status.NO_PERMISSION if failure.status in (401, 403) else status
        elif isinstance(failure, Closed):
            error, details = "closed", {"code": failure.close_code, "retry_after_ms": failure.retry_after_ms}
            if failure.close_code in (CloseCode.UNAUTHORIZED, CloseCode.EXPIRED, CloseCode.DISCONNECTED):
                status = Status.NO_PERMISSION
        if failure.retry:
            status = Status.TRY_AGAIN
        self.error(error, str(failure), retry=failure.retry, **details)
        return status


def to_json(value: Any, *, indent: bool = False) -> str:
    """Write a value as JSON. In text that is not UTF-8, such as a file name, each invalid byte becomes `?`."""
    import orjson

    option = orjson.OPT_INDENT_2 if indent else 0
    try:
        return orjson.dumps(value, option=option).decode()
    except TypeError:
        clean = {
            name: part.encode("utf-8", "replace").decode() if isinstance(part, str) else part
            for name, part in value.items()
        }
        return orjson.dumps(clean, option=option).decode()


def print_text(text: str, as_json: bool = False) -> int:
    """Write to standard output, at once. Returns the exit status; an error is reported."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is still in Python's buffer would be written at exit, and fail again, aloud.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return Status.BROKEN_PIPE
        Report(as_json).error("no_output", f"cannot write: {error.strerror}")
        return Status.NO_OUTPUT
    return Status.OK
