"""The broker, and other programs of this repository, as processes of their own: as a user runs them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Seconds that a program has to start, to say something or to end. Far more than any needs, also on a busy machine.
PATIENCE = 30.0

LISTENING = re.compile(r"listening\b.*?127\.0\.0\.1:(?P<port>\d+)")


@contextlib.contextmanager
def start_broker(
    *options: str, listen: str = "127.0.0.1:0", environ: Mapping[str, str] | None = None
) -> Iterator[RunningBroker]:
    """Run `wsbroker serve` on loopback. At the end it is sent SIGTERM, unless it has ended, and must exit 0.

    `environ` has more variables for it, as WSBROKER_LIMITS__MAX_SIZE.
    """
    with start_program("-m", "broker", "serve", "--listen", listen, *options, environ=environ) as program:
        port = int(program.wait_for(LISTENING)["port"])
        yield RunningBroker(program, port)
        if program.running:
            program.terminate()
        assert program.wait() == (-signal.SIGKILL if program.killed else 0), program.output


class RunningBroker:
    """A broker that listens on 127.0.0.1:`port`."""

    def __init__(self, program: Program, port: int) -> None:
        self.program = program
        self.port = port
        self.url = f"ws://127.0.0.1:{port}/"


@contextlib.contextmanager
def start_program(*arguments: str, environ: Mapping[str, str] | None = None) -> Iterator[Program]:
    """Run this Python with these arguments, at the root of the repository. It does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    program = Program(process)
    try:
        yield program
        assert "Traceback" not in program.output, program.output
    finally:
        program.end()


class Program:
    """A running program, and what it has written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._output = ""
        self._news = threading.Condition()
        self._ended = False
        self.killed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has written so far, to standard output and standard error."""
        with self._news:
            return self._output

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Wait until it has written something that matches."""
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while not (match := pattern.search(self._output)):
                assert not self._ended, f"the program has ended: {self._output}"
                assert self._news.wait(deadline - time.monotonic()), f"not written: {pattern.pattern}: {self._output}"
        return match

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL: the end without a word to anybody."""
        self.killed = True
        self._process.kill()

    def wait(self) -> int:
        """Wait until it has ended; its exit status."""
        status = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def end(self) -> None:
        """See to it that it has ended."""
        if self.running:
            self.kill()
        self.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self._output += line
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()
