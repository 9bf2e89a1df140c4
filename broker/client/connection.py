"""The client: commands that are on_answer, and the events and gaps that come.

    async with connect("ws://127.0.0.1:8765") as client:
        await client.subscribe("prices.*")
        await client.publish("prices.eurusd", {"bid": 1.0843})
        async for message in client:
            ...

The client has no task of its own. Received messages are sorted as they are read: an answer completes the call that
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
from typing import Final, Literal, NoReturn, TypeVar

import msgspec

from broker.client.failures import ClientError, Closed, CommandRefused, NotABroker, Unreachable
from broker.client.stream import LOST, Stream, open_stream
from broker.errors import CommandError
from broker.messages import (
    NOT_JSON,
    VERSION,
    Bye,
    Command,
    Credit,
    ErrorAnswer,
    EventMessage,
    Gap,
    History,
    Join,
    Leave,
    Ok,
    Ping,
    Pong,
    Presence,
    Publish,
    Since,
    Subscribe,
    Unsubscribe,
    Welcome,
    decode,
    decode_server,
    encode_command,
    explain_json,
)
from broker.overflow import Overflow

DEFAULT_URL: Final = "ws://127.0.0.1:8765"
"""Where a broker without any configuration listens."""

MAX_BATCH: Final = 256 * 1024
"""Reading is paused while the batch of events has at least this many bytes. About as much as one read returns."""

_T = TypeVar("_T")
Answer = Ok | ErrorAnswer | Pong


@contextlib.asynccontextmanager
async def connect(
    url: str = DEFAULT_URL, *, token: str | None = None, ca: Path | None = None, timeout: float = 10.0
) -> AsyncIterator[Client]:
    """Connect to the broker at `url` (ws://…, wss://… or unix:/path), and close properly at the end.

    `token` says who this is; `ca` is a file with the certificates to trust at a wss:// address, in place of the
    system's; `timeout` is in seconds. Raises ValueError if `url` or `ca` is none, and Unreachable, Refused or
    NotABroker if no broker can be had there.
    """
    stream = await open_stream(url, token=token, ca=ca, open_timeout=timeout)
    client = Client(stream)
    try:
        await client.wait_welcome(timeout)
        yield client
    finally:
        await stream.shut_down()


class Client:
    """One connection to a broker. `connect` makes it.

    Every method that talks to the broker raises Closed once the connection has ended, and CommandError where the broker
    does not carry out a command.
    """

    welcome: Welcome
    """What the broker said of itself: version, session, `max_size` (bytes), `ping` (seconds)."""

    def __init__(self, stream: Stream) -> None:
        self.on_error: Callable[[CommandError], None] = self._fail_on_error
        """Called with an error without an id. It occurs only if both sides parse JSON differently."""
        self._stream = stream
        self._ids = itertools.count(1)
        self._pending: dict[int | str, Callable[[Answer], None]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._welcomed: asyncio.Future[None] | None = None
        self._bye: Bye | None = None
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
            async with asyncio.timeout(timeout):
                await self.wait(self._welcomed)
        except TimeoutError:
            raise NotABroker(f"the other side sent no `welcome` within {timeout:g} seconds: not a wsbroker?") from None
        except Closed as failure:
            if failure.code != LOST:
                raise
            raise Unreachable(f"{failure} before it said `welcome`") from failure
        if self.welcome.ping > 0:
            # Two pings and a half: one may be late by as much as it takes to send a large event.
            self._stream.watch_silence(self.welcome.ping * 2.5)

    async def subscribe(
        self,
        topic: str,
        *,
        max_queue: int | None = None,
        overflow: Overflow | None = None,
        echo: bool | None = None,
        credit: int | None = None,
        last: int | Literal["all"] | None = None,
    ) -> Ok:
        """Start, or change, the subscription to a topic or pattern. What is None is left as it is.

        With `credit` so many events come, and more only after `credit` is called; `last` is how many of the newest kept
        events come first.
        """
        command = Subscribe(
            topic=topic,
            id=next(self._ids),
            max_queue=max_queue,
            overflow=overflow,
            echo=echo,
            credit=credit,
            last=last,
        )
        return await self._request(command, Ok)

    async def credit(self, topic: str, add: int) -> Ok:
        """Let `add` more events of a subscription come. `topic` is what was subscribed to."""
        return await self._request(Credit(topic=topic, id=next(self._ids), add=add), Ok)

    async def unsubscribe(self, topic: str) -> Ok:
        """End the subscription to a topic or pattern. Its events that are already here are still given out."""
        return await self._request(Unsubscribe(topic=topic, id=next(self._ids)), Ok)

    async def publish(self, topic: str, data: object, *, key: str | None = None) -> Ok:
        """Publish one event, whose `data` is anything that msgspec encodes, or msgspec.Raw with a JSON value.

        Returns how many subscribers it had: `receivers`, `queued`, `dropped`.
        """
        value = msgspec.json.encode(data)
        command = Publish(topic=topic, data=msgspec.Raw(value), key=key, id=next(self._ids))
        check_publish(encode_command(command), value)
        return await self._request(command, Ok)

    async def history(self, topic: str, *, since: Since | None = None, last: int | None = None) -> Ok:
        """Read a page of kept events: the oldest behind `since`, or the `last` newest, at most 1,000. Returns `epoch`,
        `offset`, `events` and `more`."""
        limit = MOST if last is None else min(last, MOST)
        return await self._request(History(topic=topic, id=next(self._ids), since=since, last=last, limit=limit), Ok)

    async def presence(self, topic: str, *, after: str | None = None) -> Ok:
        """Read a page of the members of a topic, behind a cursor. Returns `members`, `count` and `more`, the cursor of
        the next page."""
        return await self._request(Presence(topic=topic, id=next(self._ids), after=after, limit=MOST), Ok)

    async def ping(self) -> None:
        """Ask the broker for an answer: when it comes, all commands before it have been read."""
        await self._request(Ping(id=next(self._ids)), Pong)

    async def __aiter__(self) -> AsyncIterator[EventMessage | Gap | Join | Leave]:
        """Give each event and gap in the order in which the broker sent them, until the connection ends."""
        async for batch in self.batches():
            for raw in batch:
                message = decode_server(raw)
                if isinstance(message, (EventMessage, Gap, Join, Leave)):
                    yield message

    async def raise_when_closed(self) -> NoReturn:
        """Wait until the connection has ended, and raise the reason."""
        await self.wait(asyncio.get_running_loop().create_future())
        raise AssertionError("nobody completes that future")

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Give the same as raw messages, all that have come since the last time together.

        What arrived before the connection ended is given out before the end is raised.
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
        """Check that a command is not too large, for which the broker would close. Raises CommandError with `limit`."""
        if len(command) > self.welcome.max_size:
            size, most = len(command), self.welcome.max_size
            raise CommandError("limit", f"the command has {size:,} bytes, the broker takes at most {most:,}")

    def cancel_answer(self, number: int) -> None:
        """Release an id from `expect_answer` for which nothing was sent."""
        self._pending.pop(number, None)

    def expect_answer(self, on_answer: Callable[[Answer], None]) -> int:
        """Reserve an id for a command to `send`; `on_answer` is called with what the broker answers."""
        number = next(self._ids)
        self._pending[number] = on_answer
        return number

    async def send(self, commands: Iterable[bytes]) -> None:
        """Send encoded commands together, and wait while the socket does not take them."""
        if self.failure is not None:
            raise self.failure
        await self._stream.write(commands)

    async def wait(self, future: asyncio.Future[None]) -> None:
        """Wait for `future`, which what is received completes. Raises ClientError if the connection ends first."""
        if self.failure is not None:
            raise self.failure
        self._waiters.add(future)
        try:
            await future
        finally:
            self._waiters.discard(future)

    # What the stream calls.

    def on_messages(self, messages: list[bytes]) -> None:
        """Sort messages: answers complete their calls, the rest goes into the batch."""
        events = self._events
        before = len(events)
        for message in messages:
            # The format of the broker. An event in another format is only slower to recognize.
            if message.startswith(_EVENT):
                events.append(message)
            elif not self._process(message):
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
            failure.retry_after_ms = self._bye.retry_after_ms
            failure.args = (f"{failure}; it may be tried again after {failure.retry_after_ms / 1000:.1f} seconds",)
        for future in list(self._waiters):
            if not future.done():
                future.set_exception(failure)

    def _process(self, raw: bytes) -> bool:
        """Process one message other than an event. False if the connection fails by it."""
        try:
            message = decode_server(raw)
        except ValueError as error:
            self._stream.fail(NotABroker(str(error)))
            return False
        if isinstance(message, (Ok, ErrorAnswer, Pong)) and message.id is not None:
            on_answer = self._pending.pop(message.id, None)
            if on_answer is not None:
                on_answer(message)
        elif isinstance(message, ErrorAnswer):
            self.on_error(CommandRefused(message))
        elif isinstance(message, (EventMessage, Gap, Join, Leave)):
            self._events.append(raw)
        elif isinstance(message, Bye):
            self._bye = message
        elif isinstance(message, Welcome):
            return self._welcome(message)
        return True

    def _welcome(self, message: Welcome) -> bool:
        if message.version != VERSION:
            found = f"the broker speaks version {message.version} of the protocol, this client version {VERSION}"
            self._stream.fail(NotABroker(found))
            return False
        self.welcome = message
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(None)
        return True

    def _fail_on_error(self, error: CommandError) -> None:
        self._stream.fail(NotABroker(f"the broker cannot read a command of this client: {error}"))

    async def _request(self, command: Command, kind: type[_T]) -> _T:
        """Send one command and wait for its answer, which is of this kind unless it is an error."""
        assert command.id is not None
        payload = encode_command(command)
        self.check_size(payload)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answers: list[Answer] = []

        def on_answer(answer: Answer) -> None:
            answers.append(answer)
            if not done.done():
                done.set_result(None)

        self._pending[command.id] = on_answer
        try:
            await self.send([payload])
            await self.wait(done)
        finally:
            self._pending.pop(command.id, None)
        answer = answers[0]
        if isinstance(answer, ErrorAnswer):
            raise CommandRefused(answer)
        if not isinstance(answer, kind):
            raise NotABroker(f"the broker answered something else than was asked: {answer}")
        return answer


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


MOST: Final = 1000
"""The most events or members that the broker answers at once."""
_EVENT: Final = b'{"op":"event",'
_SPACE: Final = b" \t\r\n"  # RFC 8259, section 2
