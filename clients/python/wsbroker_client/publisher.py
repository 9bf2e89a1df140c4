"""Publishing many events: a window of them is in flight, and each counts as published once it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from wsbroker_client.connection import Connection, refused
from wsbroker_client.errors import CommandRefused
from wsbroker_client.wire import OK, decode_message, encode_publish_head

WINDOW: Final = 64
"""How many publishes are sent before the first of them is answered: as many as the broker's `max_inflight` takes up by
default. More would wait in the socket."""


class Publisher:
    """Publishes events to one topic, in their order, many at a time.

    Each event goes by a number of the caller's, under which `failed` is called if it was not published (None where the
    broker did not say which one it was). The connection may end at any time: Closed is raised, and of the numbers in
    `unanswered` the outcome is not known.
    """

    def __init__(
        self,
        connection: Connection,
        topic: str,
        *,
        failed: Callable[[int | None, CommandRefused], None],
        key: str | None = None,
        window: int = WINDOW,
        check: Callable[[bytes, bytes], None] | None = None,
    ) -> None:
        """`check(command, value)` is called before a command is sent, and raises CommandRefused to keep it back."""
        self.published = 0
        """How many events were answered `ok`."""
        self._connection = connection
        self._failed = failed
        self._window = window
        self._check = check
        self._numbers: dict[int, int] = {}
        self._unmatched_errors = 0
        self._window_open: asyncio.Future[None] | None = None
        self._window_limit = 0
        self._head = encode_publish_head(topic, key)
        connection.on_error = self._on_error_without_id

    @property
    def unanswered(self) -> list[int]:
        """The numbers of the events that were sent and not on_answer, in their order."""
        return list(self._numbers.values())

    @property
    def _in_flight(self) -> int:
        return len(self._numbers) - self._unmatched_errors

    async def publish(self, events: Iterable[tuple[int, bytes]]) -> None:
        """Send events, given as number and JSON value, and return when all are sent: `finish` waits for the answers.

        That a value is one JSON value is the caller's affair: two with a comma between them would be another command.
        One that is too large for the broker, or that `check` does not like, is reported like one that it refuses.
        Raises ClientError when the connection has ended.
        """
        rest = iter(events)
        while True:
            commands = list(self._encode(rest, self._window - self._in_flight))
            if not commands:
                return
            await self._connection.send(commands)
            # Half of the window goes out at once, or a fast broker would be sent its answers' worth one by one.
            await self._wait(self._window // 2)

    async def finish(self) -> None:
        """Wait until every event is answered. Raises ClientError when the connection ended before."""
        await self._wait(0)

    def _encode(self, events: Iterator[tuple[int, bytes]], limit: int) -> Iterator[bytes]:
        """Make the commands for at most `limit` of the next events."""
        # In one loop, without calls that could be spared: it runs for each line of a file.
        connection, check, numbers = self._connection, self._check, self._numbers
        head, on_answer, expect_answer = self._head, self._on_answer, connection.expect_answer
        most = connection.welcome["max_size"]
        while limit > 0:
            number, value = next(events, _END)
            if number < 0:
                return
            name = expect_answer(on_answer)
            command = head % (name, value)
            try:
                if len(command) > most:
                    connection.check_size(command)
                if check is not None:
                    check(command, value)
            except CommandRefused as error:
                connection.cancel_answer(name)
                self._failed(number, error)
                continue
            numbers[name] = number
            limit -= 1
            yield command

    def _on_answer(self, name: int, answer: bytes) -> None:
        number = self._numbers.pop(name, None)
        if answer.startswith(OK) or (message := decode_message(answer))["op"] == "ok":
            self.published += 1  # the counts in the receipt are not needed
        elif message["op"] == "error":
            self._failed(number, refused(message))
        self._wake()

    def _on_error_without_id(self, error: CommandRefused) -> None:
        # The broker reads more strictly than this client: it may allow less depth. One of those under way gets no other
        # answer.
        self._unmatched_errors += 1
        self._failed(None, error)
        self._wake()

    async def _wait(self, limit: int) -> None:
        """Wait until no more than so many events are without an answer."""
        while self._in_flight > limit:
            self._window_limit = limit
            self._window_open = asyncio.get_running_loop().create_future()
            await self._connection.wait(self._window_open)

    def _wake(self) -> None:
        if self._in_flight <= self._window_limit and self._window_open is not None and not self._window_open.done():
            self._window_open.set_result(None)


_END: Final = (-1, b"")
