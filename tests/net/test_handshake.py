"""The opening handshake, over real sockets, with a node that only remembers whom it got."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools

import pytest
from structlog.testing import capture_logs
from websockets import http11
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from broker.config import Config, Limits
from broker.engines.memory import MemoryEngine
from broker.errors import REFUSALS
from broker.net import handshake as handshakes
from broker.net.handshake import Handshake, Handshakes
from broker.net.limiter import Capacity, ConnectionLimiter
from broker.node import Node as RealNode
from tests.net.harness import Harness, Reply, harness, request, until

MAX_HEAD = Limits().max_head
FRAMES = Frame(Opcode.TEXT, b"first").serialize(mask=True) + Frame(Opcode.TEXT, b"second").serialize(mask=True)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[int]:
    """The size of each piece of a request, as the handshake gets it."""
    sizes: asyncio.Queue[int] = asyncio.Queue()

    class Watched(Handshake):
        __slots__ = ()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            sizes.put_nowait(len(data))

    monkeypatch.setattr("broker.net.listener.Handshake", Watched)
    return sizes


def check(reply: Reply, status: int) -> None:
    """What holds for every answer that is not an upgrade."""
    assert reply.status == status, reply
    assert "close" in reply.headers["connection"]
    assert reply.headers["server"] == "wsbroker"
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert int(reply.headers["content-length"]) == len(reply.body.encode())
    assert reply.body.endswith("\n")


async def refused(opened: Harness, request: bytes, status: int) -> Reply:
    reply = await opened.ask(request)
    check(reply, status)
    assert opened.node.taken == []
    assert opened.limiter.refused.get(status, 0) == (1 if status in REFUSALS else 0)
    return reply


async def all_received(opened: Harness, data: bytes) -> None:
    """Waits until just this came on the one connection that is established."""
    [connection] = opened.node.established
    await until(lambda: connection.received == data)


# Accepted


async def test_valid_request_gets_the_answer_of_the_rfc_example() -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(request())
        assert await client.head() == (
            b"HTTP/1.1 101 Switching Protocols\r\n"
            b"Upgrade: websocket\r\n"
            b"Connection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
            b"Server: wsbroker\r\n"
            b"\r\n"
        )
        [taken] = opened.node.taken
        assert taken.rest == b""
        name = client.writer.get_extra_info("sockname")
        assert str(taken.peer) == f"127.0.0.1:{name[1]}"


async def test_websockets_client_accepts_the_answer() -> None:
    async with harness() as opened:
        protocol = ClientProtocol(parse_uri(f"ws://{opened.address}/"), subprotocols=[Subprotocol("wsbroker.v1")])
        protocol.send_request(protocol.connect())
        client = await opened.connect()
        client.send(b"".join(protocol.data_to_send()))
        protocol.receive_data(await client.head())
        [response] = protocol.events_received()
        assert isinstance(response, Response)
        assert protocol.handshake_exc is None
        assert protocol.state is OPEN
        assert protocol.subprotocol == "wsbroker.v1"


@pytest.mark.parametrize(
    "lines",
    [
        ("GET /?token=x HTTP/1.1",),
        ("GET http://broker.example/ HTTP/1.1",),
        ("GET http://broker.example HTTP/1.1",),
        ("GET / HTTP/1.1", "Content-Length: 0"),
        ("GET / HTTP/1.1", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"),
        ("GET / HTTP/1.1", "Cookie: caf\u00e9"),
    ],
)
async def test_request_variants_are_accepted(lines: tuple[str, ...]) -> None:
    async with harness() as opened:
        client = await opened.upgrade(request(*lines))
        assert len(opened.node.taken) == 1
        await client.close()


AGREED = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
"""What is always agreed to: nobody keeps a window."""


@pytest.mark.parametrize(
    ("offers", "answer", "window_bits"),
    [
        (["permessage-deflate"], AGREED, 15),
        # Chromium, Firefox and Node's ws.
        (["permessage-deflate; client_max_window_bits"], AGREED, 15),
        (["permessage-deflate; client_max_window_bits=10"], f"{AGREED}; client_max_window_bits=10", 15),
        (["permessage-deflate; server_max_window_bits=15"], f"{AGREED}; server_max_window_bits=15", 15),
        (["permessage-deflate; server_max_window_bits=10"], f"{AGREED}; server_max_window_bits=10", 10),
        (['permessage-deflate; server_max_window_bits="10"'], f"{AGREED}; server_max_window_bits=10", 10),
        (["permessage-deflate; server_no_context_takeover; client_no_context_takeover"], AGREED, 15),
        # The first one that can be met (RFC 7692, section 5.1).
        (
            ["permessage-deflate; server_max_window_bits=9, permessage-deflate"],
            f"{AGREED}; server_max_window_bits=9",
            9,
        ),
        (["permessage-deflate; server_max_window_bits=8, permessage-deflate"], AGREED, 15),
        (["permessage-deflate; server_max_window_bits=8", "x-webkit-deflate-frame, permessage-deflate"], AGREED, 15),
        # Those that cannot be met are declined.
        (["permessage-deflate; server_max_window_bits=8"], None, 0),
        (["permessage-deflate; server_max_window_bits=16"], None, 0),
        (["permessage-deflate; server_max_window_bits=010"], None, 0),
        (["permessage-deflate; server_max_window_bits"], None, 0),
        (["permessage-deflate; server_no_context_takeover=1"], None, 0),
        (["permessage-deflate; client_no_context_takeover; client_no_context_takeover"], None, 0),
        (["permessage-deflate; level=9"], None, 0),
        (["permessage-bzip2", "x-webkit-deflate-frame"], None, 0),
        # Empty elements, and lists of nothing else, are ignored (RFC 9110, section 5.6.1.2).
        ([""], None, 0),
        ([" ,, "], None, 0),
        (["", ", permessage-deflate,,"], AGREED, 15),
        ([], None, 0),
    ],
)
async def test_compression_parameters_are_negotiated(offers: list[str], answer: str | None, window_bits: int) -> None:
    lines = ["Sec-WebSocket-Protocol: wsbroker.v1", *(f"Sec-WebSocket-Extensions: {offer}" for offer in offers)]
    async with harness(compression=True) as opened:
        client = await opened.connect()
        client.send(request("GET / HTTP/1.1", *lines) + FRAMES)
        head = (await client.head()).decode().split("\r\n")
        found = [line for line in head if line.lower().startswith("sec-websocket-extensions:")]
        assert found == ([] if answer is None else [f"Sec-WebSocket-Extensions: {answer}"])
        assert "Sec-WebSocket-Protocol: wsbroker.v1" in head
        assert opened.node.taken[0].window_bits == window_bits
        # The next one has no part in what this one has agreed to.
        await opened.upgrade(request())
        assert opened.node.taken[1].window_bits == 0


async def test_compression_is_not_negotiated_when_disabled() -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(request("GET / HTTP/1.1", "Sec-WebSocket-Extensions: permessage-deflate"))
        assert b"extensions" not in (await client.head()).lower()
        assert opened.node.taken[0].window_bits == 0


@pytest.mark.parametrize("offer", ["permessage-deflate;", "deflate; =1", ";", "a b", 'a; b="c', 'a; b="c d"'])
async def test_malformed_extension_offer_is_refused(offer: str) -> None:
    async with harness(compression=True) as opened:
        data = request("GET / HTTP/1.1", f"Sec-WebSocket-Extensions: {offer}")
        assert "Sec-WebSocket-Extensions" in (await refused(opened, data, 400)).body


async def test_websockets_client_accepts_the_negotiated_compression() -> None:
    bits = [None, 8, 9, 12, 15]
    async with harness(compression=True) as opened:
        for no_server, no_client, server, client in itertools.product(
            [False, True], [False, True], bits, [True, *bits]
        ):
            if client == 8:  # which zlib cannot do, as websockets knows
                continue
            offer = ClientPerMessageDeflateFactory(no_server, no_client, server, client)
            protocol = ClientProtocol(parse_uri(f"ws://{opened.address}/"), extensions=[offer])
            protocol.send_request(protocol.connect())
            connection = await opened.connect()
            connection.send(b"".join(protocol.data_to_send()))
            protocol.receive_data(await connection.head())
            assert protocol.handshake_exc is None
            assert protocol.state is OPEN
            found = [(type(each), vars(each)) for each in protocol.extensions if isinstance(each, PerMessageDeflate)]
            window_bits = opened.node.taken[-1].window_bits
            assert [kind for kind, _ in found] == ([] if server == 8 else [PerMessageDeflate])
            for _, agreed in found:
                assert agreed["remote_no_context_takeover"]
                assert agreed["local_no_context_takeover"]
                assert agreed["remote_max_window_bits"] == window_bits
            await connection.close()


async def test_browser_request_format_is_accepted() -> None:
    async with harness() as opened:
        data = request(without="Connection").replace(b"Upgrade: websocket", b"UPGRADE: WebSocket")
        await opened.upgrade(data[:-2] + b"connection: keep-alive, Upgrade\r\n\r\n")


async def test_request_may_be_split_at_every_byte(arrivals: asyncio.Queue[int]) -> None:
    data = request("GET / HTTP/1.1", "Sec-WebSocket-Protocol: wsbroker.v1") + FRAMES
    async with harness() as opened:
        for place in range(1, len(data)):
            client = await opened.connect()
            client.send(data[:place])
            assert await arrivals.get() == place
            client.send(data[place:])
            await client.head()
            if place < data.index(FRAMES):
                assert await arrivals.get() == len(data) - place
                assert opened.node.taken[-1].rest == FRAMES
            else:
                await all_received(opened, data[place:])
                assert opened.node.taken[-1].rest + data[place:] == FRAMES
            await client.close()
            await until(lambda: not opened.node.established)
        assert len(opened.node.taken) == len(data) - 1


async def test_request_may_arrive_byte_by_byte(arrivals: asyncio.Queue[int]) -> None:
    async with harness() as opened:
        client = await opened.connect()
        for byte in request():
            client.send(bytes([byte]))
            assert await arrivals.get() == 1
        await client.head()
        assert opened.node.taken[0].rest == b""


async def test_bytes_after_the_request_are_passed_on_unchanged() -> None:
    async with harness() as opened:
        client = await opened.upgrade(request() + FRAMES)
        client.send(b"later")
        await asyncio.wait_for(opened.node.heard.wait(), 10)
        assert opened.node.taken[0].rest == FRAMES
        assert opened.node.established[0].received == b"later"


async def test_many_bytes_after_the_request_are_passed_on() -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(request() + b"x" * 1_000_000)
        await client.head()
        await until(lambda: len(opened.node.taken[0].rest) + len(opened.node.established[0].received) == 1_000_000)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["wsbroker.v1"], "wsbroker.v1"),
        (["other, wsbroker.v1"], "wsbroker.v1"),
        (["other", "wsbroker.v1"], "wsbroker.v1"),
        (["wsbroker.v1, bearer.abc.def"], "wsbroker.v1"),
        (["bearer.abc.def, wsbroker.v1"], "wsbroker.v1"),
        (["bearer.abc.def"], None),
        ([], None),
        # Empty elements, and lists of nothing else, are ignored (RFC 9110, section 5.6.1.2).
        ([""], None),
        ([",", " , "], None),
        (["", "wsbroker.v1"], "wsbroker.v1"),
        ([", wsbroker.v1,, other,"], "wsbroker.v1"),
    ],
)
async def test_subprotocol_is_wsbroker_or_none(offered: list[str], chosen: str | None) -> None:
    async with harness() as opened:
        lines = [f"Sec-WebSocket-Protocol: {value}" for value in offered]
        client = await opened.connect()
        client.send(request("GET / HTTP/1.1", *lines))
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"bearer" not in head
        if chosen is None:
            assert b"Sec-WebSocket-Protocol" not in head
        else:
            assert f"Sec-WebSocket-Protocol: {chosen}\r\n".encode() in head


@pytest.mark.parametrize("offered", ["mqtt", "wsbroker.v2", "WSBROKER.V1", "mqtt, bearer.abc", "bearer"])
async def test_unknown_subprotocols_are_refused(offered: str) -> None:
    async with harness() as opened:
        reply = await refused(opened, request("GET / HTTP/1.1", f"Sec-WebSocket-Protocol: {offered}"), 400)
        assert "wsbroker.v1" in reply.body
        assert "abc" not in reply.body


# Refused


@pytest.mark.parametrize(
    "line",
    [
        "POST / HTTP/1.1",
        "OPTIONS / HTTP/1.1",
        "BREW / HTTP/1.1",
        "GET / HTTP/1.0",
        "POST / HTTP/1.0",
    ],
)
async def test_other_method_or_http_version_gets_426(line: str) -> None:
    async with harness() as opened:
        reply = await refused(opened, request(line), 426)
        assert reply.headers["upgrade"] == "websocket"
        assert reply.headers["connection"] == "close, Upgrade"


@pytest.mark.parametrize("without", ["Upgrade", "Connection"])
async def test_plain_get_gets_426(without: str) -> None:
    async with harness() as opened:
        await refused(opened, request(without=without), 426)


async def test_post_with_a_body_gets_426() -> None:
    async with harness() as opened:
        body = b'{"a":1}'
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        await refused(opened, head.encode() + body, 426)


async def test_chunked_request_gets_426() -> None:
    async with harness() as opened:
        await refused(opened, b"PUT / HTTP/1.1\r\nHost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 426)


async def test_head_request_is_answered_without_a_body() -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 426 ")
        assert answer.endswith(b"\r\n\r\n")
        assert b"Content-Length: " in answer
        assert b"Content-Length: 0" not in answer


async def test_other_websocket_version_gets_the_supported_version() -> None:
    async with harness() as opened:
        data = request(without="Sec-WebSocket-Version")[:-2] + b"Sec-WebSocket-Version: 8\r\n\r\n"
        reply = await refused(opened, data, 426)
        assert reply.headers["sec-websocket-version"] == "13"


@pytest.mark.parametrize(
    "data",
    [
        request(without="Host"),
        request("GET / HTTP/1.1", "Host: broker.example"),
        request(host="a b"),
        request(host="user@broker.example"),
        request(host="[::1"),
        request(host="broker.example:port"),
        request("GET / HTTP/1.0", "Host: broker.example"),
    ],
)
async def test_request_needs_exactly_one_host(data: bytes) -> None:
    async with harness() as opened:
        reply = await refused(opened, data, 400)
        assert "Host" in reply.body


@pytest.mark.parametrize(
    "data",
    [
        request(without="Sec-WebSocket-Key"),
        request("GET / HTTP/1.1", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        request(key=""),
        request(key="c2hvcnQ="),
        request(key="***not base 64***"),
        request(key="\u00e9" * 22 + "=="),
        request(without="Sec-WebSocket-Version"),
        request("GET / HTTP/1.1", "Sec-WebSocket-Version: 13"),
        request("GET / HTTP/1.1", "Sec-WebSocket-Protocol: a b"),
        request("GET / HTTP/1.1", "Connection: ;"),
    ],
)
async def test_invalid_websocket_headers_are_refused(data: bytes) -> None:
    async with harness() as opened:
        reply = await refused(opened, data, 400)
        assert "the header " in reply.body


@pytest.mark.parametrize("host", ["[fe80::1%eth0]:8765", "[fe80::1%25eth0]", "[fe80::1%1]:", "[::1]", "bücher.example"])
async def test_host_may_have_a_zone_or_other_letters(host: str) -> None:
    async with harness() as opened:
        await opened.upgrade(request(host=host.encode().decode("latin-1")))


@pytest.mark.parametrize("host", ["[fe80::1%]", "[fe80::1%a b]", "[fe80::1%a/b]", "fe80::1%eth0/", "[%eth0]"])
async def test_malformed_zone_is_refused(host: str) -> None:
    async with harness() as opened:
        await refused(opened, request(host=host), 400)


async def test_empty_elements_between_options_are_ignored() -> None:
    async with harness() as opened:
        data = request(without="Connection")[:-2] + b"Connection: , keep-alive,, Upgrade,\r\nConnection:\r\n\r\n"
        await opened.upgrade(data)


@pytest.mark.parametrize("length", ["Content-Length: 5", "Transfer-Encoding: chunked"])
async def test_websocket_request_with_a_body_is_refused(length: str) -> None:
    async with harness() as opened:
        await refused(opened, request("GET / HTTP/1.1", length) + b"hello", 400)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
        b"\x00",
        b"\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\nUpgrade: websocket\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\nno colon\r\n\r\n",
    ],
)
async def test_bytes_that_are_not_http_get_400(data: bytes) -> None:
    async with harness() as opened:
        await refused(opened, data, 400)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "ws:// instead of wss://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\n\r\n", "PROXY protocol"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12), "PROXY protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "malformed"),
        # The clients of these wait for an answer to their first line.
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "PROXY protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP/1.1"),
        (b"EHLO mail.example\r\n", "not HTTP/1.1"),
        (b"GET /\r\n", "not HTTP/1.1"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2])
async def test_other_protocols_are_named(data: bytes, told: str, pieces: int, arrivals: asyncio.Queue[int]) -> None:
    async with harness() as opened:
        client = await opened.connect()
        if pieces == 2 and data[:1].isalpha():
            client.send(data[:3])
            await arrivals.get()
            data = data[3:]
        client.send(data)
        reply = await client.reply()
        check(reply, 400)
        assert told in reply.body


async def test_bytes_that_are_not_http_in_a_later_segment_get_400(arrivals: asyncio.Queue[int]) -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(b"GET / HTTP/1.1\r")
        await arrivals.get()
        client.send(b"\nHost: x")
        await arrivals.get()
        assert opened.limiter.refused == {}
        client.send(b"\n")
        check(await client.reply(), 400)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        request("GET / HTTP/1.1", "A: " + "a" * MAX_HEAD),
        request("GET / HTTP/1.1", *["A: a"] * 129),
        request("GET / HTTP/1.1", *["A: " + "a" * 1000] * 17),
        b"A" * (MAX_HEAD + 1),
        request()[:-2] + b"A: a\r\n" * 4000,
    ],
)
async def test_head_over_the_limit_is_refused(data: bytes) -> None:
    async with harness() as opened:
        await refused(opened, data, 431)


@pytest.mark.parametrize("max_head", [1024, MAX_HEAD, 100_000])
async def test_one_line_may_be_as_long_as_the_head(max_head: int) -> None:
    room = max_head - len(request("GET / HTTP/1.1", "Cookie: "))
    for size, status in ((room, 101), (room + 1, 431)):
        async with harness(max_head=max_head) as opened:
            client = await opened.connect()
            client.send(request("GET / HTTP/1.1", "Cookie: " + "c" * size) + FRAMES)
            assert (await client.head()).startswith(f"HTTP/1.1 {status} ".encode())
            if status == 431:
                assert f"longer than {max_head} bytes (limits.max_head)" in (await client.rest()).decode()


async def test_unknown_path_gets_404() -> None:
    async with harness(path="/ws") as opened:
        await refused(opened, request("GET / HTTP/1.1"), 404)
    async with harness(path="/ws") as opened:
        reply = await refused(opened, b"GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n", 404)
        assert "/ws" in reply.body
    async with harness(path="/ws") as opened:
        await refused(opened, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404)
    async with harness(path="/ws") as opened:
        await opened.upgrade(request("GET /ws?a=/b HTTP/1.1"))


async def test_slash_at_the_end_of_the_path_makes_no_difference() -> None:
    for path, other in (("/ws", "/ws/"), ("/ws/", "/ws"), ("/", "/?a")):
        async with harness(path=path) as opened:
            await opened.upgrade(request(f"GET {other} HTTP/1.1"))
            await opened.upgrade(request(f"GET {path} HTTP/1.1"))
    for path in ("/ws//", "/ws/a", "//ws", "/"):
        async with harness(path="/ws") as opened:
            await refused(opened, request(f"GET {path} HTTP/1.1"), 404)


async def test_cross_origin_page_is_refused() -> None:
    async with harness() as opened:
        with capture_logs() as logs:
            await refused(opened, request("GET / HTTP/1.1", "Origin: http://evil.example"), 403)
        assert [entry["origin"] for entry in logs if entry["event"] == "origin refused"] == ["http://evil.example"]


async def test_refused_origin_is_logged_as_it_was_written_but_not_at_any_length() -> None:
    async with harness() as opened:
        with capture_logs() as logs:
            written = "Origin: https://münchen.example".encode().decode("latin-1")
            check(await opened.ask(request("GET / HTTP/1.1", written)), 403)
            check(await opened.ask(request("GET / HTTP/1.1", f"Origin: {'x' * 5000}", host="x" * 5000)), 403)
        first, second = [entry for entry in logs if entry["event"] == "origin refused"]
        assert first["origin"] == "https://münchen.example"
        assert second["origin"] == second["host"] == "x" * 300 + "…"


async def test_same_host_loopback_and_listed_origins_are_allowed_on_loopback() -> None:
    async with harness(origins=["https://app.example"]) as opened:
        for origin, host in (
            ("http://127.0.0.1:8765", "127.0.0.1:8765"),
            ("http://localhost:5173", "localhost:8765"),
            ("https://app.example", "[::1]:8765"),
            ("https://app.example/", "localhost"),
            ("https://app.example", "app.example"),
        ):
            client = await opened.upgrade(request("GET / HTTP/1.1", f"Origin: {origin}", host=host))
            await client.close()
        check(await opened.ask(request("GET / HTTP/1.1", "Origin: null", host="localhost")), 403)


async def test_page_whose_name_resolves_to_loopback_is_refused() -> None:
    async with harness() as opened:
        with capture_logs() as logs:
            reply = await refused(opened, request("GET / HTTP/1.1", "Origin: http://broker.example"), 403)
        assert "server.origins" in reply.body
        [entry] = [entry for entry in logs if entry["event"] == "origin refused"]
        assert (entry["origin"], entry["host"]) == ("http://broker.example", "broker.example")


async def test_a_request_with_two_origins_is_refused() -> None:
    async with harness() as opened:
        lines = ("Origin: http://broker.example", "Origin: http://evil.example")
        await refused(opened, request("GET / HTTP/1.1", *lines), 400)


# Health


@pytest.mark.parametrize(
    "data",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz?a=b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET http://x/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_healthz_answers_200(data: bytes) -> None:
    async with harness() as opened:
        reply = await refused(opened, data, 200)
        assert reply.body == "ok\n"


async def test_healthz_answers_503_while_draining() -> None:
    async with harness() as opened:
        opened.node.draining = True
        reply = await refused(opened, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 503)
        assert "shutting down" in reply.body
        assert 1 <= int(reply.headers["retry-after"]) <= 6


@pytest.mark.parametrize("draining", [False, True])
async def test_healthz_accepts_get_and_head_only(draining: bool) -> None:
    async with harness() as opened:
        opened.node.draining = draining
        head = await opened.ask_raw(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 " if draining else b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")
        for method in (b"POST", b"OPTIONS", b"DELETE", b"get"):
            reply = await opened.ask(method + b" /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            check(reply, 426)
            assert reply.headers["upgrade"] == "websocket"


async def test_healthz_answers_200_when_full() -> None:
    async with harness(capacity=Capacity(connections=0, extra=5)) as opened:
        assert (await opened.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200


# Too slow, gone, or in the way of a shutdown


@pytest.mark.parametrize("sent", [b"", b"GET / HT", request()[:-1]])
async def test_handshake_timeout_closes_without_an_answer(sent: bytes) -> None:
    async with harness(open_timeout=0.1) as opened:
        client = await opened.connect()
        client.send(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await client.rest() == b""
        assert opened.limiter.connections == 0
        assert opened.limiter.refused == {0: 1}


async def test_slow_bytes_do_not_extend_the_handshake_timeout() -> None:
    async with harness(open_timeout=0.1) as opened:
        client = await opened.connect()
        client.send(b"GET / HTTP/1.1\r\n")
        while not opened.limiter.refused:
            client.send(b"A: a\r\n")
            await asyncio.sleep(0.005)
        assert opened.limiter.refused == {0: 1}


async def test_sweep_leaves_established_connections_alone() -> None:
    async with harness(open_timeout=0.1) as opened:
        kept = await opened.upgrade(request())
        late = await opened.connect()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await late.head()
        assert len(opened.node.established) == 1
        await kept.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", request()[:-1]])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_disconnect_during_the_request_is_cleaned_up(sent: bytes, how: str) -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(sent)
        await until(lambda: opened.limiter.connections == 1)
        await getattr(client, how)()
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.refused == {}
        assert opened.node.taken == []


async def test_disconnect_after_the_request_is_cleaned_up() -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(request())
        await client.reset()
        await until(lambda: opened.limiter.connections == 0)


async def test_refusal_arrives_while_the_client_keeps_sending() -> None:
    async with harness() as opened:
        client = await opened.connect()
        body = b"x" * 20_000_000
        client.send(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await client.writer.drain()
        check(await client.reply(), 404)


async def test_half_closed_client_gets_its_answer() -> None:
    async with harness() as opened:
        client = await opened.connect()
        client.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        client.writer.write_eof()
        check(await client.reply(), 404)


async def test_refused_client_that_does_not_close_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "REFUSED_TIMEOUT", 0.05)
    async with harness() as opened:
        client = await opened.connect()
        client.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        check(await client.reply(), 404)
        assert opened.limiter.connections == 1
        await until(lambda: opened.limiter.connections == 0)


async def test_shutdown_refuses_pending_handshakes() -> None:
    async with harness() as opened:
        silent = await opened.connect()
        midway = await opened.connect()
        midway.send(request()[:50])
        await until(lambda: opened.limiter.connections == 2)
        opened.handshakes.close()
        for client in (silent, midway):
            reply = await client.reply()
            check(reply, 503)
            assert 1 <= int(reply.headers["retry-after"]) <= 6
            await client.close()
        await opened.handshakes.wait_empty(10)
        assert opened.limiter.connections == 0


async def test_request_during_a_shutdown_is_refused() -> None:
    async with harness() as opened:
        opened.node.draining = True
        reply = await refused(opened, request(), 503)
        assert "retry-after" in reply.headers


async def test_shutdown_wait_for_refused_clients_is_bounded() -> None:
    async with harness() as opened:
        client = await opened.connect()
        await until(lambda: opened.limiter.connections == 1)
        opened.handshakes.close()
        await opened.handshakes.wait_empty(0)
        await until(lambda: opened.limiter.connections == 0)
        await client.close()


# Capacity


async def test_connection_over_the_limit_gets_retry_after_and_connects_later() -> None:
    async with harness(capacity=Capacity(connections=2, extra=5)) as opened:
        first = await opened.upgrade(request())
        await opened.upgrade(request())
        reply = await opened.ask(request())
        check(reply, 503)
        assert "full" in reply.body
        assert 1 <= int(reply.headers["retry-after"]) <= 6
        await first.close()
        await until(lambda: opened.node.connections == 1)
        await opened.upgrade(request())
        assert opened.limiter.refused == {503: 1}


async def test_connection_over_the_limit_is_accepted_if_capacity_is_free_at_its_request() -> None:
    async with harness(capacity=Capacity(connections=1, extra=5)) as opened:
        first = await opened.upgrade(request())
        waiting = await opened.connect()
        await until(lambda: opened.limiter.connections == 2)
        await first.close()
        await until(lambda: opened.node.connections == 0)
        waiting.send(request())
        assert (await waiting.head()).startswith(b"HTTP/1.1 101 ")


async def test_pending_handshakes_count_towards_the_limit() -> None:
    async with harness(capacity=Capacity(connections=2, extra=5)) as opened:
        await opened.connect()
        await opened.connect()
        await until(lambda: opened.limiter.connections == 2)
        check(await opened.ask(request()), 503)


async def test_connection_over_the_extra_capacity_is_closed_at_once() -> None:
    async with harness(capacity=Capacity(connections=1, extra=2)) as opened:
        await opened.upgrade(request())
        waiting = [await opened.connect() for _ in range(2)]
        await until(lambda: opened.limiter.connections == 3)
        surplus = await opened.connect()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await surplus.head()
        assert opened.limiter.refused == {0: 1}
        for client in waiting:
            client.send(request())
            check(await client.reply(), 503)


async def test_refused_connections_are_bounded_and_take_no_capacity() -> None:
    async with harness(capacity=Capacity(connections=1, extra=2)) as opened:
        for _ in range(4):
            client = await opened.connect()
            client.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            check(await client.reply(), 404)
            assert opened.limiter.connections <= 2
        await opened.upgrade(request())


# Nothing is left


def left() -> list[object]:
    kinds = (Handshake, Request, Response, Headers)
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


@pytest.mark.parametrize("pieces", [1, 3])
async def test_nothing_of_the_handshake_is_alive_after_the_upgrade(pieces: int) -> None:
    async with harness() as opened:
        gc.collect()
        assert left() == []
        gc.disable()
        try:
            lines = ("Sec-WebSocket-Protocol: wsbroker.v1", "Origin: http://localhost")
            data = request("GET / HTTP/1.1", *lines, host="localhost")
            for _ in range(10):
                client = await opened.connect()
                for piece in range(pieces):
                    size = len(data) // pieces + 1
                    client.send(data[piece * size : (piece + 1) * size])
                    await client.writer.drain()
                    await asyncio.sleep(0)
                assert (await client.head()).startswith(b"HTTP/1.1 101 ")
            assert len(opened.node.established) == 10
            assert left() == []
        finally:
            gc.enable()


async def test_nothing_of_the_handshake_is_alive_with_the_real_node() -> None:
    loop = asyncio.get_running_loop()
    node = RealNode(Config(), MemoryEngine(), loop)
    await node.start()
    async with harness() as opened:
        opened.handshakes.node = opened.limiter.node = node
        gc.collect()
        gc.disable()
        try:
            clients = [await opened.upgrade(request()) for _ in range(10)]
            assert node.connections == 10
            assert left() == []
        finally:
            gc.enable()
        for client in clients:
            await client.close()
        await until(lambda: node.connections == 0)
    await node.stop()


async def test_nothing_is_scheduled_for_a_connection_once_it_is_established() -> None:
    async with harness() as opened:
        before = len(asyncio.all_tasks())
        await opened.upgrade(request())
        assert opened.limiter.connections == 1
        assert len(asyncio.all_tasks()) == before
        await until(lambda: opened.handshakes._sweeper is None)


def test_number_of_header_lines_is_that_of_websockets() -> None:
    # An environment variable may set another one when websockets is imported.
    assert http11.MAX_NUM_HEADERS == 128


async def test_limiter_counts_each_connection_once() -> None:
    loop = asyncio.get_running_loop()
    async with harness() as opened:
        limiter = ConnectionLimiter(Limits(), opened.node, Capacity(1, 0))
        shared = Handshakes(Config(), opened.node, limiter, loop)
        handshake = Handshake(shared)
        assert shared.track(handshake)
        shared.untrack(handshake)
        shared.untrack(handshake)
        assert limiter.connections == 0
        assert shared.track(Handshake(shared))
        assert not shared.track(Handshake(shared))
        assert limiter.connections == 1
