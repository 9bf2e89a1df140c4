"""The client for asyncio: carries out the decisions of `machine`. All I/O of the library is here and in `stream`."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Union, overload

from websockets.exceptions import InvalidState

from wsbroker_client.actions import Action, Changed, Close, FetchToken, Finished, Open, Report, Send, Wake
from wsbroker_client.errors import ClientError, CommandRefused, TokenFailed, Unreachable
from wsbroker_client.machine import RELIABLE_AGE, Machine
from wsbroker_client.model import (
    Event,
    Gap,
    Join,
    Leave,
    Live,
    Member,
    Position,
    Receipt,
    decoder_for,
    receipt_of,
)
from wsbroker_client.states import Request, State
from wsbroker_client.stream import Stream, check_url, open_stream
from wsbroker_client.subscription import Subscription
from wsbroker_client.subscriptions import WINDOW
from wsbroker_client.wire import DEFAULT_URL, PAGE, Default, encode_data

T = TypeVar("T")

Token = Union[str, Callable[[], Union[str, Awaitable[str]]], None]


class Client:
    """A client of one broker. It connects on `async with`, on `connect()`, and again after each loss.

    - `url`: ws://…, wss://… or unix:/path; `ca`: a file of certificates to trust there, in place of the system's.
    - `token`: a token, or a function or coroutine function that fetches one: it is called for each connection, and
      before the token expires.
    - `timeout`: seconds that a call waits for its answer, and a new connection for `welcome`.
    - `default`: called for a value that orjson cannot serialise.
    - `on_state(Changed)` is called with each state, `on_error(exception)` with each error that no call waits for (by
      default it goes to the exception handler of the loop).
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: Token = None,
        ca: Path | None = None,
        timeout: float = 10.0,
        default: Default | None = None,
        on_state: Callable[[Changed], object] | None = None,
        on_error: Callable[[BaseException], object] | None = None,
    ) -> None:
        check_url(url)
        if isinstance(token, str) and not (token.isascii() and token.isprintable()):
            raise ValueError("a token is printable ASCII without blanks")
        self.url = url
        self.timeout = timeout
        self._token = token
        self._ca = ca
        self._default = default
        self._on_state = on_state
        self._on_error = on_error
        self._machine = Machine(token_function=callable(token))
        self._stream: Stream | None = None
        self._receiver: _Receiver | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[None] | None = None
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0  # a handle of uvloop whose time has come does not know it
        self._patience: asyncio.TimerHandle | None = None
        """Ends when `welcome` has come, or the connection is lost."""
        self._state_waiters: set[asyncio.Future[None]] = set()
        self._flushing = False

    # The connection

    @property
    def state(self) -> State:
        """IDLE, CONNECTING, CONNECTED, WAITING or CLOSED."""
        return self._machine.state

    @property
    def failure(self) -> ClientError | None:
        """Why there is no connection, where there was or should be one."""
        return self._machine.failure

    @property
    def welcome(self) -> dict[str, Any]:
        """The `welcome` of the last connection: version, session, limits of the broker. Empty before the first one."""
        return self._machine.welcome

    async def connect(self, timeout: float | None = None) -> None:
        """Connect, and wait for it: for ever, or `timeout` seconds at most.

        Raises TimeoutError (asyncio's) with the last failure as its cause, or the error that closed the client.
        """
        self._machine.connect()
        self._flush()
        try:
            await asyncio.wait_for(self._until_connected(), timeout)
        except TimeoutError as error:
            raise error from self.failure

    async def close(self) -> None:
        """Say goodbye with 1000, end iterators, fail all calls. The client cannot be used again."""
        self._machine.close()
        self._flush()
        if self._opening is not None:
            self._opening.cancel()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    async def __aenter__(self) -> Client:  # noqa: PYI034 -- Self is of Python 3.11
        """Begin to connect, without waiting. Calls wait until there is a connection."""
        self._machine.connect()
        self._flush()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Publish and subscribe

    async def publish(
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
        """Publish one event, and wait for the broker's receipt.

        With `reliable` (or a `dedup` of the application's own) it is repeated until the broker answers, which does not
        deliver it twice. Without, a connection that is lost before the answer raises ConnectionLost. While there is no
        connection it waits up to `timeout` seconds (by default the client's, a minute for a reliable publish), or with
        `queue=False` raises NotConnected at once.

        Raises CommandRefused, ConnectionLost, NotConnected, TimedOut, the error that closed the client, and TypeError
        for data that cannot be serialised.
        """
        if reliable and dedup is None:
            dedup = secrets.token_urlsafe(15)
        if timeout is None:
            timeout = self.timeout if dedup is None else max(self.timeout, RELIABLE_AGE / 2)
        value = encode_data(data, self._default)
        request = self._machine.publish(topic, value, _now(), key=key, dedup=dedup, timeout=timeout, queue=queue)
        return receipt_of(await self._outcome(request))

    @overload
    def subscribe(
        self,
        topic: str,
        *,
        type: type[T],
        overflow: str | None = None,
        max_queue: int | None = None,
        credit: int = WINDOW,
        echo: bool | None = None,
        since: Position | None = None,
        last: int | str | None = None,
        presence: bool | None = None,
        info: Any = None,
        on_gap: Callable[[Gap], object] | None = None,
        on_live: Callable[[Live], object] | None = None,
        on_join: Callable[[Join], object] | None = None,
        on_leave: Callable[[Leave], object] | None = None,
    ) -> Subscription[T]: ...
    @overload
    def subscribe(
        self,
        topic: str,
        *,
        type: None = None,
        overflow: str | None = None,
        max_queue: int | None = None,
        credit: int = WINDOW,
        echo: bool | None = None,
        since: Position | None = None,
        last: int | str | None = None,
        presence: bool | None = None,
        info: Any = None,
        on_gap: Callable[[Gap], object] | None = None,
        on_live: Callable[[Live], object] | None = None,
        on_join: Callable[[Join], object] | None = None,
        on_leave: Callable[[Leave], object] | None = None,
    ) -> Subscription[Any]: ...
    def subscribe(
        self,
        topic: str,
        *,
        overflow: str | None = None,
        max_queue: int | None = None,
        credit: int = WINDOW,
        echo: bool | None = None,
        since: Position | None = None,
        last: int | str | None = None,
        presence: bool | None = None,
        info: Any = None,
        type: Any = None,  # the contract's word
        on_gap: Callable[[Gap], object] | None = None,
        on_live: Callable[[Live], object] | None = None,
        on_join: Callable[[Join], object] | None = None,
        on_leave: Callable[[Leave], object] | None = None,
    ) -> Subscription[Any]:
        """Subscribe to a topic or pattern, now and after each reconnection. Iterate over the result.

        `credit` is how many events may be under way to this program and not taken from the iterator. `type` is a
        pydantic model, or a type that msgspec decodes. The callbacks are called when the iteration comes to the place.
        The other options are those of the protocol. Raises AlreadySubscribed, ValueError, or the error that closed the
        client.
        """
        if credit < 1:
            raise ValueError("`credit` is at least 1")
        if since is not None and last is not None:
            raise ValueError("`since` and `last` exclude each other")
        if presence is None and (on_join is not None or on_leave is not None):
            presence = True
        options = {"overflow": overflow, "max_queue": max_queue, "echo": echo, "presence": presence, "info": info}
        start = {"since": None if since is None else since._asdict(), "last": last}
        core = self._machine.subscribe(
            topic,
            {name: value for name, value in options.items() if value is not None},
            {name: value for name, value in start.items() if value is not None},
            _now() if self.state is State.CONNECTED else 0.0,
            window=credit,
            decode=decoder_for(type),
        )
        callbacks = {Gap: on_gap, Live: on_live, Join: on_join, Leave: on_leave}
        subscription: Subscription[Any] = Subscription(core, self._machine, callbacks, self._flush, self._tell)
        self._flush()
        return subscription

    async def history(
        self, topic: str, *, since: Position | None = None, last: int | None = None
    ) -> AsyncIterator[Event[Any]]:
        """Give the kept events of a topic, the oldest first: after `since`, or the `last` ones, or all.

        Raises CommandRefused (`no_history`, …) and the errors of `publish`. If the numbering begins anew meanwhile, it
        raises CommandRefused with the code `epoch`.
        """
        epoch = since.epoch if since is not None else None
        offset = since.offset if since is not None else 0
        if epoch is None:
            page = await self._ask("history", topic=topic, last=1, limit=1)
            epoch = page["epoch"]
            offset = 0 if last is None else max(0, page["offset"] - last)
        while True:
            page = await self._ask("history", topic=topic, since={"epoch": epoch, "offset": offset}, limit=PAGE)
            if page["epoch"] != epoch:
                raise CommandRefused("epoch", f"the history of {topic} has begun anew")
            for each in page["events"]:
                yield Event(topic, each.get("key"), encode_data(each["data"]), each["offset"])
                offset = each["offset"]
            if not page.get("more") or not page["events"]:
                return

    async def presence(self, topic: str) -> AsyncIterator[Member]:
        """Give the members of a topic. Raises CommandRefused (`no_presence`, …) and the errors of `publish`."""
        after: str | None = None
        while True:
            page = await self._ask("presence", topic=topic, after=after, limit=PAGE)
            for each in page["members"]:
                yield Member(each["session"], each.get("identity"), each.get("info"))
            after = page.get("more")
            if not after:
                return

    async def ping(self) -> None:
        """Ask the broker for an answer."""
        await self._ask("ping")

    # The actions of the machine

    async def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return await self._outcome(self._machine.ask(op, _now(), timeout=self.timeout, **fields))

    async def _outcome(self, request: Request) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        request.tag = future
        self._flush()
        try:
            return await future
        finally:
            self._machine.cancel(request)

    async def _until_connected(self) -> None:
        while self.state is not State.CONNECTED:
            if self.state is State.CLOSED:
                assert self.failure is not None
                raise self.failure
            waiter = asyncio.get_running_loop().create_future()
            self._state_waiters.add(waiter)
            try:
                await waiter
            finally:
                self._state_waiters.discard(waiter)

    def _flush(self) -> None:
        """Carry out the actions of the machine. A callback of the application may call the client again meanwhile."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._machine.busy:
                for action in self._machine.take_actions():
                    self._do(action)
        finally:
            self._flushing = False
        self._set_timer()

    def _do(self, action: Action) -> None:
        if isinstance(action, Send):
            if self._stream is not None:
                with contextlib.suppress(InvalidState):  # it has ended, and `lost` is about to be called
                    self._stream.send_now(action.payloads)
        elif isinstance(action, Wake):
            action.subscription.tag.wake()
        elif isinstance(action, Finished):
            self._finish(action)
        elif isinstance(action, Changed):
            self._changed(action)
        elif isinstance(action, Open):
            self._opening = self._spawn(self._open())
        elif isinstance(action, FetchToken):
            self._spawn(self._renew())
        elif isinstance(action, Close):
            self._drop_stream(action.failure)
        elif isinstance(action, Report):
            self._tell(action.error)

    def _finish(self, action: Finished) -> None:
        future = action.request.tag
        if future is None or future.done():
            return
        if isinstance(action.outcome, ClientError):
            future.set_exception(action.outcome)
        else:
            future.set_result(action.outcome)

    def _changed(self, change: Changed) -> None:
        if self._patience is not None:
            self._patience.cancel()
        if change.state is State.CONNECTED and self._stream is not None and self.welcome["ping"] > 0:
            # Two pings and a half: one may be late by as much as it takes to send a large event.
            self._stream.watch_silence(self.welcome["ping"] * 2.5)
        if change.state in (State.WAITING, State.CLOSED) and self._receiver is not None:
            self._receiver.client = None
        for waiter in self._state_waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._on_state is not None:
            try:
                self._on_state(change)
            except Exception as error:  # noqa: BLE001 -- the application's own
                self._tell(error)

    async def _open(self) -> None:
        try:
            token = await self._fetch_token()
            self._stream = stream = await open_stream(self.url, token=token, ca=self._ca, open_timeout=self.timeout)
        except (ClientError, ValueError) as error:
            failure = error if isinstance(error, ClientError) else Unreachable(str(error))
            self._machine.lost(failure, _now())
            self._flush()
            return
        if self.state is not State.CONNECTING:
            await stream.shut_down()
            return
        self._receiver = _Receiver(self)
        self._patience = asyncio.get_running_loop().call_later(self.timeout, self._check_welcome, stream)
        stream.attach(self._receiver)

    def _check_welcome(self, stream: Stream) -> None:
        if self.state is State.CONNECTING and stream is self._stream:
            stream.fail(Unreachable(f"the other side sent no `welcome` within {self.timeout:g} seconds"))

    async def _fetch_token(self) -> str | None:
        if not callable(self._token):
            return self._token
        try:
            token = self._token()
            token = token if isinstance(token, str) else await token
        except Exception as error:
            raise TokenFailed(f"the token function failed: {error!r}") from error
        if not (token and token.isascii() and token.isprintable() and " " not in token):
            raise TokenFailed("the token function returned no token: a token is printable ASCII without blanks")
        return token

    async def _renew(self) -> None:
        try:
            token: str | ClientError | None = await self._fetch_token()
        except TokenFailed as failure:
            token = failure
        assert token is not None
        self._machine.renew(token, _now())
        self._flush()

    def _drop_stream(self, failure: ClientError | None) -> None:
        stream, self._stream = self._stream, None
        if self._receiver is not None:
            self._receiver.client = None
        if stream is None:
            return
        if failure is not None:
            stream.fail(failure)
        else:
            self._spawn(stream.shut_down())

    def on_messages(self, messages: list[bytes]) -> None:
        """Messages have come. For the stream."""
        self._machine.received(messages, _now())
        self._flush()

    def on_closed(self, failure: ClientError) -> None:
        """The connection has ended. For the stream."""
        self._stream = None
        self._machine.lost(failure, _now())
        self._flush()

    def _set_timer(self) -> None:
        deadline = self._machine.deadline
        if self._timer is not None:
            # One that comes too early only looks again.
            if deadline is not None and self._timer_at <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer_at = deadline
            self._timer = asyncio.get_running_loop().call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        # The clock of some loops is coarser than their timers.
        self._machine.tick(max(_now(), self._machine.deadline or 0.0) if self._is_due() else _now())
        self._flush()

    def _is_due(self) -> bool:
        deadline = self._machine.deadline
        return deadline is not None and deadline - _now() < 0.002

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._tell(task.exception())

    def _tell(self, error: BaseException | None) -> None:
        if error is None:
            return
        if self._on_error is not None:
            self._on_error(error)
        else:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "wsbroker_client: an error that no call waits for", "exception": error}
            )


class _Receiver:
    """Stands between a stream and its client, so that a stream that was given up is not heard any more."""

    def __init__(self, client: Client) -> None:
        self.client: Client | None = client

    def on_messages(self, messages: list[bytes]) -> None:
        if self.client is not None:
            self.client.on_messages(messages)

    def on_closed(self, failure: ClientError) -> None:
        if self.client is not None:
            self.client.on_closed(failure)


def _now() -> float:
    return asyncio.get_running_loop().time()
