"""One connection to a broker, without the reconnection of `Client`: for programs that end with it, as commands do.

    async with connect("ws://127.0.0.1:8765") as client:
        await client.subscribe("prices.*")
        await client.publish("prices.eurusd", {"bid": 1.0843})
        async for message in client:
            ...

The connection has no task of its own. Received messages are sorted as they are read: an answer completes the call that
waits for it, and events go into a batch that the iteration takes. While a large batch is not taken, reading is paused,
so that the broker's queue and its overflow policy apply; answers are delayed as well. A client that subscribes must
iterate.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Final, NoReturn

from wsbroker_client.errors import ClientError, Closed, CommandRefused, NotABroker, Unreachable
from wsbroker_client.model import Receipt, receipt_of
from wsbroker_client.stream import LOST, Stream, open_stream
from wsbroker_client.wire import (
    DEFAULT_URL,
    EVENT,
    OK,
    VERSION,
    Default,
    decode_message,
    encode_command,
    encode_data,
    encode_publish,
    publish_fields,
)

MAX_BATCH: Final = 256 * 1024
"""Reading is paused while the batch of events has at least this many bytes. About as much as one read returns."""

Answer = dict[str, Any]


@contextlib.asynccontextmanager
async def connect(
    url: str = DEFAULT_URL, *, token: str | None = None, ca: Path | None = None, timeout: float = 10.0
) -> AsyncIterator[Connection]:
    """Connect to the broker at `url` (ws://…, wss://… or unix:/path), and close properly at the end.

    `token` identifies the client; `ca` is a file with the certificates to trust at a wss:// address, in place of the
    system's; `timeout` is in seconds. Raises ValueError if `url` or `ca` is none, and Unreachable, Refused or
    NotABroker if no broker can be had there.
    """
    stream = await open_stream(url, token=token, ca=ca, open_timeout=timeout)
    connection = Connection(stream)
    try:
        await connection.wait_welcome(timeout)
        yield connection
    finally:
        await stream.shut_down()


class Connection:
    """One connection to a broker. `connect` makes it.

    Every method that talks to the broker raises Closed once the connection has ended, and CommandRefused where the
    broker does not carry out a command.
    """

    welcome: dict[str, Any]
    """The first message of the broker: version, session, `max_size` (bytes), `ping` (seconds)."""

    def __init__(self, stream: Stream) -> None:
        self.on_error: Callable[[CommandRefused], None] = self._fail_on_error
        """Called with an error without an id. It occurs only if both sides parse JSON differently."""
        self._stream = stream
        self._ids = itertools.count(1)
        self._pending: dict[int, Callable[[int, bytes], None]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._welcomed: asyncio.Future[None] | None = None
        self._bye: dict[str, Any] | None = None
        self._events: list[bytes] = []
        self._batch_bytes = 0
        self._batch_ready: asyncio.Future[None] | None = None

    @property
    def failure(self) -> ClientError | None:
        """Why the connection has ended; None as long as it has not."""
        return self._stream.failure

    async def wait_welcome(self, timeout: float) -> None:
        """Wait for `welcome`, for `timeout` seconds at most. `connect` does it."""
        self._welcomed = asyncio.get_running_loop().create_future()
        self._stream.attach(self)
        try:
            await asyncio.wait_for(self.wait(self._welcomed), timeout)
        except asyncio.TimeoutError:
            raise NotABroker(f"the other side sent no `welcome` within {timeout:g} seconds: not a wsbroker?") from None
        except Closed as failure:
            if failure.close_code != LOST:
                raise
            raise Unreachable(f"{failure} before it said `welcome`") from failure
        if self.welcome["ping"] > 0:
            # Two pings and a half: one may be late by as much as it takes to send a large event.
            self._stream.watch_silence(self.welcome["ping"] * 2.5)

    async def subscribe(self, topic: str, **options: Any) -> Answer:
        """Start, or change, the subscription to a topic or pattern. `options` are fields of the protocol's `subscribe`.

        With `credit` so many events come, and more only after `credit` is called; `last` is how many of the newest kept
        events come first.
        """
        return await self._request("ok", "subscribe", topic=topic, **options)

    async def credit(self, topic: str, add: int) -> Answer:
        """Let `add` more events of a subscription come. `topic` is that of the subscription."""
        return await self._request("ok", "credit", topic=topic, add=add)

    async def unsubscribe(self, topic: str) -> Answer:
        """End the subscription to a topic or pattern. Its events that are already here are still given out."""
        return await self._request("ok", "unsubscribe", topic=topic)

    async def publish(
        self, topic: str, data: object, *, key: str | None = None, default: Default | None = None
    ) -> Receipt:
        """Publish one event, whose `data` is anything that orjson serialises, with the help of `default`."""
        return await self.publish_raw(topic, encode_data(data, default), key=key)

    async def publish_raw(self, topic: str, data: bytes, *, key: str | None = None) -> Receipt:
        """Publish one event, whose `data` is one JSON value in UTF-8; it is not checked."""
        number = next(self._ids)
        payload = encode_publish(number, publish_fields(topic, key), data)
        _, answer = await self._exchange("ok", number, payload)
        return receipt_of(answer)

    async def request_raw(self, answer: str, op: str, **fields: Any) -> bytes:
        """Send a command, with these fields of the protocol, and wait for its `answer` (`ok` or `pong`).

        Returns the answer as the broker sent it, so that no number in it is changed.
        """
        number = next(self._ids)
        raw, _ = await self._exchange(answer, number, encode_command(op, id=number, **fields))
        return raw

    async def ping(self) -> None:
        """Ask the broker for an answer: when it comes, all commands before it have been read."""
        await self._request("pong", "ping")

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Give each event, gap, live, join and leave in the order in which the broker sent them, until the end."""
        async for batch in self.batches():
            for raw in batch:
                yield decode_message(raw)

    async def raise_when_closed(self) -> NoReturn:
        """Wait until the connection has ended, and raise the reason."""
        await self.wait(asyncio.get_running_loop().create_future())
        raise AssertionError("nobody completes that future")

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Give the same as raw messages, all that have come since the last time together.

        Messages that arrived before the end of the connection come first; then the end is raised.
        """
        while True:
            if not self._events:
                self._batch_ready = asyncio.get_running_loop().create_future()
                await self.wait(self._batch_ready)
            batch, self._events = self._events, []
            self._batch_bytes = 0
            self._stream.resume()
            yield batch

    # For Publisher, which sends many commands.

    def check_size(self, command: bytes) -> None:
        """Check that a command is not too large, or the broker would close. Raises CommandRefused with `limit`."""
        size, most = len(command), self.welcome["max_size"]
        if size > most:
            raise CommandRefused("limit", f"the command has {size:,} bytes, the broker takes at most {most:,}")

    def cancel_answer(self, number: int) -> None:
        """Release an id from `expect_answer` for which nothing was sent."""
        self._pending.pop(number, None)

    def expect_answer(self, on_answer: Callable[[int, bytes], None]) -> int:
        """Reserve an id for a command to `send`; `on_answer(id, message)` is called with the answer, not decoded."""
        number = next(self._ids)
        self._pending[number] = on_answer
        return number

    async def send(self, commands: Iterable[bytes]) -> None:
        """Send encoded commands together, and wait while the socket does not take them."""
        if self.failure is not None:
            raise self.failure
        await self._stream.write(commands)

    async def wait(self, future: asyncio.Future[None]) -> None:
        """Wait for `future`, which a received message completes. Raises ClientError if the connection ends first."""
        if self.failure is not None and not future.done():
            raise self.failure
        self._waiters.add(future)
        try:
            await future
        finally:
            self._waiters.discard(future)

    # Called by the stream.

    def on_messages(self, messages: list[bytes]) -> None:
        """Sort messages: answers complete their calls, the rest goes into the batch."""
        events, pending = self._events, self._pending
        before = len(events)
        for message in messages:
            # The format of the broker. A message in another format is only slower to recognize.
            if message.startswith(EVENT):
                events.append(message)
                continue
            if message.startswith(OK):
                # Up to the comma; without one up to the last brace, since `find` gives -1.
                digits = message[len(OK) : message.find(b",", len(OK))]
                if digits.isdigit():
                    number = int(digits)
                    if (on_answer := pending.pop(number, None)) is not None:
                        on_answer(number, message)
                    continue
            if not self._process(message):
                return
        if len(events) == before:
            return
        self._batch_bytes += sum(map(len, events[before:]))
        if self._batch_bytes >= MAX_BATCH:
            self._stream.pause()
        if self._batch_ready is not None and not self._batch_ready.done():
            self._batch_ready.set_result(None)

    def on_closed(self, failure: ClientError) -> None:
        """Fail all pending calls."""
        if isinstance(failure, Closed) and self._bye is not None:
            failure.retry_after_ms = self._bye["retry_after_ms"]
            failure.args = (f"{failure}; it may be tried again after {failure.retry_after_ms / 1000:.1f} seconds",)
        for future in list(self._waiters):
            if not future.done():
                future.set_exception(failure)

    def _process(self, raw: bytes) -> bool:
        """Process one message other than an event. False if the connection fails by it."""
        try:
            message = decode_message(raw)
            op = message["op"]
            if op in _STREAM:
                self._events.append(raw)
            elif op in _ANSWERS and message.get("id") is not None:
                on_answer = self._pending.pop(message["id"], None)
                if on_answer is not None:
                    on_answer(message["id"], raw)
            elif op == "error":
                self.on_error(refused(message))
            elif op == "bye":
                message["retry_after_ms"] += 0
                self._bye = message
            elif op == "welcome":
                return self._welcome(message)
        except (ValueError, KeyError, TypeError) as error:
            self._stream.fail(NotABroker(f"not a message of the protocol: {error!r}"))
            return False
        return True

    def _welcome(self, message: dict[str, Any]) -> bool:
        if message["version"] != VERSION:
            found = f"the broker speaks version {message['version']} of the protocol, this client version {VERSION}"
            self._stream.fail(NotABroker(found))
            return False
        message["max_size"] + message["ping"]  # both must be numbers
        self.welcome = message
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(None)
        return True

    def _fail_on_error(self, error: CommandRefused) -> None:
        self._stream.fail(NotABroker(f"the broker cannot read a command of this client: {error}"))

    async def _request(self, answer: str, op: str, **fields: Any) -> Answer:
        """Send one command and wait for its answer."""
        number = next(self._ids)
        _, message = await self._exchange(answer, number, encode_command(op, id=number, **fields))
        return message

    async def _exchange(self, kind: str, number: int, payload: bytes) -> tuple[bytes, Answer]:
        """Send a command with this id. Returns the answer, which is of this kind, as it came and decoded.

        Raises CommandRefused.
        """
        self.check_size(payload)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answers: list[bytes] = []

        def on_answer(_number: int, answer: bytes) -> None:
            answers.append(answer)
            if not done.done():
                done.set_result(None)

        self._pending[number] = on_answer
        try:
            await self.send([payload])
            await self.wait(done)
        finally:
            self._pending.pop(number, None)
        try:
            answer = decode_message(answers[0])
        except ValueError as error:
            raise NotABroker(f"not a message of the protocol: {error!r}") from error
        if answer["op"] == "error":
            raise refused(answer)
        if answer["op"] != kind:
            raise NotABroker(f"the broker answered something else than was asked: {answer}")
        return answers[0], answer


def refused(answer: Answer) -> CommandRefused:
    """Make the exception for an `error` of the broker."""
    return CommandRefused(
        answer["code"],
        answer.get("message", ""),
        retry=bool(answer.get("retry")),
        retry_after_ms=answer.get("retry_after_ms"),
    )


_ANSWERS: Final = frozenset({"ok", "error", "pong"})
_STREAM: Final = frozenset({"event", "gap", "live", "join", "leave"})
