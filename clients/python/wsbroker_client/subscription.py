"""A subscription as the application has it: an iterator over its events, which gives credit back as they are taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Optional, TypeVar

from wsbroker_client.errors import ClientClosed, ClientError
from wsbroker_client.machine import Machine
from wsbroker_client.model import Event, Gap, Join, Leave, Live, Position
from wsbroker_client.states import Message, SubscriptionCore, SubscriptionState

T = TypeVar("T")

Callbacks = dict[type, Optional[Callable[[Any], object]]]
"""The callbacks for Gap, Live, Join and Leave, called when the iteration comes to one."""


class Subscription(Generic[T]):
    """One subscription, over as many connections as it takes. `Client.subscribe` makes it.

    Iterate over it for the events, or over `messages()` for gaps, joins and the like as well. At most `credit` events
    are on their way or wait here. Without an iteration no more come, and the broker's overflow policy applies.
    """

    def __init__(
        self,
        core: SubscriptionCore,
        machine: Machine,
        callbacks: Callbacks,
        flush: Callable[[], None],
        report: Callable[[BaseException], None],
    ) -> None:
        self._core = core
        self._machine = machine
        self._callbacks = callbacks
        self._flush = flush
        self._report = report
        self._gaps: list[Gap] = []
        self._waiters: set[asyncio.Future[None]] = set()
        core.tag = self

    @property
    def topic(self) -> str:
        """The topic or pattern."""
        return self._core.topic

    @property
    def state(self) -> SubscriptionState:
        """OFFLINE, ASKED, REPLAYING, LIVE or ENDED."""
        return self._core.state

    @property
    def error(self) -> ClientError | None:
        """Why it has ended, if not by `unsubscribe` or `close`."""
        return self._core.error

    @property
    def position(self) -> Position | None:
        """The newest event that has come, as `since` for another time. None where the topic keeps no history."""
        return self._core.position

    async def ready(self) -> None:
        """Wait until the broker has confirmed the subscription for the first time.

        Raises CommandRefused if the broker does not allow it, or the error that ended the client.
        """
        while not self._core.confirmed:
            if self._core.state is SubscriptionState.ENDED:
                raise self._core.error or ClientClosed("the subscription has ended")
            await self._wait()

    async def unsubscribe(self) -> None:
        """End it: iterations end, and events that were not taken are dropped."""
        self._machine.unsubscribe(self._core, asyncio.get_running_loop().time())
        self._flush()

    def __aiter__(self) -> AsyncIterator[Event[T]]:
        return self

    async def __anext__(self) -> Event[T]:
        """Give the next event. Raises StopAsyncIteration after the end, or the error that ended the subscription."""
        while (message := await self._next()) is not None:
            if isinstance(message, Event):
                return message
        raise StopAsyncIteration

    async def messages(self) -> AsyncIterator[Event[T] | Gap | Live | Join | Leave]:
        """Give everything in its order: events, gaps, `live` after a replay, joins and leaves."""
        while (message := await self._next()) is not None:
            yield message

    async def batch(self, most: int) -> list[Event[T]]:
        """Wait for an event, and give it with all others that are here, `most` of them at most."""
        events = [await self.__anext__()]
        while len(events) < most and (message := self._take()) is not None:
            if isinstance(message, Event):
                events.append(message)
        return events

    async def _next(self) -> Message | None:
        """Wait for the next message. None after the end; raises the error that ended the subscription."""
        while (message := self._take()) is None:
            if self._core.state is SubscriptionState.ENDED:
                if self._core.error is not None:
                    raise self._core.error
                return None
            await self._wait()
        return message

    def _take(self) -> Message | None:
        message = self._machine.take(self._core)
        if self._machine.busy:
            self._flush()
        if isinstance(message, Event):
            if self._gaps:
                message.gaps = tuple(self._gaps)
                self._gaps.clear()
        elif message is not None:
            if isinstance(message, Gap):
                self._gaps.append(message)
            self._call(message)
        return message

    def _call(self, message: Message) -> None:
        callback = self._callbacks.get(type(message))
        if callback is None:
            return
        try:
            callback(message)
        except Exception as error:  # noqa: BLE001 -- the application's own: it is told, and stops nobody else
            self._report(error)

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def wake(self) -> None:
        """Something has changed. For the client."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
