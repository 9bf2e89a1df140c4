"""The ends of a shell pipe: lines in, bytes out, and the loop never blocked by either."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cli.pipe import CHUNK, Lines, Output


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):  # a test may have closed it
            os.close(end)


async def read(descriptor: int, longest: int = 100) -> list[tuple[int, bytes | None]]:
    return [line async for batch in Lines(descriptor, longest) for line in batch]


# Lines


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\nb\n", [b"a", b"b"]),
        (b"\n\na\n\nb", [b"", b"", b"a", b"", b"b"]),
        (b"a\r\nb\r", [b"a\r", b"b\r"]),
        (b"x" * 5 + b"\n" + b"y" * 6 + b"\nz", [b"xxxxx", None, b"z"]),
        (b"x" * 6, [None]),
        (b"x" * 6 + b"\n", [None]),
        (b"x" * 20 + b"\na\n" + b"y" * 20 + b"\nb", [None, b"a", None, b"b"]),
    ],
)
async def test_lines_do_not_depend_on_read_boundaries(
    data: bytes, lines: list[bytes | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "input"
    file.write_bytes(data)
    for size in range(1, len(data) + 2):
        monkeypatch.setattr("broker.cli.pipe.CHUNK", size)
        with file.open("rb") as source:
            assert await read(source.fileno(), longest=5) == list(enumerate(lines, 1))


async def test_line_is_yielded_as_soon_as_it_is_complete(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    batches = aiter(Lines(source, 100))
    os.write(sink, b"first\nsec")
    assert await anext(batches) == [(1, b"first")]
    waiting = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    os.write(sink, b"ond\n")
    assert await waiting == [(2, b"second")]
    os.close(sink)
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


async def test_line_over_the_limit_is_not_buffered(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    lines = Lines(source, 10)
    batches = aiter(lines)
    os.write(sink, b"a\n")
    assert await anext(batches) == [(1, b"a")]
    waiting = asyncio.ensure_future(anext(batches))
    for _ in range(20):
        await Output(sink).write(b"x" * CHUNK)
    await Output(sink).write(b"\nb\n")
    assert await waiting == [(2, None), (3, b"b")]


async def test_a_directory_cannot_be_read(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            await read(descriptor)
    finally:
        os.close(descriptor)


async def test_non_blocking_pipe_is_read(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    os.set_blocking(source, False)
    reading = asyncio.ensure_future(read(source))
    await asyncio.sleep(0)
    os.write(sink, b"a\n")
    os.close(sink)
    assert await reading == [(1, b"a")]


async def test_waiting_for_a_line_can_be_cancelled(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    reading = asyncio.ensure_future(read(source))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    os.write(sink, b"still there\n")
    assert os.read(source, 100) == b"still there\n"


# Output


async def test_pipe_writer_follows_a_slow_reader(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    data = bytes(range(256)) * 4096  # 16 times what the pipe holds
    writing = asyncio.ensure_future(Output(sink).write(data))
    got = b""
    while len(got) < len(data):
        await asyncio.sleep(0)
        while waiting := _unread(source):
            got += os.read(source, waiting)
    await writing
    assert got == data


async def test_full_pipe_does_not_block_the_loop(pipe: tuple[int, int]) -> None:
    _, sink = pipe
    writing = asyncio.ensure_future(Output(sink).write(b"x" * 10 * CHUNK))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not writing.done()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing


async def test_file_is_written_completely(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        output = Output(file.fileno())
        await output.write(b"a\n")
        await output.write(b"b" * 3 * CHUNK)
    assert (tmp_path / "out").read_bytes() == b"a\n" + b"b" * 3 * CHUNK


async def test_socket_writer_follows_a_slow_reader() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writing = asyncio.ensure_future(Output(ours.fileno()).write(b"x" * 10 * CHUNK))
        left = 10 * CHUNK
        theirs.setblocking(False)
        while left:
            await asyncio.sleep(0)
            with contextlib.suppress(BlockingIOError):
                left -= len(theirs.recv(CHUNK))
        await writing


async def test_a_full_disk_is_an_error() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            await Output(full).write(b"x")
    finally:
        os.close(full)


async def test_write_to_a_closed_pipe_fails(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    output = Output(sink)
    waiting = asyncio.ensure_future(output.wait_reader_gone())
    await output.write(b"a")
    await asyncio.sleep(0)
    assert not waiting.done()
    os.close(source)
    with pytest.raises(BrokenPipeError):
        await waiting
    with pytest.raises(BrokenPipeError):
        await output.write(b"b")


async def test_closing_a_full_pipe_ends_a_pending_write(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    writing = asyncio.ensure_future(Output(sink).write(b"x" * 10 * CHUNK))
    for _ in range(100):
        await asyncio.sleep(0)
    os.close(source)
    with pytest.raises(BrokenPipeError):
        await writing


async def test_a_file_is_never_abandoned(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        waiting = asyncio.ensure_future(Output(file.fileno()).wait_reader_gone())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


def _unread(descriptor: int) -> int:
    """How many bytes wait in a pipe."""
    import fcntl
    import struct
    import termios

    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))
    return int(count)
