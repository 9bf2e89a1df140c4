"""`pub` and `sub`, apart from the command line around them: each is a coroutine that uses standard input or output.

All of them take `url`, `token` or None and `ca` or None, as `connect` does. They raise ClientError where there is no
connection or no longer, and CommandError where the broker does not do what the whole command is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from broker.cli.pipe import Lines, Output
from broker.errors import CommandError
from broker.messages import (
    NOT_JSON,
    Credit,
    EventMessage,
    Ok,
    Publish,
    decode,
    decode_server,
    encode_command,
    explain_json,
)
from broker.overflow import Overflow
from broker.topics import matches, rank
from wsbroker_client.connection import Connection, connect
from wsbroker_client.errors import ClientError, CommandRefused
from wsbroker_client.publisher import Publisher
from wsbroker_client.wire import PAGE

Failed = Callable[[CommandError | CommandRefused, int | None], object]
"""Called for a line that is not published, with its number, or None where the broker did not say which one it was."""


class InputFailed(Exception):  # noqa: N818 -- as the failures of the connection
    """Standard input cannot be read."""


class OutputFailed(Exception):  # noqa: N818
    """Standard output cannot be written, for another reason than that nobody reads it (BrokenPipeError)."""


async def publish_one(
    topic: str, value: bytes, *, key: str | None, url: str, token: str | None, ca: Path | None
) -> bool:
    """Publish one event, whose data is this JSON value, and wait for the answer. Returns True."""
    async with connect(url, token=token, ca=ca) as connection:
        await connection.publish_raw(topic, value, key=key)
    return True


async def publish_lines(
    topic: str, *, text: bool, key: str | None, url: str, token: str | None, ca: Path | None, failed: Failed
) -> bool:
    """Publish each line of standard input, a JSON value or with `text` a string, and wait for the answers.

    Blank lines are passed over where JSON is expected. Returns whether all lines were published. Raises InputFailed.
    """
    failures = 0

    def report_failure(line: int | None, error: CommandError | CommandRefused) -> None:
        nonlocal failures
        failures += 1
        failed(error, line)

    def values(batch: list[tuple[int, bytes | None]]) -> Iterator[tuple[int, bytes]]:
        for number, line in batch:
            if line is None:
                report_failure(
                    number, CommandError("limit", "the line is longer than any message that the broker takes")
                )
            elif not text:
                if line and not line.isspace():
                    yield number, line
            else:
                try:
                    yield number, text_value(line.removesuffix(b"\r"))
                except CommandError as error:
                    report_failure(number, error)

    async def feed(publisher: Publisher, lines: Lines) -> None:
        try:
            async for batch in lines:
                await publisher.publish(values(batch))
        except OSError as error:
            raise InputFailed(f"cannot read standard input: {error.strerror}") from error
        await publisher.finish()

    async with connect(url, token=token, ca=ca) as connection:
        publisher = Publisher(connection, topic, key=key, failed=report_failure, check=check_line)
        try:
            await _run_until_first(
                feed(publisher, Lines(0, connection.welcome["max_size"])), connection.raise_when_closed()
            )
        except ClientError as failure:
            failure.args = (f"{failure}; {_outcome(publisher)}",)
            raise
    return failures == 0


async def print_events(
    topics: Sequence[str],
    *,
    overflow: Overflow | None,
    url: str,
    token: str | None,
    ca: Path | None,
    max_queue: int | None = None,
    credit: int | None = None,
    last: int | None = None,
) -> bool:
    """Print the events and gaps of topics and patterns to standard output, one JSON object a line.

    With `last` so many of the newest kept events of each topic come first. With `credit`, at most so many events of
    each topic or pattern are under way: more come when those are printed.
    Does not return. Raises BrokenPipeError when nobody reads any more what is printed, and OutputFailed.
    """

    async def events(connection: Connection) -> bool:
        policy: dict[str, Any] = {"overflow": overflow, "max_queue": max_queue, "credit": credit, "last": last}
        await asyncio.gather(*(connection.subscribe(topic, **policy) for topic in topics))
        account = Credits(connection, topics, credit) if credit else None
        await _print_batches(connection, output, account, replays=last is not None)
        raise AssertionError("a connection ends with an exception")

    try:
        output = Output(1)
        async with connect(url, token=token, ca=ca) as connection:
            return await _run_until_first(events(connection), output.wait_reader_gone())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(f"cannot write the events: {error.strerror}") from error


async def print_history(topic: str, last: int, *, url: str, token: str | None, ca: Path | None) -> bool:
    """Print the `last` newest kept events of a topic, one JSON object a line. Raises as `print_events` does."""

    async def pages(connection: Connection) -> AsyncIterator[list[msgspec.Raw]]:
        answer = await _ask(connection, "history", topic=topic, last=last, limit=min(last, PAGE))
        newest = _parts(answer.events)
        if newest and len(newest) < last:
            # The answer has at most `max_size` bytes. So the older events are read first, a page at a time.
            first, reached = _offset(newest[0]), max(0, (answer.offset or 0) - last)
            while reached < first - 1:
                since = {"epoch": answer.epoch or "", "offset": reached}
                page = await _ask(connection, "history", topic=topic, since=since, limit=PAGE)
                older = [event for event in _parts(page.events) if _offset(event) < first]
                if not older:
                    break
                yield older
                reached = _offset(older[-1])
        yield newest

    return await _print_pages(pages, url, token, ca)


async def print_members(topic: str, *, url: str, token: str | None, ca: Path | None) -> bool:
    """Print the members of a topic, one JSON object a line. Raises as `print_events` does."""

    async def pages(connection: Connection) -> AsyncIterator[list[msgspec.Raw]]:
        cursor: str | None = None
        while True:
            page = await _ask(connection, "presence", topic=topic, after=cursor, limit=PAGE)
            yield _parts(page.members)
            if not isinstance(page.more, str):
                return
            cursor = page.more

    return await _print_pages(pages, url, token, ca)


async def _ask(connection: Connection, op: str, **fields: Any) -> Ok:
    """Ask for a page. Its events and members stay the text that the broker sent, as numbers in them do."""
    answer = decode_server(await connection.request_raw("ok", op, **fields))
    assert isinstance(answer, Ok)  # request_raw has checked it  # nosec assert_used
    return answer


async def _print_pages(
    pages: Callable[[Connection], AsyncIterator[list[msgspec.Raw]]], url: str, token: str | None, ca: Path | None
) -> bool:
    try:
        output = Output(1)
        async with connect(url, token=token, ca=ca) as connection:
            async for page in pages(connection):
                if page:
                    await output.write(b"".join(bytes(each).translate(_ONE_LINE) + b"\n" for each in page))
        return True
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(f"cannot write: {error.strerror}") from error


def _parts(array: msgspec.Raw | None) -> list[msgspec.Raw]:
    return msgspec.json.decode(array or b"[]", type=list[msgspec.Raw])


def _offset(event: msgspec.Raw) -> int:
    return msgspec.json.decode(event, type=_Event).offset


class _Event(msgspec.Struct):
    offset: int


def json_value(data: bytes) -> bytes:
    """Check that `data` is one JSON value, and return it. Raises CommandError with code `bad_json`."""
    try:
        check_publish(b'{"op":"publish","topic":"_","data":%b}' % data, data)
    except CommandError as error:
        raise CommandError(error.code, f"{error.message} (with --text, DATA is a plain string)") from None
    return data


def check_publish(command: bytes, value: bytes) -> None:
    """Check that the broker can read `command`, an encoded publish in which `value` was put as its data.

    It must be checked here. The broker answers what is not JSON without an id, because it cannot read one there; and
    two values with a comma between them would be a valid command with one more field.
    Raises CommandError.
    """
    from broker.config import Limits  # most commands do not need it

    try:
        publish = decode(command, Limits().max_depth)
    except CommandError as error:
        # The place is one of the value, not one of the command around it.
        message = explain_json(value) if error.message.startswith(NOT_JSON) else error.message
        raise CommandError(error.code, message) from None
    if not isinstance(publish, Publish) or bytes(publish.data) != value.strip(_SPACE):
        raise CommandError("bad_json", explain_json(value))


def check_line(command: bytes, value: bytes) -> None:
    """The same, for a Publisher."""
    try:
        check_publish(command, value)
    except CommandError as error:
        raise CommandRefused(error.code, error.message) from None


_SPACE: Final = b" \t\r\n"  # RFC 8259, section 2


def text_value(text: bytes) -> bytes:
    """Make a JSON string of `text`. Raises CommandError with code `bad_json` if it is not UTF-8."""
    try:
        return msgspec.json.encode(text.decode())
    except UnicodeDecodeError as error:
        raise CommandError("bad_json", f"the text is not UTF-8: {error.reason}") from None


class Credits:
    """Gives back the credit of the events that were dealt with.

    An event comes under the most specific of the topics that match it, so the account is that of the broker.
    """

    def __init__(self, connection: Connection, topics: Sequence[str], credit: int) -> None:
        self._connection = connection
        self._topics = sorted(set(topics), key=rank)
        self._threshold = max(1, credit // 2)
        self._used = dict.fromkeys(self._topics, 0)

    async def add_used(self, batch: Sequence[bytes]) -> None:
        """Count the events of a batch, and let more come where half of the credit is used up."""
        for raw in batch:
            message = decode_server(raw)
            if isinstance(message, EventMessage):
                topic = next(topic for topic in self._topics if matches(topic, message.topic))
                self._used[topic] += 1
        commands = []
        for topic, used in self._used.items():
            if used >= self._threshold:
                self._used[topic] = 0
                commands.append(encode_command(Credit(topic=topic, add=used)))
        if commands:
            await self._connection.send(commands)


async def _print_batches(
    connection: Connection, output: Output, credits: Credits | None, *, replays: bool = False
) -> None:
    async for batch in connection.batches():
        if replays:  # a replay ends with `live`, which is neither an event nor a gap
            batch = [message for message in batch if not message.startswith(_LIVE)]
            if not batch:
                continue
        text = b"\n".join(batch)
        if text.count(b"\n") >= len(batch) or b"\r" in text:
            # The data is passed on as it was published, and may have line breaks between its tokens (nowhere else:
            # RFC 8259, section 7). Here an event is one line.
            text = b"\n".join(message.translate(_ONE_LINE) for message in batch)
        await output.write(text + b"\n")
        if credits is not None:
            await credits.add_used(batch)


_LIVE: Final = b'{"op":"live"'
_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")

_T = TypeVar("_T")


async def _run_until_first(*works: Coroutine[Any, Any, _T]) -> _T:
    """Run all at once. Returns, or raises, what the first to end does; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _outcome(publisher: Publisher) -> str:
    """Say what became of the lines when the connection ended."""
    unanswered = publisher.unanswered
    if not unanswered:
        return f"{publisher.published:,} lines were published"
    which = f"line {unanswered[0]}" if len(unanswered) == 1 else f"lines {unanswered[0]} to {unanswered[-1]}"
    return f"{publisher.published:,} lines were published, of {which} it is not known"
