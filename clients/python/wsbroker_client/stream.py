"""A WebSocket that is read and written in batches.

The handshake, the frames and the close handshake are those of `websockets`. Its `send` and `recv` are not used: they
cost a system call and a switch of coroutines for each message. Here, messages that are written together go out in one
call, and all messages of one read are handed over at once, by a call instead of through a queue. Measured with small
events on one core: 16 µs instead of 28 to publish and get the answer, 6 µs instead of 12 to receive.

Exceptions of `websockets` and of sockets become a ClientError in this module.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.client import ClientProtocol
from websockets.exceptions import (
    InvalidMessage,
    InvalidProxy,
    InvalidState,
    InvalidStatus,
    InvalidURI,
    ProxyError,
    WebSocketException,
)
from websockets.frames import Frame, Opcode
from websockets.protocol import Event
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from wsbroker_client.errors import CLOSE_CODES, REFUSALS, ClientError, Closed, NotABroker, Refused, Unreachable
from wsbroker_client.wire import SUBPROTOCOL

MAX_MESSAGE: Final = 2**30 + 2**16
"""The largest message that is taken from the broker, in bytes: the largest event that a broker can be configured to
take, and room for what is around its data."""

CLOSE_TIMEOUT: Final = 5.0
"""How long the broker may take to end a connection that is being closed, in seconds. As the broker's own default."""

LOST: Final = 1006
"""RFC 6455, section 7.1.5: the code of a connection that ended without a close frame."""


class Receiver(Protocol):
    """The callbacks of a Stream. Both are called from the event loop and must not block."""

    def on_messages(self, messages: list[bytes]) -> None:
        """Called with complete messages, in order."""

    def on_closed(self, failure: ClientError) -> None:
        """Called once when the connection has ended, with the reason. No message follows."""


class Stream(ClientConnection):
    """One WebSocket to the broker. Until `attach` is called, it keeps the messages that arrive."""

    def __init__(self, protocol: ClientProtocol, **options: Any) -> None:
        super().__init__(protocol, **options)
        self.failure: ClientError | None = None
        """Why the connection is closed; None as long as it is not."""
        self._receiver: Receiver | None = None
        self._messages: list[bytes] = []
        self._partial = bytearray()
        self._reading = True
        self._last_read = self.loop.time()
        self._own_failure: ClientError | None = None
        self._abort_scheduled = False
        self._timers: list[tuple[float, asyncio.Handle]] = []
        """When each fires: a handle of uvloop whose time has come does not know it."""
        self._shutting_down = False

    def attach(self, receiver: Receiver) -> None:
        """Deliver the messages received so far, and all later ones, to `receiver`."""
        self._receiver = receiver
        self._deliver_messages()
        if self.failure is not None:
            receiver.on_closed(self.failure)

    async def write(self, payloads: Iterable[bytes]) -> None:
        """Send each payload, which is UTF-8, as a text message, and wait while the socket does not take them.

        Raises ClientError if the connection has ended or ends meanwhile.
        """
        try:
            self.send_now(payloads)
            await self.drain()
        except (InvalidState, OSError):
            await self.raise_when_closed()
        if self.failure is not None:
            raise self.failure

    def send_now(self, payloads: Iterable[bytes]) -> None:
        """Send each payload, which is UTF-8, as a text message. Bytes that the socket does not take wait in memory.

        Raises InvalidState if the connection has ended.
        """
        for payload in payloads:
            self.protocol.send_text(payload)
        self.transport.write(b"".join(self.protocol.data_to_send()))

    async def raise_when_closed(self) -> NoReturn:
        """Wait until the connection has ended. Raises the ClientError that says why."""
        await self.wait_closed()
        assert self.failure is not None
        raise self.failure

    def pause(self) -> None:
        """Stop reading until `resume`, so that TCP and the broker apply backpressure."""
        if self._reading:
            self._reading = False
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if not self._reading:
            self._reading = True
            self._last_read = self.loop.time()
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def watch_silence(self, silence: float) -> None:
        """End the connection when nothing at all was heard for `silence` seconds while it was being read."""
        left = self._last_read + silence - self.loop.time() if self._reading else silence
        if left > 0:
            self._call_later(left, self.watch_silence, silence)
        else:
            self.fail(
                Closed(f"nothing was heard from the broker for {silence:g} seconds", close_code=LOST, retry=True),
            )

    def fail(self, failure: ClientError) -> None:
        """End the connection at once, for this reason, without a close handshake."""
        self._own_failure = failure
        self.transport.abort()

    async def shut_down(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Close properly, with 1000, and wait for the broker's answer for `timeout` seconds at most.

        The receiver gets nothing more but the end.
        """
        self._shutting_down = True
        self.resume()
        try:
            await asyncio.wait_for(self.close(), timeout)
        except asyncio.TimeoutError:
            self.transport.abort()
            await self.wait_closed()
        except asyncio.CancelledError:
            self.transport.abort()
            raise

    # The following methods replace those of websockets' connection.

    def process_event(self, event: Event) -> None:
        """Collect messages; `websockets` would put each frame into a queue."""
        if self.response is None or not isinstance(event, Frame) or event.opcode not in _DATA:
            super().process_event(event)
        elif event.fin and event.opcode is not Opcode.CONT:
            self._messages.append(event.data if isinstance(event.data, bytes) else bytes(event.data))
        else:  # RFC 6455, section 5.4. The protocol has checked the order of the fragments and the sum of their sizes.
            self._partial += event.data
            if event.fin:
                self._messages.append(bytes(self._partial))
                self._partial.clear()

    def data_received(self, data: bytes) -> None:
        """Hand over all messages of one read together."""
        self._last_read = self.loop.time()
        super().data_received(data)
        self._deliver_messages()
        if not self._abort_scheduled and self.protocol.close_expected():
            # RFC 6455, section 7.1.1: the server closes the TCP connection first. One that does not is not waited for.
            self._abort_scheduled = True
            self._call_later(CLOSE_TIMEOUT, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Keep the reason of the end, and tell the receiver."""
        super().connection_lost(exc)
        for _, timer in self._timers:
            timer.cancel()
        self.failure = self._own_failure or self._closed_failure(exc)
        if self._receiver is not None:
            self._receiver.on_closed(self.failure)

    def _call_later(self, delay: float, call: Callable[..., None], *args: object) -> None:
        """Call after `delay` seconds, unless the connection has ended by then."""
        now = self.loop.time()
        self._timers = [each for each in self._timers if each[0] > now]
        self._timers.append((now + delay, self.loop.call_later(delay, call, *args)))

    def _deliver_messages(self) -> None:
        if self._messages and self._receiver is not None:
            messages, self._messages = self._messages, []
            if not self._shutting_down:
                self._receiver.on_messages(messages)

    def _closed_failure(self, exc: Exception | None) -> ClientError:
        wrong = self.protocol.parser_exc
        if wrong is not None and not isinstance(wrong, EOFError):
            return NotABroker(f"the data is not a valid WebSocket stream: {wrong}")
        if self._shutting_down:
            return Closed("this client has closed the connection", close_code=1000, retry=False)
        frame = self.protocol.close_rcvd
        if frame is None:
            cause = f" ({_reason(exc)})" if isinstance(exc, OSError) else ""
            return Closed(f"the connection to the broker was lost{cause}", close_code=LOST, retry=True)
        known = CLOSE_CODES.get(frame.code)
        if known is None:
            words = f"{int(frame.code)} {frame.reason}".rstrip()
            return Closed(
                f"the broker closed the connection: {words}", close_code=frame.code, retry=4000 <= frame.code < 4500
            )
        return Closed(
            f"the broker closed the connection: {int(frame.code)} {frame.reason or known.name} ({known.meaning})",
            close_code=frame.code,
            retry=known.reconnect,
        )


def check_url(url: str) -> None:
    """Check that this is an address to connect to: ws://…, wss://… or unix:/path. Raises ValueError."""
    if url.startswith("unix:"):
        if not url.startswith("unix:/"):
            raise ValueError(f"`{url}`: a Unix socket is written unix:/path, with the whole path")
        return
    if not url.startswith(("ws://", "wss://")):
        raise ValueError(f"`{url}` is neither ws://host:port, wss://host:port nor unix:/path")
    try:
        # The resolver encodes the name, too, and raises UnicodeError, which is a ValueError.
        parse_uri(url).host.encode("idna")
    except UnicodeError:
        raise ValueError("the host is no valid name: each part of it has 1 to 63 bytes") from None
    except (InvalidURI, ValueError) as error:
        raise ValueError(error.msg if isinstance(error, InvalidURI) else str(error)) from None


def trust(ca: Path | None) -> ssl.SSLContext:
    """Give the context that verifies a wss:// address, by the certificates in the file `ca` or by those of the system.

    Raises ValueError where the file cannot be used.
    """
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise ValueError(f"{ca} holds no certificate in PEM format") from None
    except OSError as error:
        raise ValueError(f"{ca} cannot be read: {error.strerror}") from None


async def open_stream(
    url: str, *, token: str | None = None, ca: Path | None = None, open_timeout: float = 10.0
) -> Stream:
    """Open a WebSocket to the broker at `url`. `token` goes into the request's Authorization header; `ca` is a file
    with certificates, one of which must vouch for that of a wss:// address, instead of those that the system trusts.

    Raises ValueError if `url` or `ca` is none, else Unreachable, Refused or NotABroker, after `open_timeout` seconds at
    most.
    """
    check_url(url)
    options: dict[str, Any] = {
        "subprotocols": [Subprotocol(SUBPROTOCOL)],
        # Where both sides run the broker's defaults it would not be negotiated anyway.
        "compression": None,
        "additional_headers": {"Authorization": f"Bearer {token}"} if token is not None else None,
        "open_timeout": open_timeout,
        # The broker pings; see Stream.watch. A ping of the client's own would end a connection whose reader is slow.
        "ping_interval": None,
        "close_timeout": None,  # Stream.leave has it
        "max_size": MAX_MESSAGE,
        "create_connection": Stream,
    }
    if url.startswith("wss:"):
        options["ssl"] = trust(ca)
    try:
        if url.startswith("unix:"):
            connection = await unix_connect(url.removeprefix("unix:"), **options)
        else:
            # A proxy of the environment is used as everywhere, but not to reach this very machine.
            connection = await connect(url, proxy=None if _is_loopback(url) else True, **options)
    except (TimeoutError, OSError, WebSocketException) as error:
        raise _open_failure(error, _redact(url), open_timeout) from error
    assert isinstance(connection, Stream)
    return connection


_DATA: Final = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})


def _open_failure(error: Exception, url: str, timeout: float) -> ClientError:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and getattr(error, "errno", None) is None:
        return Unreachable(f"{url} did not answer within {timeout:g} seconds")
    if isinstance(error, OSError):
        return Unreachable(f"cannot connect to {url}: {_reason(error)}")
    if isinstance(error, InvalidStatus):
        return _refusal(error, url)
    if isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError):
        return Unreachable(f"{url} closed the connection before it answered")
    if isinstance(error, (ProxyError, InvalidProxy)):
        return Unreachable(f"cannot connect to {url} through the proxy: {error}")
    return NotABroker(f"{url} is not a wsbroker: {error}")


def _refusal(error: InvalidStatus, url: str) -> Refused:
    """Say why the broker opens no WebSocket: in its own words, if they are plain text, or in those of the table."""
    response = error.response
    status = response.status_code
    words = (response.body or b"").decode("utf-8", "replace").strip()
    if "\n" in words or not 0 < len(words) <= 300 or not words.isprintable() or words.startswith("<"):
        words = REFUSALS.get(status, response.reason_phrase)
    after = response.headers.get("Retry-After", "")
    return Refused(
        f"{url} refused the connection: HTTP {status}: {words}",
        status=status,
        retry_after=int(after) if after.isascii() and after.isdigit() else None,
    )


def _reason(error: OSError) -> str:
    """Give the text of a system error, without numbers and addresses."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        # OpenSSL reports bytes that are not TLS as a wrong version.
        if error.reason in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG"):
            return "it does not speak TLS; the URL must begin with ws:// instead of wss://"
        return f"TLS: {error.reason or error}"
    # A host with several addresses gives one error that holds the texts of all.
    numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    if len(numbers) == 1:
        return os.strerror(numbers.pop()) if not _is_resolver(error) else str(error.strerror)
    return error.strerror or str(error) or type(error).__name__


def _is_resolver(error: OSError) -> bool:
    return type(error).__name__ == "gaierror"  # its numbers are not those of the system's calls


def _is_loopback(url: str) -> bool:
    host = parse_uri(url).host
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _redact(url: str) -> str:
    """Leave out a user name and password, which must not get into messages and logs."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)
