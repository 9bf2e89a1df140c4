"""The opening handshake: one accepted socket until the upgrade, or until an HTTP refusal has been read.

What a request means and how it is answered is in `http`; this file has the socket around it. `Handshakes` is what all
of them share, with their deadlines.
Invariant: nothing of a handshake outlives the upgrade, not even a reference cycle for the garbage collector.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import structlog
from websockets.http11 import Request

from broker.config import Config
from broker.identity import ClientCertificate, Credentials, Denied, Identified, Identity
from broker.metrics import Metrics
from broker.net.addresses import UNIX, UNKNOWN, Peer, peer_of
from broker.net.http import (
    PLAIN_ON_TLS_PORT,
    TOKEN_CHARACTERS,
    HeadReader,
    HealthCheck,
    HTTPResponse,
    Site,
    Upgrade,
    answer_request,
    parse_head,
    to_unicode,
)
from broker.net.limiter import ConnectionLimiter, Place
from broker.net.origin import Origins
from broker.net.proxy import Proxies
from broker.net.proxy_protocol import HeaderReader, ProxyProtocol, ProxyProtocolError
from broker.net.tls import read_client_certificate

REFUSED_TIMEOUT = 2.0
"""Seconds that a refused client has to read its answer and close. nginx gives 5 (lingering_timeout) and 30 in all;
here it is one answer of a few hundred bytes, and each second holds a descriptor."""

UNAVAILABLE = {"full": "the broker is full", "memory": "the broker is out of memory"}

INVALID_TOKEN = {"WWW-Authenticate": 'Bearer realm="wsbroker", error="invalid_token"'}
"""RFC 6750, section 3."""
DENIED = {403: "forbidden", 429: "identity_limit", 503: "auth_unavailable"}
"""Reasons of refusals in the metrics where it is the identity that is refused."""

PEEKED_BYTES = 4096
"""Bytes of a TLS connection that are looked at before TLS begins."""

MAX_LOGGED = 300
"""Characters of an origin in the log."""

log = structlog.get_logger(__name__)


class Node(Protocol):
    """What handshakes need of `broker.node.Node`."""

    @property
    def draining(self) -> bool:
        """Whether the broker is shutting down."""

    @property
    def metrics(self) -> Metrics:
        """The counters of the node."""

    def identify(self, credentials: Credentials, done: Callable[[Identified], None]) -> None:
        """Find out who shows this. `done` may be called before this returns."""

    def connect(
        self,
        transport: asyncio.Transport,
        upgrade_response: bytes,
        rest: bytes,
        peer: Peer,
        window_bits: int = 0,
        identity: Identity | None = None,
    ) -> None:
        """Take over a socket after a valid request.

        Must give the transport another protocol and send `upgrade_response`, the answer with status 101. `rest` is what
        the client sent behind its request, `peer` its address. `window_bits` is 0 unless compression was agreed to,
        then the largest window that the client has for messages from the broker. `identity` is what the token of the
        request has shown.
        """


class Handshakes:
    """The handshakes of all listeners: what they share, and one sweep for the deadlines of all."""

    def __init__(self, config: Config, node: Node, limiter: ConnectionLimiter, loop: asyncio.AbstractEventLoop) -> None:
        self.node = node
        self.limiter = limiter
        self.closing = False
        self.reconfigure(config)
        self._loop = loop
        # Both are in the order of their deadlines: each has one timeout for all its members.
        self._opening: dict[Handshake, float] = {}
        self._refused: dict[Handshake, float] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self._opened: asyncio.Future[None] | None = None

    def reconfigure(self, config: Config) -> None:
        """Apply these settings from now on. Established connections stay."""
        server = config.server
        self.site = Site(
            server.path,
            Origins(server.origins),
            config.limits.max_head,
            compression=server.compression,
            passed_on=() if config.auth.url is None else tuple(config.auth.url_headers),
        )
        self.proxies = Proxies(server.trusted_proxies, server.forwarded_header)
        self.proxy_protocol = ProxyProtocol(server.proxy_protocol)
        self.open_timeout = config.limits.open_timeout
        self._spread = config.limits.reconnect_spread
        self._tick = min(self.open_timeout, REFUSED_TIMEOUT) / 4

    @property
    def draining(self) -> bool:
        """Whether all new connections are refused."""
        return self.closing or self.node.draining

    def close(self) -> None:
        """Refuse all new connections and all pending handshakes. Idempotent."""
        self.closing = True
        for handshake in list(self._opening):
            handshake.refuse_draining()

    async def wait_empty(self, timeout: float) -> None:
        """Wait until the last handshake has ended, at most `timeout` seconds; then abort the others."""
        if self._opening or self._refused:
            self._empty = self._loop.create_future()
            await asyncio.wait([self._empty], timeout=timeout)
        for handshake in [*self._opening, *self._refused]:
            handshake.expire()

    async def wait_handshakes(self, timeout: float) -> None:
        """Wait until no handshake is pending, at most `timeout` seconds. A connection that was just accepted counts."""
        deadline = self._loop.time() + timeout
        # A listener that was closed in this turn of the loop may have accepted in it.
        await asyncio.sleep(0)
        while self._opening and (left := deadline - self._loop.time()) > 0:
            self._opened = self._loop.create_future()
            await asyncio.wait([self._opened], timeout=left)

    # For one handshake.

    def track(self, handshake: Handshake) -> bool:
        """Track an accepted socket, and give it a place.

        False: there is none, and the caller must close the socket at once.
        """
        limiter = self.limiter
        handshake.place = limiter.admit()
        if handshake.place is not Place.SLOT:
            limiter.reject()
        if handshake.place is Place.NONE:
            limiter.count_refusal(0, limiter.unavailable_reason or "full")
            return False
        handshake.began = time.monotonic()  # the loop's own clock has milliseconds
        self._opening[handshake] = self._loop.time() + self.open_timeout
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._tick, self._sweep)
        return True

    def untrack(self, handshake: Handshake) -> None:
        """Stop tracking a handshake that has ended, for any reason. Idempotent."""
        if self._opening.pop(handshake, None) is None:
            self._refused.pop(handshake, None)
        self.limiter.release(handshake.place)
        handshake.place = Place.NONE
        self._wake_waiters()

    def refuse(self, handshake: Handshake) -> bool:
        """Move a handshake to those that are refused and still read their answer.

        False: there is no capacity for it, and the caller must close the connection without waiting.
        """
        del self._opening[handshake]
        handshake.place = self.limiter.give_up_slot(handshake.place)
        if handshake.place is not Place.NONE:
            self._refused[handshake] = self._loop.time() + REFUSED_TIMEOUT
        self._wake_waiters()
        return handshake.place is not Place.NONE

    def retry_after(self) -> dict[str, str]:
        """Make a header Retry-After, with seconds at random, so that clients do not all reconnect at once."""
        return {"Retry-After": str(1 + int(random.random() * self._spread))}

    def too_often_response(self) -> HTTPResponse:
        """Make the answer to an address that begins too many connections."""
        return HTTPResponse(429, "this address connects too often", self.retry_after(), "handshake_rate")

    def draining_response(self) -> HTTPResponse:
        """Make the answer while the broker shuts down."""
        return HTTPResponse(503, "the broker is shutting down", self.retry_after(), "draining")

    def denied_response(self, denied: Denied) -> HTTPResponse:
        """Make the answer to a client whose credentials do not let it in."""
        if denied.status == 401:
            return HTTPResponse(401, denied.reason, INVALID_TOKEN)
        if denied.status == 403:
            return HTTPResponse(403, denied.reason, label=DENIED[403])
        return HTTPResponse(denied.status, denied.reason, self.retry_after(), DENIED[denied.status])

    def _wake_waiters(self) -> None:
        """Wake `wait_handshakes` and `wait_empty` if their condition holds."""
        if self._opening:
            return
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)
        if self._empty is not None and not self._refused and not self._empty.done():
            self._empty.set_result(None)

    def _sweep(self) -> None:
        now = self._loop.time()
        for group in (self._opening, self._refused):
            late = []
            for handshake, deadline in group.items():
                if deadline > now:
                    break
                late.append(handshake)
            for handshake in late:
                handshake.expire()
        waiting = self._opening or self._refused
        self._sweeper = self._loop.call_later(self._tick, self._sweep) if waiting else None


class Handshake(asyncio.Protocol):
    """The protocol of an accepted socket until the upgrade, or until the refused client has read its answer.

    `loopback`: the listener is on loopback; `unix`: it is a Unix socket.
    """

    __slots__ = (
        "_head",
        "_is_counted",
        "_loopback",
        "_peer",
        "_proxied",
        "_shared",
        "_transport",
        "_unix",
        "_waiting",
        "began",
        "place",
    )

    def __init__(self, shared: Handshakes, loopback: bool = False, unix: bool = False) -> None:
        self.place = Place.NONE
        """What it holds of the capacity; set by `Handshakes`."""
        self.began = 0.0
        """When it was accepted; set by `Handshakes`."""
        self._shared = shared
        self._loopback = loopback
        self._unix = unix
        self._peer: Peer | None = UNIX if unix else None
        # The header of the PROXY protocol while it is read.
        self._proxied: HeaderReader | None = None
        # Whether the limiter has counted it among those of its address.
        self._is_counted = False
        # What came behind the request while its token is verified.
        self._waiting: bytes | None = None
        # None once all further bytes are discarded.
        self._head: HeadReader | None = HeadReader(shared.site.max_head)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._shared.track(self):
            self._transport.abort()
        elif self._shared.proxy_protocol.enabled:
            peer = self._peer_now()
            if peer == UNKNOWN:
                # A health check that was reset after its header. Who it was cannot be told, and nobody reads an answer.
                self._transport.abort()
            elif self._shared.proxy_protocol.expects_header(peer):
                self._proxied = HeaderReader()

    def data_received(self, data: bytes) -> None:
        if self._head is None:
            return
        if self._waiting is not None:
            self._wait_longer(data)
            return
        if self._proxied is not None:
            try:
                data = data[self._proxied.feed(data) :]
            except ProxyProtocolError as exc:
                self._send_response(HTTPResponse(400, str(exc), label="proxy_protocol"))
                return
            if not self._proxied.done:
                return
            self._take_proxied(self._proxied)
            self._proxied = None
        found = self._head.feed(data)
        if found is None:
            return
        answer = found if isinstance(found, HTTPResponse) else self._handle_request(*found)
        if answer is not None:
            self._send_response(answer)

    def _wait_longer(self, data: bytes) -> None:
        """Keep what TLS had read before it was told to stop."""
        assert self._waiting is not None
        assert self._transport is not None
        self._waiting += data
        if len(self._waiting) > self._shared.site.max_head:  # clients wait for the answer (RFC 6455, section 4.1)
            self._transport.abort()

    def eof_received(self) -> None:
        """Let the transport close itself after it has sent its buffer."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._head = None
        self._transport = None
        self._shared.untrack(self)

    def expire(self) -> None:
        """Abort: the time for the handshake, or for reading the answer, is over."""
        if self._head is not None:
            self._shared.limiter.count_refusal(0, "timeout")
            log.debug("handshake timeout", peer=self._peer_now())
        self._waiting = None
        self._shared.untrack(self)
        if self._transport is not None:
            self._transport.abort()

    def refuse_draining(self) -> None:
        """Refuse it, because the broker shuts down before the request is complete."""
        self._send_response(self._shared.draining_response())

    def _handle_request(self, head: bytes, rest: bytes) -> HTTPResponse | None:
        """Establish the connection, or give the answer that refuses it."""
        shared, limiter = self._shared, self._shared.limiter
        request = parse_head(head)
        if isinstance(request, HTTPResponse):
            return request
        peer = self._peer_now()
        certificate = self._client_certificate()
        forwarded = request.headers.get_all(shared.proxies.header)
        if forwarded and (client := shared.proxies.resolve_client(peer, forwarded)) is not None:
            peer = self._peer = client
            certificate = None  # it is the proxy's
        if not self._is_counted and limiter.over_rate(peer):
            return shared.too_often_response()
        answer = answer_request(request, shared.site, loopback=self._loopback)
        if isinstance(answer, HTTPResponse):
            if answer.reason == "origin":
                log_refused_origin(request, peer)
            return answer
        if shared.draining:
            return shared.draining_response()
        if isinstance(answer, HealthCheck):
            return HTTPResponse(200, "ok")
        if limiter.over_address_limit(peer):
            return HTTPResponse(429, "this address has too many connections", shared.retry_after())
        self.place = limiter.take_slot(self.place)
        if self.place is not Place.SLOT:
            limiter.reject()
            reason = limiter.unavailable_reason or "full"
            return HTTPResponse(503, UNAVAILABLE[reason], shared.retry_after(), reason)
        if answer.token is None and not answer.headers and certificate is None:
            self._establish(answer, rest, peer, None)
        else:
            self._identify(answer, rest, peer, certificate)
        return None

    def _client_certificate(self) -> ClientCertificate | None:
        """Give the certificate that the client has shown: none without TLS."""
        return None

    def _identify(self, upgrade: Upgrade, rest: bytes, peer: Peer, certificate: ClientCertificate | None) -> None:
        """Find out who has sent the request, and establish the connection or refuse it then."""
        self._waiting = rest
        credentials = Credentials(upgrade.token, upgrade.headers, "" if peer.ip is None else str(peer.ip), certificate)
        self._shared.node.identify(credentials, partial(self._on_identified, upgrade, peer))
        if self._is_identifying() and self._transport is not None:
            self._transport.pause_reading()

    def _is_identifying(self) -> bool:
        """Whether it waits for the answer about its token."""
        return self._waiting is not None

    def _on_identified(self, upgrade: Upgrade, peer: Peer, result: Identified) -> None:
        rest, self._waiting = self._waiting, None
        if self._transport is None or self._head is None or rest is None:
            return  # it has ended meanwhile
        self._transport.resume_reading()
        shared = self._shared
        if isinstance(result, Denied):
            log.info("identity refused", reason=result.reason, peer=peer)
            self._send_response(shared.denied_response(result))
        elif shared.draining:
            self._send_response(shared.draining_response())
        else:
            self._establish(upgrade, rest, peer, result)

    def _establish(self, upgrade: Upgrade, rest: bytes, peer: Peer, identity: Identity | None) -> None:
        """Hand the socket over to the node, which counts the connection from now on."""
        shared = self._shared
        transport = self._transport
        assert transport is not None
        self._head = None
        self._transport = None
        shared.limiter.count_address(peer)
        shared.node.metrics.handshakes.observe(time.monotonic() - self.began)
        shared.untrack(self)
        shared.node.connect(transport, upgrade.response, rest, peer, upgrade.window_bits, identity)

    def _send_response(self, answer: HTTPResponse) -> None:
        transport = self._transport
        assert transport is not None
        bodiless = self._head is not None and self._head.is_bodiless
        self._head = None
        if answer.status >= 400:
            self._shared.limiter.count_refusal(answer.status, answer.reason)
            log.debug("request refused", status=answer.status, reason=answer.text, peer=self._peer_now())
        lingers = self._shared.refuse(self)
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

    def _take_proxied(self, header: HeaderReader) -> None:
        """Take the client from a complete header of the PROXY protocol; it has none for the proxy's own connection."""
        if header.peer is not None:
            # A client whose address is not told counts as the proxy.
            hidden = header.peer.ip is None
            self._peer = Peer(self._peer_now().ip, forwarded=True) if hidden else header.peer

    def _peer_now(self) -> Peer:
        """The client, as far as it is known by now."""
        # For the peer of a Unix socket, uvloop would create a socket object and keep it as long as the connection.
        if self._peer is None:
            if self._transport is None:
                return UNKNOWN
            self._peer = peer_of(self._transport.get_extra_info("peername"))
        return self._peer


def log_refused_origin(request: Request, peer: Peer) -> None:
    """Log that a page may not connect. An origin is the only text of a client in the log: operators have to list it."""
    origin, host = (to_unicode(request.headers.get_all(name)[0]) for name in ("Origin", "Host"))
    log.info("origin refused", origin=shorten(origin), host=shorten(host), peer=peer)


def shorten(text: str) -> str:
    """Cut a text that is longer than any host name (RFC 1035, section 2.3.4)."""
    return text if len(text) <= MAX_LOGGED else f"{text[:MAX_LOGGED]}…"


class TlsHandshake(Handshake):
    """A handshake over TLS. The limiter counts it from the accept on.

    A client that does not speak TLS gets its answer without it.
    """

    __slots__ = ("_is_plain", "_tls_task")

    def __init__(self, shared: Handshakes, loopback: bool = False) -> None:
        super().__init__(shared, loopback)
        self._tls_task: asyncio.Task[None] | None = None
        self._is_plain = False

    def start_tls(self, sock: socket.socket, context: ssl.SSLContext, timeout: float) -> None:
        """Take over an accepted socket; the TLS handshake may take `timeout` seconds."""
        if self._shared.track(self):
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
            self._shared.limiter.count_refusal(0, "draining")
            self._head = None
            self.expire()
        else:
            super().refuse_draining()

    def _handle_request(self, head: bytes, rest: bytes) -> HTTPResponse | None:
        if self._is_plain:
            return HTTPResponse(400, PLAIN_ON_TLS_PORT, label="tls")
        return super()._handle_request(head, rest)

    def _client_certificate(self) -> ClientCertificate | None:
        shown = None if self._transport is None else self._transport.get_extra_info("peercert")
        return read_client_certificate(shown) if shown else None

    async def _start_tls(self, sock: socket.socket, context: ssl.SSLContext, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        limiter = self._shared.limiter
        try:
            try:
                self._peer = peer_of(sock.getpeername())
                self._is_plain = await self._read_start(sock)
            except OSError as exc:  # reset before TLS began, as health checks do
                raise EOFError from exc
            if not self._is_plain and not self._shared.proxies.trusts(self._peer_now()):
                self._is_counted = True
                if limiter.over_rate(self._peer_now()):  # before the handshake of TLS, which costs a millisecond
                    limiter.count_refusal(0, "handshake_rate")
                    return
            tls = None if self._is_plain else context
            await loop.connect_accepted_socket(
                lambda: self,
                sock,
                ssl=tls,
                ssl_handshake_timeout=timeout if tls else None,
                ssl_shutdown_timeout=REFUSED_TIMEOUT if tls else None,
            )
        except ProxyProtocolError as exc:
            limiter.count_refusal(0, "proxy_protocol")
            log.debug("PROXY protocol failed", reason=str(exc), peer=self._peer_now())
        except EOFError:
            pass  # the client has disconnected
        except OSError as exc:  # ssl.SSLError is one
            limiter.count_refusal(0, "tls")
            log.debug("TLS handshake failed", reason=getattr(exc, "reason", None) or str(exc), peer=self._peer_now())
        finally:
            self._tls_task = None
            # A disconnect during the TLS handshake causes neither an exception nor `connection_lost`.
            if self._transport is None:
                sock.close()
                self._shared.untrack(self)

    async def _read_start(self, sock: socket.socket) -> bool:
        """Read the header of the PROXY protocol, if there has to be one, and return whether plain HTTP follows.

        Raises OSError, ProxyProtocolError, or EOFError when the client disconnects.
        """
        header = HeaderReader() if self._shared.proxy_protocol.expects_header(self._peer_now()) else None
        while True:
            data = await peek(sock)
            if not data:
                raise EOFError
            if header is None:
                return data[0] in TOKEN_CHARACTERS
            sock.recv(header.feed(data))
            if header.done:
                self._take_proxied(header)
                header = None


async def peek(sock: socket.socket) -> bytes:
    """Wait for bytes of a socket that does not block, and give them without taking them; b"" at the end.

    Raises OSError.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return sock.recv(PEEKED_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            pass
        readable = asyncio.Event()
        loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sock)
