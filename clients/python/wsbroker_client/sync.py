"""The client for threads and scripts: the same calls as `wsbroker_client.Client`, blocking. Ctrl-C interrupts them.

    with Client() as client:
        client.publish("prices.eurusd", {"bid": 1.0843}, key="eurusd")
        for event in client.subscribe("orders.>"):
            print(event.data)

One thread with an event loop of its own does the work; any number of threads may call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from wsbroker_client import client as asynchronous
from wsbroker_client.actions import Changed
from wsbroker_client.errors import ClientClosed, ClientError
from wsbroker_client.model import Event, Member, Position, Receipt
from wsbroker_client.states import State, SubscriptionState
from wsbroker_client.subscription import Subscription as AsyncSubscription
from wsbroker_client.wire import DEFAULT_URL, Default

T = TypeVar("T")

BATCH = 64
"""Events that a `for` loop takes over from the other thread at once. They count as taken."""


class Client:
    """A client of one broker for threads. It connects at `with` or `connect()`, and again after each loss.

    The parameters are those of `wsbroker_client.Client`. Callbacks are called on the thread of the client, and must not
    call it.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: str | Callable[[], str] | None = None,
        ca: Path | None = None,
        timeout: float = 10.0,
        default: Default | None = None,
        on_state: Callable[[Changed], object] | None = None,
        on_error: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._client = asynchronous.Client(
            url,
            token=_in_thread(token) if callable(token) else token,
            ca=ca,
            timeout=timeout,
            default=default,
            on_state=on_state,
            on_error=on_error,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="wsbroker-client", daemon=True)
        self._closed = False
        self._thread.start()

    @property
    def state(self) -> State:
        """IDLE, CONNECTING, CONNECTED, WAITING or CLOSED."""
        return self._client.state

    @property
    def failure(self) -> ClientError | None:
        """Why there is no connection, where there was or should be one."""
        return self._client.failure

    def connect(self, timeout: float | None = None) -> None:
        """Connect, and wait for it. Raises as `wsbroker_client.Client.connect` does."""
        self._wait(self._client.connect(timeout))

    def close(self) -> None:
        """Say goodbye, end iterators, fail all calls, end the thread."""
        if self._closed:
            return
        try:
            self._wait(self._client.close())
        finally:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> Client:  # noqa: PYI034 -- Self is of Python 3.11
        """Begin to connect. It is not waited for."""
        self._wait(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def publish(
        self,
        topic: str,
        data: Any,
        *,
        key: str | None = None,
        dedup: str | None = None,
        reliable: bool = False,
        timeout: float | None = None,
        queue: bool = True,
    ) -> Receipt:
        """Publish one event, and wait for the broker's receipt. As `wsbroker_client.Client.publish`."""
        return self._wait(
            self._client.publish(topic, data, key=key, dedup=dedup, reliable=reliable, timeout=timeout, queue=queue)
        )

    def subscribe(self, topic: str, **options: Any) -> Subscription[Any]:
        """Subscribe to a topic or pattern. The options are those of `wsbroker_client.Client.subscribe`."""

        async def subscribe() -> AsyncSubscription[Any]:
            return self._client.subscribe(topic, **options)

        return Subscription(self, self._wait(subscribe()))

    def history(self, topic: str, *, since: Position | None = None, last: int | None = None) -> Iterator[Event[Any]]:
        """Give the kept events of a topic. As `wsbroker_client.Client.history`."""
        return self._iterate(self._client.history(topic, since=since, last=last))

    def presence(self, topic: str) -> Iterator[Member]:
        """Give the members of a topic. As `wsbroker_client.Client.presence`."""
        return self._iterate(self._client.presence(topic))

    def ping(self) -> None:
        """Ask the broker for an answer."""
        self._wait(self._client.ping())

    def _iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        async def step() -> tuple[T] | None:
            try:
                return (await items.__anext__(),)
            except StopAsyncIteration:
                return None

        while (item := self._wait(step())) is not None:
            yield item[0]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the other thread and wait for it. An interrupt cancels it."""
        if self._closed:
            work.close()
            raise ClientClosed("the application closed this client")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                # Windows interrupts no wait that has no end; the others do.
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    return future.result(0.2 if sys.platform == "win32" else None)
                if future.done():
                    return future.result()
        except BaseException:
            future.cancel()
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


class Subscription(Generic[T]):
    """One subscription, over as many connections as it takes. Iterate over it for the events."""

    def __init__(self, client: Client, subscription: AsyncSubscription[T]) -> None:
        self._client = client
        self._subscription = subscription
        self._taken: list[Event[T]] = []

    @property
    def topic(self) -> str:
        """The topic or pattern."""
        return self._subscription.topic

    @property
    def state(self) -> SubscriptionState:
        """OFFLINE, ASKED, REPLAYING, LIVE or ENDED."""
        return self._subscription.state

    @property
    def position(self) -> Position | None:
        """The newest event that has come, as `since` for another time."""
        return self._subscription.position

    def ready(self) -> None:
        """Wait until the broker has confirmed the subscription for the first time."""
        self._client._wait(self._subscription.ready())

    def unsubscribe(self) -> None:
        """End it: iterations end, and events that were not taken are dropped."""
        self._client._wait(self._subscription.unsubscribe())
        self._taken.clear()

    def __iter__(self) -> Iterator[Event[T]]:
        return self

    def __next__(self) -> Event[T]:
        """Give the next event. Raises StopIteration after the end, or the error that ended the subscription."""
        if not self._taken:
            try:
                self._taken = self._client._wait(self._batch())[::-1]
            except ClientClosed:
                raise StopIteration from None
            if not self._taken:
                raise StopIteration
        return self._taken.pop()

    async def _batch(self) -> list[Event[T]]:
        try:
            return await self._subscription.batch(BATCH)
        except StopAsyncIteration:
            return []


def _in_thread(function: Callable[[], str]) -> Callable[[], Coroutine[Any, Any, str]]:
    """Call a token function, which may take its time, on another thread than that of the loop."""

    async def fetch() -> str:
        return await asyncio.get_running_loop().run_in_executor(None, function)

    return fetch
