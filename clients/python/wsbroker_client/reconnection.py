"""Whether and when to connect again, and when to renew the token. Decides; its callers act."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from wsbroker_client.errors import ClientError, Closed, NotABroker, Refused

FIRST_DELAY: Final = 0.25
MAX_DELAY: Final = 30.0
"""Seconds. The bound of the first wait after a lost connection, and of the longest; it doubles in between."""

LASTED: Final = 5.0
"""Seconds that a connection must last before the waits begin with the first again."""

EARLY: Final = 30.0
"""Seconds before its expiry that a token is renewed, at most."""


class Backoff:
    """Full jitter: each wait is anything up to a bound that doubles. `rng(a, b)` gives a number between both."""

    def __init__(self, rng: Callable[[float, float], float] = random.uniform) -> None:
        self.rng = rng

    def delay(self, attempts: int) -> float:
        """Give the seconds to wait after this many attempts in a row that failed."""
        return self.rng(0.0, min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempts - 1, 30)))


class Reconnection:
    """Decides how long to wait after a connection that failed or was lost."""

    def __init__(self, backoff: Backoff, token_function: bool) -> None:
        """`token_function`: whether a fresh token can be had."""
        self.attempts = 0
        """Connections that failed since the last one that lasted."""
        self.ever_connected = False
        self._backoff = backoff
        self._token_function = token_function
        self._token_refusals = 0
        self._connected_at: float | None = None
        self._bye_ms: int | None = None

    def begin(self) -> None:
        """A connection is being opened."""
        self._connected_at = self._bye_ms = None

    def connected(self, now: float) -> None:
        """The broker said `welcome`."""
        self._connected_at = now
        self.ever_connected = True

    def bye(self, retry_after_ms: int) -> None:
        """The broker said when to come back."""
        self._bye_ms = retry_after_ms

    def delay(self, failure: ClientError, now: float) -> float | None:
        """Decide how many seconds to wait before the next attempt. None: there is none.

        Adds the time that `bye` named to `failure`.
        """
        if isinstance(failure, Closed) and self._bye_ms is not None:
            failure.retry_after_ms = self._bye_ms
        if self._connected_at is not None and now - self._connected_at >= LASTED:
            self.attempts = self._token_refusals = 0
        self.attempts += 1
        if self._token_function and is_token_refused(failure) and self._token_refusals < 1:
            self._token_refusals += 1  # a fresh token may be accepted
            return 0.0
        if is_permanent(failure, self.ever_connected):
            return None
        if self._bye_ms is not None:
            return self._bye_ms / 1000
        if isinstance(failure, Refused) and failure.retry_after is not None:
            # All clients that were refused at the same time got the same number.
            return failure.retry_after + self._backoff.rng(0.0, FIRST_DELAY * 4)
        return self._backoff.delay(self.attempts)


class Renewal:
    """Decides when the token function is called again while there is a connection."""

    def __init__(self, backoff: Backoff, token_function: bool) -> None:
        self.due: float | None = None
        """When the token is to be fetched; None: it need not be, or is being fetched."""
        self._backoff = backoff
        self._token_function = token_function
        self._fetching = False
        self._failures = 0

    def identified(self, expires_in: float | None, now: float) -> None:
        """The broker has accepted a token, which expires in so many seconds (None: never)."""
        self._fetching = False
        self._failures = 0
        self.due = None
        if expires_in is not None and self._token_function:
            # Not all clients whose tokens are of the same moment at once.
            early = min(EARLY, expires_in * self._backoff.rng(0.1, 0.2))
            self.due = now + max(FIRST_DELAY, expires_in - early)

    def failed(self, now: float) -> None:
        """The token could not be fetched, or the broker refused it."""
        self._fetching = False
        self._failures += 1
        self.due = now + self._backoff.delay(self._failures)

    def unauthorized(self, now: float) -> None:
        """The broker refused a command for want of an identity: a fresh token may help."""
        if self._token_function and not self._fetching and self._failures == 0:
            self.due = now

    def stop(self) -> None:
        """There is no connection any more."""
        self.due = None
        self._fetching = False
        self._failures = 0

    def is_due(self, now: float) -> bool:
        """Whether to fetch a token now. After True, `identified` or `failed` must be called."""
        if self.due is None or self.due > now:
            return False
        self.due = None
        self._fetching = True
        return True


def is_permanent(failure: ClientError, ever_connected: bool) -> bool:
    """Whether it is of no use to connect again: the next connection would end in the same way."""
    if isinstance(failure, Closed):
        return 4500 <= failure.close_code <= 4999
    if isinstance(failure, Refused):
        # Other refusals may come from a proxy while the broker behind it is away.
        return failure.status in (401, 403) or (not failure.retry and not ever_connected and failure.status < 500)
    return isinstance(failure, NotABroker) and not ever_connected


def is_token_refused(failure: ClientError) -> bool:
    """Whether the broker refused the token, or it has expired."""
    if isinstance(failure, Closed):
        return failure.close_code in (4500, 4501)
    return isinstance(failure, Refused) and failure.status == 401
