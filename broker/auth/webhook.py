"""An HTTP backend that decides who a client is: asked at connect, with cookies and other headers of its request.

Invariant: at most `concurrency` requests are under way, and at most MAX_WAITING clients wait for theirs. A backend that
does not answer costs clients a refusal with 503, and never the others their events.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import structlog

from broker.auth.breaker import Breaker
from broker.auth.tokens import TokenError, read_name, read_role_list
from broker.identity import Credentials, Denied, Identity

if TYPE_CHECKING:
    import aiohttp

log = structlog.get_logger(__name__)

MAX_BYTES: Final = 65_536
"""Bytes of an answer."""
MAX_WAITING: Final = 1000
"""Clients that wait for a request of theirs to begin."""
REFUSALS: Final = {301: 401, 302: 401, 303: 401, 307: 401, 308: 401, 401: 401, 403: 403}
"""Statuses of the backend that refuse a client, and what the client gets. A redirect leads to a login page."""
UNAVAILABLE: Final = Denied(503, "who you are cannot be found out now")
UNKNOWN: Final = Denied(401, "you are not logged in")
NOT_ALLOWED: Final = Denied(403, "you may not connect")

Answered = Callable[[Identity | Denied], None]


class Webhook:
    """Asks the backend. Needs a running loop from the first `ask` on."""

    def __init__(self, url: str, timeout: float, concurrency: int) -> None:
        self.url = url
        self.settings = (url, timeout, concurrency)
        self._timeout = timeout
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._breaker = Breaker()
        self._asking: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[Credentials, Answered]] = deque()

    def ask(self, credentials: Credentials, done: Answered) -> None:
        """Find out who a client is."""
        if len(self._asking) < self._concurrency:
            self._begin(credentials, done)
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append((credentials, done))
        else:
            done(UNAVAILABLE)

    async def finish(self) -> None:
        """Answer those who have asked, and close the connections."""
        while self._asking:
            await asyncio.wait(self._asking)
            await asyncio.sleep(0)  # those who waited begin
        await self.stop()

    async def stop(self) -> None:
        """Ask nobody any more, and call nobody."""
        self._waiting.clear()
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _begin(self, credentials: Credentials, done: Answered) -> None:
        loop = asyncio.get_running_loop()
        if not self._breaker.allow(loop.time()):
            done(UNAVAILABLE)
            return
        task = loop.create_task(self._ask(credentials, done))
        self._asking.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        while self._waiting and len(self._asking) < self._concurrency:
            self._begin(*self._waiting.popleft())

    async def _ask(self, credentials: Credentials, done: Answered) -> None:
        loop = asyncio.get_running_loop()
        try:
            result = await self._request(credentials)
        except WebhookError as error:
            log.warning("auth.url failed", url=self.url, reason=str(error))
            if self._breaker.fail(loop.time()):
                log.error("auth.url is left alone for a while", url=self.url)
            done(UNAVAILABLE)
        except asyncio.CancelledError:
            self._breaker.give_up(loop.time())
            raise
        else:
            self._breaker.succeed()
            done(result)

    async def _request(self, credentials: Credentials) -> Identity | Denied:
        """Ask once. Raises WebhookError."""
        # aiohttp takes a quarter of a second to import, and few brokers have a webhook.
        import aiohttp

        if self._session is None:
            # Without a cookie jar: one client's cookies must never be sent for another one.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                connector=aiohttp.TCPConnector(limit=self._concurrency),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        headers = [*credentials.headers, ("Accept", "application/json"), ("X-Forwarded-For", credentials.address)]
        try:
            async with self._session.get(self.url, headers=headers, allow_redirects=False) as response:
                if response.status in REFUSALS:
                    return UNKNOWN if REFUSALS[response.status] == 401 else NOT_ALLOWED
                if response.status != 200:
                    raise WebhookError(f"the status is {response.status}")
                content = bytearray()
                async for part in response.content.iter_chunked(16_384):
                    content += part
                    if len(content) > MAX_BYTES:
                        raise WebhookError(f"the answer has more than {MAX_BYTES} bytes")
        except TimeoutError:
            raise WebhookError(f"no answer within {self._timeout:g} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise WebhookError(type(error).__name__) from None  # its text may cite a header
        return read_answer(bytes(content))


class WebhookError(Exception):
    """A backend that does not answer, or not what it should."""


def read_answer(content: bytes) -> Identity:
    """Read the answer of the backend: an object with `identity`, and optionally `roles` and `expires_in`.

    Raises WebhookError.
    """
    try:
        answer: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise WebhookError("the answer is no JSON") from None
    if not isinstance(answer, Mapping):
        raise WebhookError("the answer is no object")
    try:
        name, roles = read_name(answer.get("identity"), "identity"), read_role_list(answer.get("roles"), "roles")
    except TokenError:
        raise WebhookError("the answer has no valid `identity`, or no valid `roles`") from None
    seconds = answer.get("expires_in")
    if seconds is None:
        return Identity(name, roles)
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds < math.inf or seconds > MOST_SECONDS:
        raise WebhookError("`expires_in` of the answer is no number of seconds")
    return Identity(name, roles, time.time() + seconds)


MOST_SECONDS: Final = 10 * 365 * 86_400
