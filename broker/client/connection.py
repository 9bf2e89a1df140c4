"""The client: commands that are answered, and the events and gaps that come.

    async with connect("ws://127.0.0.1:8765") as client:
        await client.subscribe("prices.*")
        await client.publish("prices.eurusd", {"bid": 1.0843})
        async for message in client:
            ...

There is no task behind it: what comes is sorted as it is read, answers to those who wait for them and events into a
batch that the next round of the loop takes. While a batch that is large enough is not taken, nothing more is read, so
that the broker's queue and its overflow policy do their work; answers wait behind it. Whoever subscribes must read.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import msgspec

from broker.client.failures import ClientError, Closed, CommandRefused, NotABroker, Unreachable
from broker.client.stream import LOST, Stream, open_stream
from broker.errors import CommandError
from broker.messages import (
    VERSION,
    Bye,
    Command,
    Credit,
    ErrorAnswer,
    EventMessage,
    Gap,
    Join,
    Leave,
    Ok,
    Ping,
    Pong,
    Publish,
    Subscribe,
    Unsubscribe,
    Welcome,
    decode,
    decode_server,
    encode_command,
)
from broker.overflow import Overflow

DEFAULT_URL: Final = "ws://127.0.0.1:8765"
"""Where a broker without any configuration listens."""

ENOUGH: Final = 256 * 1024
"""A batch of events of this many bytes is not added to: reading stops until it is taken. As much as one read brings."""

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
        await client.make_upgrade_response(timeout)
        yield client
    finally:
        await stream.leave()


class Client:
    """One connection to a broker. `connect` makes it.

    Every method that talks to the broker raises Closed once the connection has ended, and CommandError where the broker
    does not carry out a command.
    """

    welcome: Welcome
    """What the broker said of itself: version, session, `max_size` (bytes), `ping` (seconds)."""

    def __init__(self, stream: Stream) -> None:
        self.on_error: Callable[[CommandError], None] = self._disagree
        """Called with an error that names no command. There is none as long as both sides read JSON alike."""
        self._stream = stream
        self._ids = itertools.count(1)
        self._pending: dict[int | str, Callable[[Answer], None]] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._greeted: asyncio.Future[None] | None = None
        self._bye: Bye | None = None
        self._events: list[bytes] = []
        self._held = 0
        self._some: asyncio.Future[None] | None = None

    @property
    def failure(self) -> ClientError | None:
        """Why the connection has ended; None as long as it has not."""
        return self._stream.failure

    async def make_upgrade_response(self, timeout: float) -> None:
        """Wait for `welcome`, for `timeout` seconds at most. `connect` does it."""
        self._greeted = asyncio.get_running_loop().create_future()
        self._stream.attach(self)
        try:
            async with asyncio.timeout(timeout):
                await self.wait(self._greeted)
        except TimeoutError:
            raise NotABroker(f"the other side sent no `welcome` within {timeout:g} seconds: not a wsbroker?") from None
        except Closed as failure:
            if failure.code != LOST:
                raise
            raise Unreachable(f"{failure} before it said `welcome`") from failure
        if self.welcome.ping > 0:
            # Two pings and a half: one may be late by as much as it takes to send a large event.
            self._stream.watch(self.welcome.ping * 2.5)

    async def subscribe(
        self,
        topic: str,
        *,
        max_queue: int | None = None,
        overflow: Overflow | None = None,
        echo: bool | None = None,
        credit: int | None = None,
    ) -> Ok:
        """Start, or change, the subscription to a topic or pattern. What is None is left as it is.

        With `credit` so many events come, and more only after `credit` is called.
        """
        command = Subscribe(
            topic=topic, id=next(self._ids), max_queue=max_queue, overflow=overflow, echo=echo, credit=credit
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

    async def ended(self) -> NoReturn:
        """Wait until the connection has ended. Raises why."""
        await self.wait(asyncio.get_running_loop().create_future())
        raise AssertionError("nobody completes that future")

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Give the same as raw messages, all that have come since the last time together.

        What arrived before the connection ended is given out before the end is raised.
        """
        while True:
            if not self._events:
                self._some = asyncio.get_running_loop().create_future()
                await self.wait(self._some)
            batch, self._events = self._events, []
            self._held = 0
            self._stream.resume()
            yield batch

    # For those who send many commands: Publisher.

    def check_size(self, command: bytes) -> None:
        """Check that a command is not too large, for which the broker would close. Raises CommandError with `limit`."""
        if len(command) > self.welcome.max_size:
            size, most = len(command), self.welcome.max_size
            raise CommandError("limit", f"the command has {size:,} bytes, the broker takes at most {most:,}")

    def forget(self, number: int) -> None:
        """Give back an id for which nothing was sent."""
        self._pending.pop(number, None)

    def expect(self, answered: Callable[[Answer], None]) -> int:
        """Reserve an id for a command to `send`; `answered` is called with what the broker answers."""
        number = next(self._ids)
        self._pending[number] = answered
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
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    # What the stream calls.

    def received(self, messages: list[bytes]) -> None:
        """Sort what came: answers to those who wait for them, the rest into the batch."""
        events = self._events
        before = len(events)
        for message in messages:
            # The form that the broker gives it. An event that looks otherwise is only slower to tell.
            if message.startswith(_EVENT):
                events.append(message)
            elif not self._take(message):
                return
        if len(events) == before:
            return
        self._held += sum(map(len, events[before:]))
        if self._held >= ENOUGH:
            self._stream.pause()
        if self._some is not None and not self._some.done():
            self._some.set_result(None)

    def closed(self, failure: ClientError) -> None:
        """Tell everybody who waits that nothing more will come."""
        if isinstance(failure, Closed) and self._bye is not None:
            failure.retry_after_ms = self._bye.retry_after_ms
            failure.args = (f"{failure}; it may be tried again after {failure.retry_after_ms / 1000:.1f} seconds",)
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(failure)

    def _take(self, raw: bytes) -> bool:
        """Act on one message that is not an event. False if there is no going on after it."""
        try:
            message = decode_server(raw)
        except ValueError as error:
            self._stream.give_up(NotABroker(str(error)))
            return False
        if isinstance(message, (Ok, ErrorAnswer, Pong)) and message.id is not None:
            answered = self._pending.pop(message.id, None)
            if answered is not None:
                answered(message)
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
            self._stream.give_up(NotABroker(found))
            return False
        self.welcome = message
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_result(None)
        return True

    def _disagree(self, error: CommandError) -> None:
        self._stream.give_up(NotABroker(f"the broker cannot read a command of this client: {error}"))

    async def _request(self, command: Command, kind: type[_T]) -> _T:
        """Send one command and wait for its answer, which is of this kind unless it is an error."""
        assert command.id is not None
        payload = encode_command(command)
        self.check_size(payload)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answers: list[Answer] = []

        def answered(answer: Answer) -> None:
            answers.append(answer)
            if not done.done():
                done.set_result(None)

        self._pending[command.id] = answered
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

    publish = decode(command, Limits().max_depth)
    if not isinstance(publish, Publish) or bytes(publish.data) != value.strip(_SPACE):
        raise CommandError("bad_json", "not one JSON value")


_EVENT: Final = b'{"op":"event",'
_SPACE: Final = b" \t\r\n"  # RFC 8259, section 2
