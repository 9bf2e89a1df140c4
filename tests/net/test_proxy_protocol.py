"""The PROXY protocol: its parser, and connections that begin with its header."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import parse_address
from broker.net.addresses import UNIX, UNKNOWN, Peer, parse_ip
from broker.net.proxy_protocol import MAX_V1, SIGNATURE_V2, HeaderReader, ProxyProtocol, ProxyProtocolError
from broker.net.tls import Tls
from tests.fixtures_certificates import loaded, make_pair, trusting
from tests.net.harness import TIMEOUT, harness, request, until

pytestmark = pytest.mark.needs("openssl")

LINE = b"PROXY TCP4 203.0.113.7 192.0.2.1 5000 8765\r\n"
LONGEST = b"ffff:" * 7 + b"ffff"
LOOPBACK = ["127.0.0.0/8"]


def v2(source: str, port: int, *, command: int = 0x21, family: int | None = None, tlvs: bytes = b"") -> bytes:
    """A header of version 2."""
    ip = ipaddress.ip_address(source)
    body = ip.packed + bytes(len(ip.packed)) + port.to_bytes(2, "big") + bytes(2) + tlvs
    family = (0x11 if ip.version == 4 else 0x21) if family is None else family
    return SIGNATURE_V2 + bytes([command, family]) + len(body).to_bytes(2, "big") + body


def read(data: bytes, size: int) -> tuple[HeaderReader, bytes]:
    """A reader that got the data in pieces of this size, until it was done, and what came behind the header."""
    reader = HeaderReader()
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        taken = reader.feed(piece)
        if reader.done:
            return reader, piece[taken:] + data[start + size :]
        assert taken == len(piece)
    return reader, b""


@pytest.mark.parametrize("size", [1, 2, 7, 13, 1000, 100_000])
@pytest.mark.parametrize(
    ("header", "client"),
    [
        (LINE, "203.0.113.7:5000"),
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255:65535"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 1 2\r\n", "[2001:db8::7]:1"),
        (
            b"PROXY TCP6 " + b"ffff:" * 7 + b"ffff " + b"ffff:" * 7 + b"ffff 65535 65535\r\n",
            f"[{'ffff:' * 7}ffff]:65535",
        ),
        (b"PROXY UNKNOWN\r\n", "unknown"),
        (b"PROXY UNKNOWN " + b"f" * (MAX_V1 - 16) + b"\r\n", "unknown"),
        (v2("203.0.113.7", 5000), "203.0.113.7:5000"),
        (v2("2001:db8::7", 5000), "[2001:db8::7]:5000"),
        (v2("::ffff:203.0.113.7", 5000), "203.0.113.7:5000"),
        (v2("203.0.113.7", 5000, tlvs=b"\x04\0\1x"), "203.0.113.7:5000"),
        (v2("203.0.113.7", 5000, tlvs=bytes(65_535 - 12)), "203.0.113.7:5000"),
        (SIGNATURE_V2 + b"\x21\0\0\0", "unknown"),
        (SIGNATURE_V2 + b"\x21\x31\0\xd8" + bytes(216), "unknown"),
        # The balancer's own connection, whatever family and addresses it has.
        (SIGNATURE_V2 + b"\x20\0\0\0", "None"),
        (SIGNATURE_V2 + b"\x20\x11\0\x02ab", "None"),
        (v2("203.0.113.7", 5000, command=0x20), "None"),
    ],
)
def test_header_gives_the_client(header: bytes, client: str, size: int) -> None:
    reader, rest = read(header + b"GET / HTTP/1.1\r\n", size)
    assert reader.done
    assert rest == b"GET / HTTP/1.1\r\n"
    assert str(reader.peer) == client
    assert reader.peer is None or (reader.peer.forwarded and not reader.peer.local)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\0",
        b"proxy TCP4 203.0.113.7 192.0.2.1 5000 8765\r\n",
        b"PROXYTCP4",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 203.0.113.7 192.0.2.1 5000 8765\n",
        b"PROXY TCP4 203.0.113.7 192.0.2.1 5000\r\n",
        b"PROXY TCP4 203.0.113.7 192.0.2.1 5000 8765 \r\n",
        b"PROXY TCP4  203.0.113.7 192.0.2.1 5000 8765\r\n",
        b"PROXY TCP4 203.0.113.7 192.0.2.1 65536 8765\r\n",
        b"PROXY TCP4 203.0.113.7 192.0.2.1 05000 8765\r\n",
        b"PROXY TCP4 203.0.113.7 192.0.2.1 -1 8765\r\n",
        b"PROXY TCP4 203.0.113.256 192.0.2.1 5000 8765\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 5000 8765\r\n",
        b"PROXY TCP6 203.0.113.7 192.0.2.1 5000 8765\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 5000 8765\r\n",
        b"PROXY UDP4 203.0.113.7 192.0.2.1 5000 8765\r\n",
        b"PROXY TCP4 \xd9\xa1.0.0.1 192.0.2.1 5000 8765\r\n",
        b"PROXY UNKNOWN" + b" " * MAX_V1,
        b"PROXY " + b"x" * 100_000,
        SIGNATURE_V2[:-1] + b"\r",
        SIGNATURE_V2 + b"\x11\x11\0\x0c" + bytes(12),
        SIGNATURE_V2 + b"\x22\x11\0\x0c" + bytes(12),
        SIGNATURE_V2 + b"\x21\x12\0\x0c" + bytes(12),
        SIGNATURE_V2 + b"\x21\xff\0\x0c" + bytes(12),
        SIGNATURE_V2 + b"\x21\x11\0\x0b" + bytes(12),
        SIGNATURE_V2 + b"\x21\x21\0\x0c" + bytes(36),
    ],
)
def test_invalid_header_is_refused_without_its_text(data: bytes, size: int) -> None:
    with pytest.raises(ProxyProtocolError) as refused:
        read(data, size)
    assert "203.0" not in str(refused.value)
    assert "xxx" not in str(refused.value)


@pytest.mark.parametrize("header", [LINE, v2("203.0.113.7", 5000, tlvs=b"abc"), SIGNATURE_V2 + b"\x20\0\0\0"])
def test_cut_header_is_never_done(header: bytes) -> None:
    for end in range(len(header)):
        assert not read(header[:end], 1000)[0].done
        assert not read(header[:end], 3)[0].done


@given(st.sampled_from([b"", b"PROXY TCP4 ", SIGNATURE_V2]), st.binary(), st.integers(1, 50))
def test_any_bytes_give_a_client_or_an_error_whatever_the_pieces(start: bytes, more: bytes, size: int) -> None:
    data = start + more

    def outcome(size: int) -> object:
        try:
            reader, rest = read(data, size)
        except ProxyProtocolError as error:
            return str(error)
        return reader.done, reader.peer, rest

    assert outcome(size) == outcome(len(data) or 1)


def test_reader_holds_no_more_than_the_longest_addresses() -> None:
    reader = HeaderReader()
    assert reader.feed(v2("203.0.113.7", 5000, tlvs=bytes(60_000))[:50_000]) == 50_000
    assert len(reader._data) <= 232
    assert not reader.done


def test_header_is_expected_from_listed_networks_only() -> None:
    rule = ProxyProtocol(["10.0.0.0/8", "2001:db8::/32"])
    for text, expected in (("10.1.2.3", True), ("2001:db8::1", True), ("::ffff:10.1.2.3", True), ("192.0.2.1", False)):
        assert rule.expects_header(Peer(parse_ip(text), 1)) == expected
    assert not rule.expects_header(UNIX)
    assert not rule.expects_header(UNKNOWN)
    assert ProxyProtocol(["unix"]).expects_header(UNIX)
    assert not ProxyProtocol([]).expects_header(Peer(parse_ip("127.0.0.1"), 1))


# Over real sockets


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (LINE, "203.0.113.7:5000"),
        (v2("2001:db8::7", 5000, tlvs=bytes(3000)), "[2001:db8::7]:5000"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
        (b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n", "127.0.0.1:1"),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
async def test_client_of_a_listed_balancer_has_its_own_address(header: bytes, client: str, apart: bool) -> None:
    async with harness(proxy_protocol=LOOPBACK) as opened:
        connection = await opened.connect()
        for piece in [header, request()] if apart else [header + request()]:
            connection.send(piece)
            await asyncio.sleep(0.01)
        assert (await connection.head()).startswith(b"HTTP/1.1 101 ")
        [taken] = opened.node.taken
        assert str(taken.peer) == client
        assert not taken.peer.local


async def test_own_connection_of_the_balancer_counts_as_the_balancers() -> None:
    async with harness(proxy_protocol=LOOPBACK) as opened:
        await opened.upgrade(SIGNATURE_V2 + b"\x20\0\0\0" + request())
        assert str(opened.node.taken[0].peer).startswith("127.0.0.1:")


@pytest.mark.parametrize("with_tls", [False, True])
async def test_health_check_that_is_reset_at_once_is_no_refusal(tmp_path: Path, with_tls: bool) -> None:
    # HAProxy sends the header and resets the connection, mostly before the broker accepts it.
    pair = make_pair(tmp_path)
    async with harness(proxy_protocol=LOOPBACK, tls=Tls(loaded(pair)) if with_tls else None) as opened:
        there = parse_address(opened.address)
        for header in (SIGNATURE_V2 + b"\x20\0\0\0", b"PROXY UNKNOWN\r\n", b""):
            with socket.create_connection((there.host, there.port)) as check:
                check.sendall(header)
                check.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        last = await opened.connect()
        last.send(LINE)
        if with_tls:
            await last.writer.start_tls(trusting(pair), server_hostname="localhost")
        last.send(request())
        assert (await last.head()).startswith(b"HTTP/1.1 101 ")
        await until(lambda: opened.limiter.connections == 1)
        assert opened.limiter.reasons == {}


async def test_header_over_a_unix_socket(tmp_path: Path) -> None:
    async with harness(f"unix:{tmp_path}/ws.sock", proxy_protocol=["unix"]) as opened:
        await opened.upgrade(LINE + request())
        await opened.upgrade(b"PROXY UNKNOWN\r\n" + request())
        assert [str(taken.peer) for taken in opened.node.taken] == ["203.0.113.7:5000", "unknown"]
        assert not any(taken.peer.local for taken in opened.node.taken)


@pytest.mark.parametrize("data", [request(), b"PROXY nonsense\r\n" + request(), b"PROXY " + b"x" * 5000])
async def test_listed_balancer_must_send_a_valid_header(data: bytes) -> None:
    async with harness(proxy_protocol=LOOPBACK) as opened:
        reply = await opened.ask(data)
        assert reply.status == 400
        assert "PROXY protocol" in reply.body
        assert opened.node.taken == []
        assert opened.limiter.reasons == {"proxy_protocol": 1}


@pytest.mark.parametrize("networks", [[], ["10.0.0.0/8", "unix"]])
async def test_header_from_elsewhere_is_refused(networks: list[str]) -> None:
    async with harness(proxy_protocol=networks) as opened:
        for header in (LINE, v2("203.0.113.7", 5000)):
            reply = await opened.ask(header + request())
            assert reply.status == 400
            assert "server.proxy_protocol" in reply.body
        assert opened.node.taken == []


@pytest.mark.parametrize("sent", [b"", b"PRO", LINE[:-1], v2("203.0.113.7", 5000, tlvs=bytes(100))[:-1], LINE])
async def test_open_timeout_covers_the_header(sent: bytes) -> None:
    async with harness(proxy_protocol=LOOPBACK, open_timeout=0.1) as opened:
        client = await opened.connect()
        client.send(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await client.rest() == b""
        assert opened.limiter.reasons == {"timeout": 1}


@pytest.mark.parametrize("sent", [b"", LINE[:20]])
async def test_disconnect_during_the_header_is_cleaned_up(sent: bytes) -> None:
    async with harness(proxy_protocol=LOOPBACK) as opened:
        client = await opened.connect()
        client.send(sent)
        await until(lambda: opened.limiter.connections == 1)
        await client.reset()
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.refused == {}


async def test_header_stands_before_tls(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    async with harness(tls=Tls(loaded(pair)), proxy_protocol=LOOPBACK) as opened:
        for header, client in ((LINE, "203.0.113.7:5000"), (v2("203.0.113.8", 5, tlvs=bytes(9000)), "203.0.113.8:5")):
            connection = await opened.connect()
            connection.send(header)
            await connection.writer.start_tls(trusting(pair), server_hostname="localhost")
            connection.send(request())
            assert (await connection.head()).startswith(b"HTTP/1.1 101 ")
            assert str(opened.node.taken[-1].peer) == client


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\0", b"PROXY x\r\n"])
async def test_tls_connection_without_its_header_is_closed(tmp_path: Path, data: bytes) -> None:
    pair = make_pair(tmp_path)
    async with harness(tls=Tls(loaded(pair)), proxy_protocol=LOOPBACK) as opened:
        client = await opened.connect()
        client.send(data)
        with contextlib.suppress(ConnectionResetError):
            assert await client.rest() == b""
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.reasons == {"proxy_protocol": 1}


async def test_cut_header_before_tls_is_bounded(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    async with harness(tls=Tls(loaded(pair)), proxy_protocol=LOOPBACK, open_timeout=0.1) as opened:
        client = await opened.connect()
        client.send(LINE[:10])
        with contextlib.suppress(ConnectionResetError, ssl.SSLError):
            assert await asyncio.wait_for(client.reader.read(), TIMEOUT) == b""
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.reasons == {"timeout": 1}


async def test_forwarded_header_counts_behind_the_balancer() -> None:
    networks = ["203.0.113.0/24"]
    async with harness(proxy_protocol=LOOPBACK, trusted_proxies=networks) as opened:
        await opened.upgrade(LINE + request("GET / HTTP/1.1", "X-Forwarded-For: 198.51.100.9"))
        assert str(opened.node.taken[0].peer) == "198.51.100.9"
