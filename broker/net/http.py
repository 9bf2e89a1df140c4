"""The request of an opening handshake without I/O: bytes in, the answer out (RFC 6455, section 4.2; RFC 9112).

`HeadReader` collects the head of a request, `parse_head` makes a request of it, and `answer_request` decides on it: an
`Upgrade`, a `HealthCheck`, or an `HTTPResponse` that refuses it. websockets parses the head, and its `ServerProtocol`
checks what RFC 6455 requires; path, Host and Origin are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from email.utils import formatdate
from io import BytesIO
from typing import Final, cast

import msgspec
from websockets.datastructures import Headers
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
from broker.net.origin import Origins
from broker.net.proxy_protocol import is_header as is_proxy_header

HEALTH_PATH: Final = "/healthz"
HEALTH_METHODS: Final = ("GET", "HEAD")
SUBPROTOCOL: Final = Subprotocol(messages.SUBPROTOCOL)
SERVER: Final = "wsbroker"

HEAD_END: Final = b"\r\n\r\n"
BARE_LF = re.compile(rb"(?<!\r)\n")
# Method, target and version (RFC 9112, section 3). Other protocols are refused when their first line is complete.
REQUEST_LINE = re.compile(rb"\S+ \S+ HTTP/[0-9]\.[0-9]")
BODY_HEADERS = re.compile(rb"^(?:content-length|transfer-encoding)[ \t]*:[^\n]*\n", re.IGNORECASE | re.MULTILINE)
# The zone of an address (fe80::1%eth0) is for the machine that asks (RFC 6874); programs send it all the same.
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[^\[\]/?#@:\s]+)?\]|[^\[\]/?#@:\s]*)(?::[0-9]*)?")
# The first byte of a method is one of a token (RFC 9110, section 5.6.2). TLS, SSH and the like begin with others.
TOKEN_CHARACTERS = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")

TLS_RECORD: Final = b"\x16\x03"
"""How a TLS handshake begins (RFC 8446, section 5.1)."""
HTTP2_PREFACE: Final = b"PRI * HTTP/2"

LIST_HEADERS: Final = ("Connection", "Upgrade", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions")

UPGRADE_RESPONSE: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\n"
    b"Connection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %s\r\n"
    b"Server: wsbroker\r\n"
    b"%s"
    b"\r\n"
)
EXTENSIONS_HEADER: Final = b"Sec-WebSocket-Extensions: %s\r\n"
PROTOCOL_V1: Final = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n".encode()

MALFORMED: Final = (ValueError, EOFError, NotImplementedError)
"""What websockets raises for a request that it cannot parse."""

REFUSAL_REASONS: Final = {
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

BEARER: Final = "bearer "
BEARER_ENTRY: Final = "bearer."
"""How the subprotocol entry begins that is a token."""
TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""A token in a header (RFC 6750, section 2.1)."""
TOKEN_HEADERS: Final = ("Authorization", "Sec-WebSocket-Protocol")

NO_HEADERS: Final[Mapping[str, str]] = {}
UPGRADE: Final[Mapping[str, str]] = {"Upgrade": "websocket"}

NOT_HTTP: Final = "this is not HTTP/1.1"
TLS_ON_PLAIN_PORT: Final = "this is TLS, and this port has none: the URL must begin with ws:// instead of wss://"
PLAIN_ON_TLS_PORT: Final = "this port takes TLS only: the URL must begin with wss:// instead of ws://"
HTTP2_ON_HTTP1: Final = "this is HTTP/2; the broker speaks HTTP/1.1"
UNEXPECTED_PROXY_HEADER: Final = (
    "no header of the PROXY protocol is expected here; only connections from server.proxy_protocol begin with one"
)


class HTTPResponse(msgspec.Struct, frozen=True):
    """An HTTP answer in place of the upgrade; the connection ends with it."""

    status: int
    text: str
    """The body, for people."""
    headers: Mapping[str, str] = NO_HEADERS
    label: str = ""
    """The reason in the metrics, where it does not follow from the status."""

    @property
    def reason(self) -> str:
        """The reason in the metrics."""
        return self.label or REFUSAL_REASONS[self.status]

    def serialize(self, *, bodiless: bool) -> bytes:
        """Give the bytes of the answer; `bodiless` for a HEAD request (RFC 9110, section 9.3.2)."""
        body = f"{self.text}\n".encode()
        phrase = "OK" if self.status == 200 else REFUSALS[self.status].name
        lines = [
            f"HTTP/1.1 {self.status} {phrase}",
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


class Upgrade(msgspec.Struct, frozen=True):
    """A valid request for a WebSocket."""

    response: bytes
    """The answer with status 101."""
    window_bits: int
    """The window of the client for compressed messages, in bits; 0 where compression is not agreed to."""
    token: str | None = None
    """The token or API key that the client has shown."""
    headers: tuple[tuple[str, str], ...] = ()
    """Those of its headers that say who the client is to a backend."""


class HealthCheck(msgspec.Struct, frozen=True):
    """A valid request for `/healthz`. The state of the broker decides on the answer."""


class Site:
    """What the broker serves on its client listeners, and for which pages."""

    __slots__ = ("_paths", "max_head", "negotiation", "origins", "passed_on", "path")

    def __init__(
        self, path: str, origins: Origins, max_head: int, *, compression: bool, passed_on: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.origins = origins
        self.passed_on = passed_on
        """Names of the headers that a backend gets which says who a client is."""
        self.max_head = max_head
        """Bytes of a request's head, request line and all headers together."""
        self.negotiation = NEGOTIATION_WITH_COMPRESSION if compression else NEGOTIATION
        # Proxies and URL libraries add a slash, or remove it.
        self._paths = {path, f"{path}/" if not path.endswith("/") else path[:-1] or path}

    def has_websocket_at(self, path: str) -> bool:
        """Whether the WebSocket is at this path; a slash at its end makes no difference."""
        return path in self._paths


class HeadReader:
    """Collects the head of a request."""

    __slots__ = ("_head", "_limit", "_seen")

    def __init__(self, limit: int) -> None:
        """`limit` is the longest head, in bytes."""
        self._limit = limit
        self._head: bytes | bytearray = b""

    @property
    def is_bodiless(self) -> bool:
        """Whether the request is a HEAD request, whose answer has no body."""
        return self._head[:5] == b"HEAD "

    def feed(self, data: bytes) -> tuple[bytes, bytes] | HTTPResponse | None:
        """Take bytes of the connection: at most one more after the head is complete.

        Gives the head and what came behind it, or a refusal as soon as the bytes cannot become a request; None as long
        as the head is not complete.
        """
        head: bytes | bytearray
        seen = len(self._head)
        if seen:
            # Grows in place, so that a head that comes byte by byte is not copied with each.
            grown = self._head if isinstance(self._head, bytearray) else bytearray(self._head)
            grown += data
            self._head = head = grown
        else:
            self._head = head = data
        if not head:
            return None
        if head[0] not in TOKEN_CHARACTERS:
            return HTTPResponse(400, explain_start(head))
        end = head.find(HEAD_END, max(0, seen - 3))
        if end < 0:
            if len(head) > self._limit:
                return self._too_long()
            line_end = head.find(b"\r\n")
            if BARE_LF.search(head, max(0, seen - 1)) or (
                line_end > 0 and not REQUEST_LINE.fullmatch(head, 0, line_end)
            ):
                return HTTPResponse(400, explain_start(head))
            return None
        end += len(HEAD_END)
        if end > self._limit:
            return self._too_long()
        return bytes(head[:end]), bytes(head[end:])

    def _too_long(self) -> HTTPResponse:
        return HTTPResponse(431, f"the head of the request is longer than {self._limit} bytes (limits.max_head)")


def explain_start(head: bytes | bytearray) -> str:
    """Say what bytes that are no request for HTTP/1.1 seem to be."""
    start = bytes(head[:16])
    if TLS_RECORD.startswith(start[:2]):
        return TLS_ON_PLAIN_PORT
    if start.startswith(HTTP2_PREFACE):
        return HTTP2_ON_HTTP1
    return UNEXPECTED_PROXY_HEADER if is_proxy_header(start) else NOT_HTTP


def parse_head(head: bytes) -> Request | HTTPResponse:
    """Parse the complete head of a request."""
    try:
        return read_request(head)
    except SecurityError:
        return HTTPResponse(431, "the head of the request has too many lines")
    except MALFORMED:
        pass
    # websockets refuses a request with a body. It is valid HTTP, and gets a proper answer, such as 404.
    try:
        request = read_request(BODY_HEADERS.sub(b"", head))
    except (*MALFORMED, SecurityError):
        text = explain_start(head)
        return HTTPResponse(400, "the request is malformed" if text is NOT_HTTP else text)
    if "Upgrade" in request.headers:
        return HTTPResponse(400, "a request for a WebSocket has no body")
    return request


def read_request(head: bytes) -> Request:
    """Parse a complete head with websockets. Raises SecurityError for too many lines, or one of MALFORMED."""
    readline = BytesIO(head).readline

    def read_line(limit: int, too_long: type[Exception]) -> Generator[None, None, bytes]:
        yield from ()  # It never has to wait, but has to be a generator.
        # Without the limit of websockets: the head is limited as a whole. Browsers send the cookies of all programs on
        # localhost in one line.
        return readline()

    # ServerProtocol would call the same, over a buffer and a state machine for the frames that are none of its business
    # here: 31 µs in place of 22.
    try:
        next(Request.parse(read_line))
    except StopIteration as done:
        return cast(Request, done.value)
    raise AssertionError("the head was complete")


def answer_request(request: Request, site: Site, *, loopback: bool) -> Upgrade | HealthCheck | HTTPResponse:
    """Decide on a request. `loopback`: the listener is on a TCP address of loopback."""
    headers = request.headers
    hosts = headers.get_all("Host")
    if not is_valid_host(hosts, request.protocol):
        return HTTPResponse(400, "the header Host is missing, doubled or malformed")
    path = extract_path(request.path)
    if path == HEALTH_PATH:
        if request.method in HEALTH_METHODS:
            return HealthCheck()
        return HTTPResponse(426, "/healthz answers only GET and HEAD", UPGRADE)
    if not site.has_websocket_at(path):
        return HTTPResponse(404, f"there is nothing at this path; the WebSocket is at {site.path}")
    upgrade = negotiate(request, site.negotiation)
    if isinstance(upgrade, Upgrade) and (origins := headers.get_all("Origin")):
        text = site.origins.refusal(to_unicode(origins[0]), to_unicode(hosts[0]), loopback=loopback)
        if text is not None:
            return HTTPResponse(403, text)
    if isinstance(upgrade, HTTPResponse):
        return upgrade
    if any(name in headers for name in TOKEN_HEADERS):
        token = find_token(headers)
        if isinstance(token, HTTPResponse):
            return token
        upgrade = msgspec.structs.replace(upgrade, token=token)
    if site.passed_on:
        passed_on = ((name, to_unicode(value)) for name in site.passed_on for value in headers.get_all(name))
        upgrade = msgspec.structs.replace(upgrade, headers=tuple(passed_on))
    return upgrade


def find_token(headers: Headers) -> str | HTTPResponse | None:
    """Find the token of a request: `Authorization: Bearer …` (RFC 6750, section 2.1), or the subprotocol
    `bearer.<token>`.

    Other schemes are none of the broker's business. Nothing is read of the query string: it is in the logs of proxies.
    """
    values = headers.get_all("Authorization")
    found = [value[7:].strip(" \t") for value in values if value[:7].lower() == BEARER]
    if len(values) > 1 or (found and not TOKEN.fullmatch(found[0])):
        return HTTPResponse(400, "the header Authorization is doubled or malformed")
    for value in headers.get_all("Sec-WebSocket-Protocol"):
        offered = (entry.strip(" \t") for entry in value.split(","))
        found += [entry.removeprefix(BEARER_ENTRY) for entry in offered if entry.startswith(BEARER_ENTRY)]
    if len(found) > 1:
        return HTTPResponse(400, "the request shows more than one token")
    return found[0] if found else None


def is_valid_host(hosts: list[str], version: str) -> bool:
    """Whether there is exactly one valid Host (RFC 9112, section 3.2); HTTP/1.0 may do without."""
    if len(hosts) == 1 and HOST.fullmatch(hosts[0]):
        return True
    return not hosts and version == "HTTP/1.0"


def extract_path(target: str) -> str:
    """Give the path in a request's target, without the query; a target may be a whole URL (RFC 9112, section 3.2.2)."""
    if target.startswith(("http://", "https://")):
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    return target.partition("?")[0]


def to_unicode(value: str) -> str:
    """Give the value of a header, which websockets decodes as Latin-1, in UTF-8 if it is that."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def drop_empty_elements(headers: Headers) -> None:
    """Remove headers that are empty lists: they are as if absent (RFC 9110, section 5.6.1.2).

    websockets ignores empty elements between others, but not a list that has no others.
    """
    for name in LIST_HEADERS:
        values = headers.get_all(name)
        kept = [value for value in values if value.strip(", \t")]
        if len(kept) < len(values):
            del headers[name]
            for value in kept:
                headers[name] = value


def negotiate(request: Request, negotiation: Negotiation) -> Upgrade | HTTPResponse:
    """Answer a request for a WebSocket as RFC 6455, section 4.2.2, says, and agree on compression (RFC 7692)."""
    drop_empty_elements(request.headers)
    # `accept` would do the same, and wrap it in objects, with a date that status 101 does not need (RFC 9110, section
    # 6.6.1): 42 µs in place of 22.
    try:
        key, agreed, subprotocol = negotiation.process_request(request)
    except InvalidHandshake as exc:
        return response_for(exc)
    more = b"" if subprotocol is None else PROTOCOL_V1
    window_bits = 0
    if agreed is not None:
        more += EXTENSIONS_HEADER % agreed.encode()
        window_bits = cast(PerMessageDeflate, negotiation.extensions[0]).local_max_window_bits
    return Upgrade(UPGRADE_RESPONSE % (key.encode(), more), window_bits)


class Negotiation(ServerProtocol):
    """The negotiation of websockets, with the broker's choice of subprotocols."""

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        """Choose `wsbroker.v1` where it is offered, none where nothing is. `bearer.<token>` is a token.

        Raises NegotiationError when only others are offered.
        """
        if SUBPROTOCOL in subprotocols:
            return SUBPROTOCOL
        if all(subprotocol.startswith(BEARER_ENTRY) for subprotocol in subprotocols):
            return None
        raise NegotiationError(f"none of the subprotocols is known; this broker speaks {SUBPROTOCOL}")


NEGOTIATION: Final = Negotiation()
"""Shared by all requests: a negotiation keeps no state."""

NEGOTIATION_WITH_COMPRESSION: Final = Negotiation(
    extensions=[ServerPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)]
)
"""The same with compression. No side keeps its window between messages, so an event is deflated once for all
subscribers, and a connection holds no deflate state."""


def response_for(exc: InvalidHandshake) -> HTTPResponse:
    """Map an exception of websockets to the response."""
    match exc:
        case InvalidMethod() | InvalidProtocol() | InvalidUpgrade():
            return HTTPResponse(
                426, "this path is for WebSockets only, and the request is not a WebSocket handshake", UPGRADE
            )
        case InvalidHeaderValue(name="Sec-WebSocket-Version"):
            headers = {**UPGRADE, "Sec-WebSocket-Version": "13"}
            return HTTPResponse(426, "the broker supports only version 13 of WebSocket", headers)
        case InvalidHeader(name=name):
            return HTTPResponse(400, f"the header {name} is missing, doubled or malformed")
        case NegotiationError():
            return HTTPResponse(400, str(exc))
    return HTTPResponse(400, "the request is malformed")
