"""The verification of tokens beside everything else that the loop has to do.

A signature takes 50 to 700 µs, and after a restart thousands of clients connect at once. Invariant: in one turn of the
loop at most `SLICE` seconds are spent here, and one verification more.

No thread would help: cryptography holds the interpreter lock while it verifies. No key that is accepted takes longer
than a millisecond (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from broker.auth.tokens import TokenError
from broker.identity import Identity

SLICE: Final = 0.002
"""Seconds of one turn of the loop."""

Verify = Callable[[str], Identity]
"""Verifies a token, and raises TokenError."""
Verified = Callable[[Identity | TokenError], None]
"""Takes the outcome."""


class Verifications:
    """Verifies tokens, in the order in which they came."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.perf_counter) -> None:
        self._loop = loop
        self._clock = clock
        self._queue: deque[tuple[Verify, str, Verified]] = deque()
        self._spent = 0.0
        """Seconds of this turn."""
        self._is_scheduled = False

    def __len__(self) -> int:
        """The number of tokens that wait."""
        return len(self._queue)

    def submit(self, verify: Verify, token: str, done: Verified) -> None:
        """Verify a token. `done` is called at once if this turn has the time, else in one of the next."""
        self._queue.append((verify, token, done))
        if len(self._queue) == 1 and self._spent < SLICE:
            self._verify_next()
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def stop(self) -> None:
        """Verify nothing any more, and call nobody."""
        self._queue.clear()

    def _turn(self) -> None:
        self._spent = 0.0
        while self._queue and self._spent < SLICE:
            self._verify_next()
        self._is_scheduled = self._spent > 0
        if self._is_scheduled:
            self._loop.call_soon(self._turn)

    def _verify_next(self) -> None:
        verify, token, done = self._queue.popleft()
        began = self._clock()
        result: Identity | TokenError
        try:
            result = verify(token)
        except TokenError as error:
            result = error
        self._spent += self._clock() - began
        done(result)
