"""The JSON Web Key Set of a login service (RFC 7517), fetched from one configured URL, in the background.

Invariant: no client waits for a fetch unless its token names an unknown key, and clients cause at most one fetch in
`MIN_INTERVAL` seconds. While the URL cannot be reached, the keys that were fetched last serve. No token names a URL.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from broker.auth.verification_keys import PublicKeys, UnusableKeyError, read_key_set

log = structlog.get_logger(__name__)

TIMEOUT: Final = 5.0
"""Seconds for one fetch, from the name of the host to the last byte."""
MAX_BYTES: Final = 256 * 1024
"""Bytes of a key set. Those of large services have some 10 kB."""
MIN_INTERVAL: Final = 30.0
"""Seconds between the beginnings of two fetches."""
MAX_INTERVAL: Final = 600.0
"""Seconds after which the keys are fetched again in any case, so that a withdrawn key ends."""


class KeySet:
    """The keys at one URL. `refresh` fetches them; `find` answers at once from those that were fetched last."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._keys: PublicKeys | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._began: float | None = None
        """When the last fetch began, in the loop's time."""
        self._waiting: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_fetched(self) -> bool:
        """Whether there are keys."""
        return self._keys is not None

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """Find the keys for this algorithm and `kid` among those that were fetched last."""
        return [] if self._keys is None else self._keys.find(algorithm, kid)

    def start(self) -> None:
        """Fetch the keys, now and from time to time. Needs a running loop. Idempotent."""
        if self._timer is None and self._fetching is None:
            self._fetch()

    def stop(self) -> None:
        """Fetch nothing any more, and call nobody."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._fetching is not None:
            self._fetching.cancel()

    def refresh(self, then: Callable[[], None]) -> bool:
        """Call `then` after the fetch that is under way, or that begins now. False: it is too early for another one."""
        if self._fetching is None:
            now = asyncio.get_running_loop().time()
            if self._began is not None and now - self._began < MIN_INTERVAL:
                return False
            self._fetch()
        self._waiting.append(then)
        return True

    async def fetch_now(self) -> None:
        """Fetch the keys once, for a program that is no broker. Raises KeySetError."""
        self._keys = await fetch(self.url)

    def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._began = loop.time()
        self._fetching = loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            keys = await fetch(self.url)
        except KeySetError as error:
            log.warning("key set not fetched", url=self.url, reason=str(error))
            after = MIN_INTERVAL
        else:
            log.info("key set fetched", url=self.url, keys=len(keys))
            self._keys = keys
            after = MAX_INTERVAL
        self._fetching = None
        self._timer = asyncio.get_running_loop().call_later(after, self._fetch)
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()


class KeySetError(Exception):
    """A key set that cannot be fetched, or is none."""


async def fetch(url: str) -> PublicKeys:
    """Fetch a key set. Raises KeySetError."""
    # aiohttp takes a quarter of a second to import, and few brokers have a URL.
    import aiohttp

    # No redirect, no proxy of the environment and no cookie: what is asked is this URL and nothing else.
    options: dict[str, Any] = {"trust_env": False, "cookie_jar": aiohttp.DummyCookieJar()}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, **options) as session,
            session.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as response,
        ):
            if response.status != 200:
                raise KeySetError(f"the status is {response.status}")
            content = bytearray()
            async for part in response.content.iter_chunked(16_384):
                content += part
                if len(content) > MAX_BYTES:
                    raise KeySetError(f"the answer has more than {MAX_BYTES} bytes")
    except TimeoutError:
        raise KeySetError(f"no answer within {TIMEOUT:g} seconds") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise KeySetError(f"{type(error).__name__}: {error}") from None
    try:
        return read_key_set(json.loads(bytes(content)))
    except UnusableKeyError as error:
        raise KeySetError(str(error)) from None
    except (ValueError, RecursionError):
        raise KeySetError("the answer is no JSON") from None
