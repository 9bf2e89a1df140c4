"""The verification of tokens beside everything else that the loop has to do.

A signature takes 50 to 300 µs of processor time, and after a restart thousands of clients connect at once. Invariant:
in one turn of the loop at most `SLICE` seconds are spent here, and one verification more. Tokens whose verification
takes longer than `SLOW` go to threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from broker.auth.tokens import TokenError
from broker.identity import Identity

SLICE: Final = 0.002
"""Seconds of one turn of the loop."""
SLOW: Final = 0.001
"""Seconds of processor time; a verification that takes longer is one for a thread."""
THREADS: Final = 2
MOST_SLOW: Final = 64
"""Kinds of tokens that are remembered as slow."""

Verify = Callable[[str], Identity]
"""Verifies a token, and raises TokenError."""
Verified = Callable[[Identity | TokenError], None]
"""Takes the outcome, on the loop."""


class Verifications:
    """Verifies tokens, in the order in which they came."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.thread_time) -> None:
        self._loop = loop
        self._clock = clock
        """Seconds of processor time of the calling thread."""
        self._queue: deque[tuple[Verify, str, Verified]] = deque()
        self._spent = 0.0
        """Seconds of this turn."""
        self._is_scheduled = False
        self._slow: set[str] = set()
        """Headers of tokens, which name algorithm and key, that took longer than `SLOW`."""
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, verify: Verify, token: str, done: Verified) -> None:
        """Verify a token. `done` is called at once if this turn has the time, else in one of the next."""
        if self._slow and _header(token) in self._slow:
            self._submit_to_thread(verify, token, done)
            return
        self._queue.append((verify, token, done))
        if len(self._queue) == 1 and self._spent < SLICE:
            self._verify_next()
        self._schedule()

    def stop(self) -> None:
        """Verify nothing any more, and call nobody."""
        self._queue.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        self._spent = 0.0
        while self._queue and self._spent < SLICE:
            self._verify_next()
        if self._spent:
            self._schedule()

    def _verify_next(self) -> None:
        verify, token, done = self._queue.popleft()
        began = self._clock()
        result = _verify(verify, token)
        took = self._clock() - began
        self._spent += took
        if took > SLOW and len(self._slow) < MOST_SLOW:
            self._slow.add(_header(token))
        done(result)

    def _submit_to_thread(self, verify: Verify, token: str, done: Verified) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "verify")
        job = self._threads.submit(self._verify_timed, verify, token)
        job.add_done_callback(partial(self._on_thread_done, token, done))

    def _verify_timed(self, verify: Verify, token: str) -> tuple[Identity | TokenError, float]:
        """Verify, and give the seconds of processor time that it took."""
        began = self._clock()
        result = _verify(verify, token)
        return result, self._clock() - began

    def _on_thread_done(self, token: str, done: Verified, job: Future[tuple[Identity | TokenError, float]]) -> None:
        if job.cancelled() or self._loop.is_closed():
            return
        result, took = job.result()
        self._loop.call_soon_threadsafe(self._finish, token, took, done, result)

    def _finish(self, token: str, took: float, done: Verified, result: Identity | TokenError) -> None:
        if self._threads is None:
            return  # stopped
        if took <= SLOW:
            self._slow.discard(_header(token))  # it was slow for another reason
        done(result)


def _verify(verify: Verify, token: str) -> Identity | TokenError:
    try:
        return verify(token)
    except TokenError as error:
        return error


def _header(token: str) -> str:
    return token.partition(".")[0]
