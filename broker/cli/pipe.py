"""The two ends of a shell pipe, for the event loop: lines that come in, bytes that go out.

Standard input and output are used as they are. They are not made non-blocking, because that would hold for every other
process that has them too, the shell among them. Instead, the client reads only what is available, and writes only what
fits into the buffer of the pipe.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
from collections.abc import AsyncIterator
from typing import Final, NoReturn

CHUNK: Final = 64 * 1024
"""Read at once, in bytes. As much as a pipe holds on Linux (pipe(7))."""


class Lines:
    """The lines of a file descriptor, as they come. No more is held than a chunk and one line."""

    def __init__(self, descriptor: int, max_length: int) -> None:
        """`max_length` is in bytes: of a line that is longer nothing is kept."""
        self._descriptor = descriptor
        self._max_length = max_length

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, bytes | None]]]:
        """Give the lines of each read with their numbers, counted from 1, without the line break.

        None stands for a line that is too long. The last line needs no line break. Raises OSError.
        """
        number = 1
        rest = b""
        too_long = False
        while chunk := await self._read():
            *lines, rest = (rest + chunk).split(b"\n")
            if lines:
                if too_long:
                    lines[0] = b""
                batch: list[tuple[int, bytes | None]] = [
                    (at, line if len(line) <= self._max_length else None) for at, line in enumerate(lines, number)
                ]
                if too_long:
                    batch[0] = (number, None)
                too_long = False
                number += len(lines)
                yield batch
            if len(rest) > self._max_length:
                too_long = True
            if too_long:
                rest = b""
            # A file is always ready, and a loop that only reads it would see no signal and answer no ping.
            await asyncio.sleep(0)
        if rest or too_long:
            yield [(number, None if too_long else rest)]

    async def _read(self) -> bytes:
        while True:
            if not _is_ready(self._descriptor, select.POLLIN):
                await _wait_readable(self._descriptor)
            try:
                return os.read(self._descriptor, CHUNK)
            except BlockingIOError:  # somebody else made it non-blocking, and read faster
                await asyncio.sleep(0)


class Output:
    """A file descriptor to write to, without ever blocking the event loop."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        mode = os.fstat(descriptor).st_mode
        self._is_pipe = stat.S_ISFIFO(mode)
        # A writable pipe or socket takes at least this much. A file or a terminal takes everything.
        self._piece = select.PIPE_BUF if self._is_pipe or stat.S_ISSOCK(mode) else CHUNK

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting while the descriptor is full. Raises OSError (closed: BrokenPipeError)."""
        view = memoryview(data)
        while view:
            if not _is_ready(self._descriptor, select.POLLOUT):
                await _wait_writable(self._descriptor)
            try:
                view = view[os.write(self._descriptor, view[: self._piece]) :]
            except BlockingIOError:  # somebody else made it non-blocking, and wrote faster
                await asyncio.sleep(0)

    async def wait_reader_gone(self) -> NoReturn:
        """Wait until the reader has closed the pipe, and raise BrokenPipeError. Never returns if it is no pipe."""
        if not self._is_pipe:
            await asyncio.get_running_loop().create_future()
        while not _is_ready(self._descriptor, select.POLLERR):
            # Nothing is ever read here. Waiting for readability also reports the error of a closed pipe (epoll(7)).
            await _wait_readable(self._descriptor)
        raise BrokenPipeError


def _is_ready(descriptor: int, event: int) -> bool:
    """Whether a read or write would not block, including the case of an error."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(0))


async def _wait_readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, _complete, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def _wait_writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(descriptor, _complete, ready)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _complete(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
