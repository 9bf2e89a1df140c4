"""A circuit breaker: a service that fails again and again is left alone for a while. No I/O, and no clock of its own.

Invariant: while it is open nobody asks the service, and then one alone tries whether it works again.
"""

from __future__ import annotations

import enum
from typing import Final

FAILURES: Final = 5
"""Failures in a row after which it opens."""
OPEN_SECONDS: Final = 5.0
"""Seconds for which it stays open."""


class State(enum.Enum):
    """What the service is taken for."""

    CLOSED = "closed"
    """It works, as far as is known: everybody may ask."""
    OPEN = "open"
    """It fails: nobody may ask."""
    TRYING = "trying"
    """One may ask, and does."""


TRANSITIONS: Final = {
    State.CLOSED: (State.OPEN,),
    State.OPEN: (State.TRYING,),
    State.TRYING: (State.CLOSED, State.OPEN),
}


class Breaker:
    """Says who may ask. Each `allow` that is answered True must be followed by `succeed`, `fail` or `give_up`."""

    def __init__(self) -> None:
        self.state = State.CLOSED
        self._failures = 0
        self._until = 0.0

    def allow(self, now: float) -> bool:
        """Whether one may ask now, in seconds of any clock."""
        if self.state is State.OPEN and now >= self._until:
            self._change(State.TRYING)
            return True
        return self.state is State.CLOSED

    def succeed(self) -> None:
        """Take note of an answer."""
        self._failures = 0
        if self.state is State.TRYING:
            self._change(State.CLOSED)

    def fail(self, now: float) -> bool:
        """Take note of a failure. True: it has opened."""
        self._failures += 1
        if self.state is State.OPEN or (self.state is State.CLOSED and self._failures < FAILURES):
            return False
        self._until = now + OPEN_SECONDS
        self._change(State.OPEN)
        return True

    def give_up(self, now: float) -> None:
        """Take note that somebody who was to ask did not wait for the answer."""
        if self.state is State.TRYING:
            self._until = now
            self._change(State.OPEN)

    def _change(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        self.state = state
