"""`wsbroker serve` as a process of its own, with its log, line by line, in the hands of the test."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

TIMEOUT = 30.0
"""Seconds after which a test that waits has failed."""


class Daemon:
    """A broker in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, file: Path | None = None) -> None:
        self.process = process
        self.file = file
        self.log: list[str] = []
        self.addresses: list[str] = []
        self.admin = ""
        """The address of the admin listener, if it has one."""

    @property
    def url(self) -> str:
        return f"ws://{self.addresses[0]}/"

    async def line(self) -> str:
        """The next line of the log; empty once there will be no more."""
        assert self.process.stderr is not None
        line = (await asyncio.wait_for(self.process.stderr.readline(), TIMEOUT)).decode()
        self.log.append(line)
        return line

    async def until(self, text: str) -> str:
        """The first line from here on that holds `text`."""
        while line := await self.line():
            if text in line:
                return line
        raise AssertionError(f"{text!r} was not logged, but:\n{''.join(self.log)}")

    async def started(self) -> None:
        while "ready " not in (line := await self.until("")) and '"ready"' not in line:
            if "listening" in line:
                self.addresses.append(line.split("address=")[1].split()[0].strip("'"))
            elif "admin listener" in line:
                self.admin = line.split("address=")[1].split()[0].strip("'")
            else:
                raise AssertionError(line)

    def configure(self, text: str) -> None:
        """Write another configuration file."""
        assert self.file is not None
        self.file.write_text(text)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """The exit status. What was still logged is in `log`."""
        while await self.line():
            pass
        return await asyncio.wait_for(self.process.wait(), TIMEOUT)

    @property
    def said(self) -> str:
        return "".join(self.log)


@asynccontextmanager
async def launched(
    *arguments: str,
    config: str = "",
    folder: Path | None = None,
    before: Callable[[], None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Daemon]:
    """`wsbroker serve` with these arguments."""
    command = [sys.executable, "-m", "broker", "serve", *arguments]
    file = None
    if folder is not None:
        file = folder / "wsbroker.toml"
        file.write_text(config)
        command += ["--config", str(file)]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=before,
        env={**os.environ, "PYTHONWARNINGS": "error", **(environ or {})},
    )
    try:
        yield Daemon(process, file)
    finally:
        if process.returncode is None:
            process.kill()
        assert process.stdout is not None
        assert await process.stdout.read() == b""
        await process.wait()


@asynccontextmanager
async def serving(*arguments: str, folder: Path | None = None, config: str = "") -> AsyncIterator[Daemon]:
    """A broker that has started."""
    given = arguments or ("--listen", "127.0.0.1:0")
    async with launched(*given, folder=folder, config=config) as daemon:
        await daemon.started()
        yield daemon


@asynccontextmanager
async def mute(address: str) -> AsyncIterator[asyncio.StreamWriter]:
    """A client that is connected and answers nothing, a close frame included. It says what is written to it."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    try:
        yield writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def has_networks() -> bool:
    """Whether a test may have a network of its own, in which the ports are free."""
    try:
        return subprocess.run([*OWN_NETWORK, "ip link set lo up"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


OWN_NETWORK = ("unshare", "--map-root-user", "--net", "/bin/sh", "-ec")


def is_served(path: Path) -> bool:
    """Whether somebody listens on a Unix socket; its file is there a little earlier."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0
