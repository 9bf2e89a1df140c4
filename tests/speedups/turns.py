"""A loop and transports without sockets, to run the native connection one turn at a time and see all that it writes."""

from __future__ import annotations

from asyncio import AbstractEventLoop, BaseProtocol, Transport
from collections.abc import Callable
from typing import Any, cast

from broker._speedups import Connection, LoopContext
from broker.config import Limits
from broker.errors import CLOSE_REASONS
from broker.messages import encode_gap
from tests.speedups.wire import THREADS


class Loop:
    """As much of an event loop as a LoopContext asks for. Time does not pass in it: what is called later never is."""

    def __init__(self) -> None:
        self.faults: list[dict[str, Any]] = []
        """What the loop's handler of exceptions was told."""
        self._soon: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        self._soon.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., object]) -> None:
        pass

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context)

    def turn(self) -> None:
        """What the end of one turn of the loop does, and what comes of it."""
        while self._soon:
            self.turn_once()

    def turn_once(self) -> None:
        """One turn: what is asked for in it comes in the next one."""
        soon, self._soon = self._soon, []
        for callback, args in soon:
            callback(*args)

    def as_loop(self) -> AbstractEventLoop:
        """The same as a loop, for whoever asks for no more of it."""
        return cast(AbstractEventLoop, self)

    def context(self, *, buffer_size: int = 262_144, **limits: Any) -> LoopContext:
        """A context on this loop."""
        context = LoopContext(
            self.as_loop(),
            Limits(**limits),
            encode_gap=encode_gap,
            close_reasons=CLOSE_REASONS,
            buffer_size=buffer_size,
            threads=THREADS,
        )
        context.shared_work = 0
        context.command_time = 3600.0  # what takes its time here is the machine
        return context


class Pipe(Transport):
    """A transport that takes all that is written. `data` is what was not taken out yet, `writes` counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()
        self.writes = 0
        self.connection: Connection | None = None
        self.ended = False
        self._reading = True
        self._closed = False

    def take(self) -> bytes:
        """Take out what was written."""
        taken = bytes(self.data)
        self.data.clear()
        return taken

    def lose(self) -> None:
        """Tell the connection that its transport has closed, as every transport does in the end."""
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.connection_lost(None)

    # What a connection asks of its transport (asyncio.Transport).

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self._closed
        assert not self.ended
        self.data += data
        self.writes += 1

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self._closed = True

    def abort(self) -> None:
        self._closed = True

    def is_closing(self) -> bool:
        return self._closed

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def set_protocol(self, protocol: BaseProtocol) -> None:
        self.connection = cast(Connection, protocol)

    def get_extra_info(self, name: str, default: object = None) -> object:
        return None
