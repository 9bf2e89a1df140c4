"""The command `wsbroker` as a process of its own, with its standard streams in the hands of the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parent.parent

PATIENCE = 30.0
"""Seconds that a command has to end. Far more than any needs, also on a busy machine."""


class Result(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


async def wsbroker(*arguments: str, stdin: bytes = b"", environ: Mapping[str, str] | None = None) -> Result:
    """Run `wsbroker` with these arguments and this standard input, to its end."""
    async with start(*arguments, environ=environ) as process:
        return await finish(process, stdin)


async def finish(process: Process, stdin: bytes = b"") -> Result:
    """Write the rest of standard input and close it, if it is a pipe, and wait for the end."""
    writable = process.stdin is not None and not process.stdin.is_closing()  # it is, once the process has ended
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate(stdin if writable else None)
    assert process.returncode is not None
    assert b"Traceback" not in (err or b""), err.decode()
    return Result(process.returncode, (out or b"").decode(), (err or b"").decode())


@contextlib.asynccontextmanager
async def start(
    *arguments: str,
    stdin: int | IO[bytes] = PIPE,
    stdout: int | IO[bytes] = PIPE,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Process]:
    """Start `wsbroker`. It does not outlive the block."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WSBROKER_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broker", *arguments),
        cwd=ROOT,
        # With warnings on, something left unclosed shows up in standard error.
        env={**ours, "WSBROKER_SERVER__ADMIN": "", "PYTHONWARNINGS": "default", **(environ or {})},
        stdin=stdin,
        stdout=stdout,
        stderr=PIPE,
        limit=2**20,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


__all__ = ["DEVNULL", "PIPE", "Process", "Result", "finish", "start", "wsbroker"]
