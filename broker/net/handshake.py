"""The opening handshake: one accepted socket until the upgrade, or until an HTTP refusal (RFC 6455, section 4.2).

Bytes are collected until the head of the request is complete; bytes after it are passed on unchanged. websockets parses
the head, and its `ServerProtocol` checks what RFC 6455 requires; path, Host, Origin and capacity are checked here.
Invariant: nothing of a handshake outlives the upgrade, not even a reference cycle for the garbage collector.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Generator, Mapping, Sequence
from email.utils import formatdate
from io import BytesIO
from typing import Any, cast

import structlog
from websockets.exceptions import (
    InvalidHandshake,
    InvalidHeader,
    InvalidHeaderValue,
    InvalidMethod,
    InvalidProtocol,
    InvalidUpgrade,
    NegotiationError,
    SecurityError,
)
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from broker import messages
from broker.errors import REFUSALS
from broker.net.limiter import REFUSED_TIMEOUT, ConnectionLimiter

HEALTH_PATH = "/healthz"
HEALTH_METHODS = ("GET", "HEAD")
SUBPROTOCOL = Subprotocol(messages.SUBPROTOCOL)
SERVER = "wsbroker"

MAX_HEAD = 16 * 1024
"""Bytes of a request's head. Apache and nginx take 8 kB in a line, Node 16 kB in all; a browser with a full cookie
jar sends some 8 kB."""

HEAD_END = b"\r\n\r\n"
BARE_LF = re.compile(rb"(?<!\r)\n")
BODY_HEADERS = re.compile(rb"^(?:content-length|transfer-encoding)[ \t]*:[^\n]*\n", re.IGNORECASE | re.MULTILINE)
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]/?#@:\s]*)(?::[0-9]*)?")
# The first byte of a method is one of a token (RFC 9110, section 5.6.2). TLS, SSH and the like begin with others.
TOKEN_CHARACTERS = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")

UPGRADE_RESPONSE = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\n"
    b"Connection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %s\r\n"
    b"Server: wsbroker\r\n"
    b"%s"
    b"\r\n"
)
EXTENSIONS_HEADER = b"Sec-WebSocket-Extensions: %s\r\n"
PROTOCOL_V1 = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n".encode()

MALFORMED = (ValueError, EOFError, NotImplementedError)
"""What websockets raises for a request that it cannot parse."""

REFUSAL_REASONS = {
    200: "",
    400: "malformed",
    401: "unauthorized",
    403: "origin",
    404: "not_found",
    426: "upgrade_required",
    429: "address_limit",
    431: "header_too_large",
}
"""Reasons of refusals in the metrics, by HTTP status."""

UNAVAILABLE = {"full": "the broker is full", "memory": "the broker is out of memory"}

NO_HEADERS: Mapping[str, str] = {}
UPGRADE: Mapping[str, str] = {"Upgrade": "websocket"}

log = structlog.get_logger(__name__)


class Handshake(asyncio.Protocol):
    """The protocol of an accepted socket until the upgrade, or until the refused client has read its answer.

    `loopback`: the listener is on loopback; `unix`: it is a Unix socket.
    """

    __slots__ = ("_forwarded", "_head", "_limiter", "_loopback", "_transport", "_unix", "began", "has_slot")

    def __init__(self, limiter: ConnectionLimiter, loopback: bool = False, unix: bool = False) -> None:
        self.has_slot = False
        """Whether the limiter has reserved a slot for this connection; set by the limiter."""
        self.began = 0.0
        """When it was accepted; set by the limiter."""
        self._limiter = limiter
        self._loopback = loopback
        self._unix = unix
        # The client's address from a trusted proxy.
        self._forwarded: str | None = None
        # The head received so far; None once all further bytes are discarded.
        self._head: bytes | bytearray | None = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._limiter.track(self):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        head = self._head
        if head is None:
            return
        seen = len(head)
        if seen:
            # Grows in place, so that a head that comes byte by byte is not copied with each.
            self._head = head = head if isinstance(head, bytearray) else bytearray(head)
            head += data
        else:
            self._head = head = data
        end = head.find(HEAD_END, max(0, seen - 3))
        try:
            if end < 0:
                check_start(head, seen)
                return
            end += len(HEAD_END)
            if end > MAX_HEAD:
                raise HTTPResponse(431, f"the head of the request is longer than {MAX_HEAD} bytes")
            self._handle_request(bytes(head[:end]), bytes(head[end:]))
        except HTTPResponse as answer:
            self._send_response(answer)

    def eof_received(self) -> None:
        """Let the transport close itself after it has sent its buffer."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._head = None
        self._transport = None
        self._limiter.untrack(self)

    def expire(self) -> None:
        """Abort: the time for the handshake, or for reading the answer, is over."""
        if self._head is not None:
            self._limiter.count_refusal(0, "timeout")
            log.debug("handshake timeout", peer=self._peer_name())
        self._limiter.untrack(self)
        if self._transport is not None:
            self._transport.abort()

    def refuse_draining(self) -> None:
        """Refuse it, because the broker shuts down before the request is complete."""
        self._send_response(draining_response(self._limiter))

    def _handle_request(self, head: bytes, rest: bytes) -> None:
        limiter = self._limiter
        request = parse_request(head)
        if forwarded := request.headers.get_all("X-Forwarded-For"):
            self._forwarded = limiter.proxies.resolve_client(self._peer_host(), forwarded)
        hosts = request.headers.get_all("Host")
        check_host(hosts, request.protocol)
        path = extract_path(request.path)
        if path == HEALTH_PATH:
            if request.method not in HEALTH_METHODS:
                raise HTTPResponse(426, "only GET and HEAD are answered here", UPGRADE)
            raise draining_response(limiter) if limiter.draining else HTTPResponse(200, "ok")
        if path != limiter.path:
            raise HTTPResponse(404, f"there is nothing at this path; the WebSocket is at {limiter.path}")
        if limiter.draining:
            raise draining_response(limiter)
        peer = self._peer_name()
        if limiter.over_address_limit(peer):
            raise HTTPResponse(429, "there are too many connections of this address", retry_after(limiter))
        if not limiter.reserve_slot(self):
            limiter.reject()
            reason = limiter.unavailable_reason or "full"
            raise HTTPResponse(503, UNAVAILABLE[reason], retry_after(limiter), reason)
        upgrade_response, window_bits = make_upgrade_response(
            request, NEGOTIATION_WITH_COMPRESSION if limiter.compression else NEGOTIATION
        )
        origins = request.headers.get_all("Origin")
        if origins and not limiter.origins.allow(origins[0], hosts[0], loopback=self._loopback):
            log.info("origin refused", origin=origins[0], host=hosts[0], peer=self._peer_name())
            raise HTTPResponse(403, "pages of this origin may not connect; those that may are listed in server.origins")
        transport = self._transport
        assert transport is not None
        self._head = None
        self._transport = None
        limiter.establish(self, peer)
        limiter.node.connect(transport, upgrade_response, rest, peer, window_bits)

    def _send_response(self, answer: HTTPResponse) -> None:
        transport = self._transport
        assert transport is not None
        bodiless = self._head is not None and self._head[:5] == b"HEAD "
        self._head = None
        if answer.status >= 400:
            self._limiter.count_refusal(answer.status, answer.reason)
            log.debug("request refused", status=answer.status, reason=answer.text, peer=self._peer_name())
        lingers = self._limiter.drain_refused(self)
        transport.write(answer.serialize(bodiless=bodiless))
        # A socket that is closed while bytes from the client are unread answers with a reset, and the reset destroys
        # what the client has not read yet (RFC 9112, section 9.6). So say that nothing more comes, and read until the
        # client has closed, for a while.
        if not transport.can_write_eof():
            # TLS has its own way to say so, and to wait for the answer.
            transport.close() if lingers else transport.abort()
        elif lingers:
            transport.write_eof()
        else:
            transport.close()

    def _peer_host(self) -> str | None:
        """The IP address of the peer; None for a Unix socket."""
        name = None if self._unix or self._transport is None else self._transport.get_extra_info("peername")
        return None if name is None else str(name[0])

    def _peer_name(self) -> str:
        # For the peer of a Unix socket, uvloop would create a socket object and keep it as long as the connection.
        if self._forwarded is not None:
            return self._forwarded
        if self._unix:
            return "unix:"
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        if name is None:
            return "unknown"
        return format_peer(name)


def format_peer(name: Sequence[Any]) -> str:
    """Format the address of a TCP socket as in a URL."""
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


class TlsHandshake(Handshake):
    """A handshake over TLS. The limiter counts it from the accept on."""

    __slots__ = ("_tls_task",)

    def __init__(self, limiter: ConnectionLimiter, loopback: bool = False) -> None:
        super().__init__(limiter, loopback)
        self._tls_task: asyncio.Task[None] | None = None

    def start_tls(self, sock: socket.socket, context: ssl.SSLContext, timeout: float) -> None:
        """Take over an accepted socket; the TLS handshake may take `timeout` seconds."""
        if self._limiter.track(self):
            self._tls_task = asyncio.get_running_loop().create_task(self._start_tls(sock, context, timeout))
        else:
            sock.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def expire(self) -> None:
        """Abort, also during the TLS handshake."""
        super().expire()
        if self._transport is None and self._tls_task is not None:
            self._tls_task.cancel()

    def refuse_draining(self) -> None:
        """Refuse it, or abort it during the TLS handshake, when no answer can be sent yet."""
        if self._transport is None:
            self._limiter.count_refusal(0, "draining")
            self._head = None
            self.expire()
        else:
            super().refuse_draining()

    async def _start_tls(self, sock: socket.socket, context: ssl.SSLContext, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            peer = format_peer(sock.getpeername())
        except OSError:  # it has gone already
            peer = "unknown"
        try:
            await loop.connect_accepted_socket(
                lambda: self, sock, ssl=context, ssl_handshake_timeout=timeout, ssl_shutdown_timeout=REFUSED_TIMEOUT
            )
        except OSError as exc:  # ssl.SSLError is one
            self._limiter.count_refusal(0, "tls")
            log.debug("TLS handshake failed", reason=getattr(exc, "reason", None) or str(exc), peer=peer)
        finally:
            self._tls_task = None
            # A disconnect during the TLS handshake causes neither an exception nor `connection_lost`.
            if self._transport is None:
                self._limiter.untrack(self)


class Negotiation(ServerProtocol):
    """The negotiation of websockets, with the broker's choice of subprotocols."""

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        """Choose `wsbroker.v1` where it is offered, none where nothing is. `bearer.<token>` is a token.

        Raises NegotiationError when only others are offered.
        """
        if SUBPROTOCOL in subprotocols:
            return SUBPROTOCOL
        if all(subprotocol.startswith("bearer.") for subprotocol in subprotocols):
            return None
        raise NegotiationError(f"none of the subprotocols is known; this broker speaks {SUBPROTOCOL}")


NEGOTIATION = Negotiation()
"""Shared by all requests: a negotiation keeps no state."""

NEGOTIATION_WITH_COMPRESSION = Negotiation(
    extensions=[ServerPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)]
)
"""The same with compression. No side keeps its window between messages, so an event is deflated once for all
subscribers, and a connection holds no deflate state."""


class HTTPResponse(Exception):  # noqa: N818 -- no error, but the end of the handshake
    """An HTTP answer in place of the upgrade; the connection ends with it. `text` is for people."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] = NO_HEADERS, reason: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.text = text
        self.headers = headers
        self.reason = reason or REFUSAL_REASONS[status]
        """The reason in the metrics."""

    def serialize(self, *, bodiless: bool) -> bytes:
        """Give the bytes of the answer; `bodiless` for a HEAD request (RFC 9110, section 9.3.2)."""
        body = f"{self.text}\n".encode()
        reason = "OK" if self.status == 200 else REFUSALS[self.status].name
        lines = [
            f"HTTP/1.1 {self.status} {reason}",
            f"Date: {formatdate(usegmt=True)}",
            f"Server: {SERVER}",
            # "A sender of Upgrade MUST also send an Upgrade connection option" (RFC 9110, section 7.8).
            "Connection: close, Upgrade" if "Upgrade" in self.headers else "Connection: close",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"
        return head if bodiless else head + body


def check_start(head: bytes | bytearray, seen: int) -> None:
    """Detect early that the bytes are no HTTP request, instead of waiting for the end of the head.

    The first `seen` bytes were checked before. Raises HTTPResponse.
    """
    if len(head) > MAX_HEAD:
        raise HTTPResponse(431, f"the head of the request is longer than {MAX_HEAD} bytes")
    if head[0] not in TOKEN_CHARACTERS or BARE_LF.search(head, max(0, seen - 1)):
        raise HTTPResponse(400, "this is not HTTP/1.1")


def parse_request(head: bytes) -> Request:
    """Parse the head of a request. Raises HTTPResponse."""
    try:
        return read_request(head)
    except SecurityError:
        raise HTTPResponse(431, "the head of the request has a line that is too long, or too many of them") from None
    except MALFORMED:
        pass
    # websockets refuses a request with a body. It is valid HTTP, and gets a proper answer, such as 404.
    try:
        request = read_request(BODY_HEADERS.sub(b"", head))
    except (*MALFORMED, SecurityError):
        raise HTTPResponse(400, "the request is malformed") from None
    if "Upgrade" in request.headers:
        raise HTTPResponse(400, "a request for a WebSocket has no body")
    return request


def read_request(head: bytes) -> Request:
    """Parse a complete head with websockets. Raises SecurityError if it is too long, or one of MALFORMED."""
    readline = BytesIO(head).readline

    def read_line(limit: int, too_long: type[Exception]) -> Generator[None, None, bytes]:
        yield from ()  # It never has to wait, but has to be a generator.
        line = readline(limit + 1)
        if len(line) > limit:
            raise too_long
        return line

    # ServerProtocol would call the same, over a buffer and a state machine for the frames that are none of its business
    # here: 31 µs in place of 22.
    try:
        next(Request.parse(read_line))
    except StopIteration as done:
        return cast(Request, done.value)
    raise AssertionError("the head was complete")


def check_host(hosts: list[str], version: str) -> None:
    """Ask for exactly one valid Host (RFC 9112, section 3.2); HTTP/1.0 may do without. Raises HTTPResponse."""
    if len(hosts) == 1 and HOST.fullmatch(hosts[0]):
        return
    if hosts or version != "HTTP/1.0":
        raise HTTPResponse(400, "the header Host is missing, doubled or malformed")


def extract_path(target: str) -> str:
    """Give the path in a request's target, without the query; a target may be a whole URL (RFC 9112, section 3.2.2)."""
    if target.startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    return target.partition("?")[0]


def make_upgrade_response(request: Request, negotiation: Negotiation) -> tuple[bytes, int]:
    """Give the answer with status 101, and the window of the client for compressed messages, in bits: 0 where
    compression is not agreed to (RFC 7692, section 7.1.2.1).

    Raises HTTPResponse if RFC 6455, section 4.2.1, asks for more.
    """
    # `accept` would do the same, and wrap it in objects, with a date that status 101 does not need (RFC 9110, section
    # 6.6.1): 42 µs in place of 22.
    try:
        key, agreed, subprotocol = negotiation.process_request(request)
    except InvalidHandshake as exc:
        raise response_for(exc) from None
    more = b"" if subprotocol is None else PROTOCOL_V1
    window_bits = 0
    if agreed is not None:
        more += EXTENSIONS_HEADER % agreed.encode()
        window_bits = cast(PerMessageDeflate, negotiation.extensions[0]).local_max_window_bits
    return UPGRADE_RESPONSE % (key.encode(), more), window_bits


def response_for(exc: InvalidHandshake) -> HTTPResponse:
    """Map an exception of websockets to the response."""
    match exc:
        case InvalidMethod() | InvalidProtocol() | InvalidUpgrade():
            return HTTPResponse(426, "this is a WebSocket; a plain request has nothing to find here", UPGRADE)
        case InvalidHeaderValue(name="Sec-WebSocket-Version"):
            headers = {**UPGRADE, "Sec-WebSocket-Version": "13"}
            return HTTPResponse(426, "this version of WebSocket is not spoken here", headers)
        case InvalidHeader(name=name):
            return HTTPResponse(400, f"the header {name} is missing, doubled or malformed")
        case NegotiationError():
            return HTTPResponse(400, str(exc))
    return HTTPResponse(400, "the request is malformed")


def draining_response(limiter: ConnectionLimiter) -> HTTPResponse:
    return HTTPResponse(503, "the broker is shutting down", retry_after(limiter), "draining")


def retry_after(limiter: ConnectionLimiter) -> dict[str, str]:
    return {"Retry-After": str(limiter.retry_after())}
