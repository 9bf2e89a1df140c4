"""Commands that the broker answers: queued, sent, repeated, and timed out."""

from __future__ import annotations

import heapq
import itertools
from typing import Any

from wsbroker_client.actions import Finished, Outbox
from wsbroker_client.errors import ClientError, CommandRefused, ConnectionLost, TimedOut
from wsbroker_client.reconnection import Backoff
from wsbroker_client.states import Request, RequestState, move


class Requests:
    """All requests of a client that have no outcome yet."""

    def __init__(self, outbox: Outbox, backoff: Backoff) -> None:
        self.max_size: int | None = None
        """The broker's bound of a command, in bytes; None: there is no connection."""
        self._outbox = outbox
        self._backoff = backoff
        self._ids = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._timers: list[tuple[float, int]] = []
        """A heap of times, each with the id of a request, which may have ended."""

    def new(self, what: str, now: float, timeout: float, *, repeat: bool) -> Request:
        """Make a request; its payload is the caller's, and then `submit`. `timeout` in seconds, may be infinite."""
        return Request(next(self._ids), what, now + timeout, repeat)

    def submit(self, request: Request, now: float) -> None:
        """Send a request, or queue it while there is no connection."""
        self._requests[request.id] = request
        if request.deadline != float("inf"):
            if len(self._timers) > 64 + 4 * len(self._requests):
                self._timers = [each for each in self._timers if each[1] in self._requests]
                heapq.heapify(self._timers)
            heapq.heappush(self._timers, (request.deadline, request.id))
        if self.max_size is not None:
            self._send(request, self.max_size, now)

    def cancel(self, request: Request) -> None:
        """Forget a request."""
        if request.state is not RequestState.DONE:
            self._end(request)

    def connected(self, max_size: int) -> None:
        """There is a connection. `send_queued` sends the requests that waited for it."""
        self.max_size = max_size

    def send_queued(self, now: float) -> None:
        """Send the queued requests, in their order."""
        for request in list(self._requests.values()):
            if request.state is RequestState.QUEUED and request.not_before <= now and self.max_size is not None:
                self._send(request, self.max_size, now)

    def disconnected(self, failure: ClientError) -> None:
        """The connection has ended. Requests that may be repeated are queued again, the others fail."""
        self.max_size = None
        for request in list(self._requests.values()):
            if request.state is not RequestState.SENT:
                continue
            if request.repeat:
                move(request, RequestState.QUEUED)
            else:
                lost = f"{failure}; whether {request.what} was carried out is not known"
                self._finish(request, ConnectionLost(lost))

    def fail_all(self, failure: ClientError) -> None:
        """The client is closed."""
        self.max_size = None
        for request in list(self._requests.values()):
            self._finish(request, failure)

    def answered(self, message: dict[str, Any], now: float) -> None:
        """The broker has carried out a command."""
        request = self._sent(message)
        if request is None:
            return
        if request.answered is None:
            self._finish(request, message)
        else:
            self._end(request)
            request.answered(message, now)

    def refused(self, message: dict[str, Any], error: CommandRefused, now: float) -> bool:
        """The broker has refused a command. False: the error belongs to no request."""
        request = self._sent(message)
        if request is None:
            return False
        if error.retry and request.repeat:
            request.refusals += 1
            request.not_before = now + retry_delay(error, request.refusals, self._backoff)
            move(request, RequestState.QUEUED)
            heapq.heappush(self._timers, (request.not_before, request.id))
        else:
            self._refuse(request, error, now)
        return True

    def tick(self, now: float, failure: ClientError | None) -> None:
        """Fail requests that are out of time, and repeat those that are due. `failure`: why there is no connection."""
        while self._timers and self._timers[0][0] <= now:
            request = self._requests.get(heapq.heappop(self._timers)[1])
            if request is None:
                continue
            if request.deadline <= now:
                self._finish(request, _timed_out(request, failure))
            elif request.state is RequestState.QUEUED and request.not_before <= now and self.max_size is not None:
                self._send(request, self.max_size, now)

    @property
    def deadline(self) -> float | None:
        """When `tick` is due; None: not by itself."""
        while self._timers and self._timers[0][1] not in self._requests:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def _sent(self, message: dict[str, Any]) -> Request | None:
        number = message.get("id")
        request = self._requests.get(number) if isinstance(number, int) else None
        return request if request is not None and request.state is RequestState.SENT else None

    def _send(self, request: Request, most: int, now: float) -> None:
        size = len(request.payload)
        if size > most:
            message = f"the command has {size:,} bytes, the broker takes at most {most:,}"
            self._refuse(request, CommandRefused("limit", message), now)
            return
        move(request, RequestState.SENT)
        request.tried = True
        self._outbox.send(request.payload)

    def _refuse(self, request: Request, error: CommandRefused, now: float) -> None:
        if request.refused is None:
            self._finish(request, error)
        else:
            self._end(request)
            request.refused(error, now)

    def _finish(self, request: Request, outcome: dict[str, Any] | ClientError) -> None:
        self._end(request)
        self._outbox.add(Finished(request, outcome))

    def _end(self, request: Request) -> None:
        move(request, RequestState.DONE)
        self._requests.pop(request.id, None)


def retry_delay(error: CommandRefused, refusals: int, backoff: Backoff) -> float:
    """Give the seconds until a command may be repeated that was refused so many times."""
    return (error.retry_after_ms or 0) / 1000 + backoff.delay(refusals)


def _timed_out(request: Request, failure: ClientError | None) -> TimedOut:
    if request.tried:
        return TimedOut(f"{request.what} was not answered in time; whether it was carried out is not known", sent=True)
    because = "" if failure is None else f" ({failure})"
    return TimedOut(f"{request.what} was not sent in time: there was no connection{because}", sent=False)
