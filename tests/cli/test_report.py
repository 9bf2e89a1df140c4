"""Exit statuses, and output that cannot be written."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from broker.cli.report import Report, Status
from broker.errors import ERRORS
from tests.client.fake import running
from tests.fixtures_command import Result, finish, start
from wsbroker_client import CommandRefused

ROOT = Path(__file__).parent.parent.parent


def test_every_exit_status_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [(str(int(status)), status.meaning) for status in Status]


@pytest.mark.parametrize("arguments", [["config", "default"], ["config", "schema"], ["version"], ["check"]])
async def test_closed_pipe_is_silent_and_a_full_disk_is_reported(arguments: list[str]) -> None:
    source, closed = os.pipe()
    os.close(source)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with start(*arguments, stdout=closed) as process:
            assert await finish(process) == Result(141, "", "")
        async with start(*arguments, stdout=full) as process:
            assert await finish(process) == Result(74, "", "wsbroker: cannot write: No space left on device\n")
    finally:
        os.close(closed)
        os.close(full)


@pytest.mark.parametrize("code", list(ERRORS))
def test_an_error_has_its_exit_status(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = CommandRefused(code, "why", retry=ERRORS[code].retry, retry_after_ms=7)
    status = Report(as_json=False).command_error(error)
    assert capsys.readouterr().err == f"wsbroker: {code}: why\n"
    expected = {"unauthorized": 77, "forbidden": 77}.get(code, 65)
    assert status == (75 if error.retry else expected)


async def test_commands_work_with_closed_standard_streams() -> None:
    async with running() as fake:
        for redirect, arguments, status in (
            ("<&-", "pub t", 66),
            (">&-", "sub t", 74),
            (">&-", "version", 74),
            ("<&- >&- 2>&-", "pub t 1", 0),
        ):
            command = f"WSBROKER_URL={fake.url} {sys.executable} -m broker {arguments} {redirect}"
            process = await asyncio.create_subprocess_shell(
                command, cwd=ROOT, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            _, err = await process.communicate()
            assert process.returncode == status
            assert b"Traceback" not in err
