"""The fast path of handshakes: what it accepts websockets accepts as well, with the same answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker._speedups import read_upgrade
from broker.net.http import HTTPResponse, Site, answer_plain, answer_request, parse_head
from broker.net.origin import Origins
from tests.speedups.wire import examples

FORWARDED = b"x-forwarded-for"
HEADS = {file.stem: file.read_bytes() for file in sorted((Path(__file__).parent / "requests").glob("*.http"))}
"""Requests of browsers and libraries, as `make interop` has seen them, to a broker at localhost:8765."""

PLAIN = (
    b"GET /stream?x=1 HTTP/1.1",
    b"Host: localhost:8765",
    b"Upgrade: websocket",
    b"Connection: keep-alive, Upgrade",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
    b"Origin: http://localhost:3000",
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    b"Sec-WebSocket-Protocol: wsbroker.v1",
    b"X-Forwarded-For: 192.0.2.1",
    b"User-Agent: test",
    b"Content-Length: 0",
    b"Cookie: a=b; c=d",
)


def join(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def new_site(*, compression: bool = False, path: str = "/stream") -> Site:
    return Site(path, Origins(["https://example.org"]), 65536, compression=compression)


def slow(head: bytes, site: Site, *, loopback: bool) -> tuple[object, list[str]]:
    """What websockets makes of a request: the answer, and the addresses of the client that a proxy has named."""
    request = parse_head(head)
    if isinstance(request, HTTPResponse):
        return request, []
    forwarded = request.headers.get_all("X-Forwarded-For")
    return answer_request(request, site, loopback=loopback), forwarded


def check(head: bytes, site: Site, *, loopback: bool = True) -> bool:
    """Compare both paths twice, as the first time something may be remembered. Returns whether the request is plain."""
    plain = False
    for _ in range(2):
        found = answer_plain(head, site, FORWARDED, loopback=loopback)
        if found is not None:
            upgrade, client = found
            assert (upgrade, [] if client is None else [client]) == slow(head, site, loopback=loopback)
            plain = True
    return plain


@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_request_of_a_library_is_plain(name: str, compression: bool) -> None:
    assert check(HEADS[name], new_site(compression=compression, path="/"))


def test_values_of_a_plain_request() -> None:
    assert read_upgrade(join(*PLAIN), FORWARDED) == (
        "/stream",
        "localhost:8765",
        "dGhlIHNhbXBsZSBub25jZQ==",
        "http://localhost:3000",
        "permessage-deflate; client_max_window_bits",
        "wsbroker.v1",
        "192.0.2.1",
    )
    assert read_upgrade(join(*PLAIN[:6]), b"forwarded") == (
        "/stream",
        "localhost:8765",
        "dGhlIHNhbXBsZSBub25jZQ==",
        None,
        None,
        None,
        None,
    )


def test_key_of_the_rfc_has_the_answer_of_the_rfc() -> None:
    """RFC 6455, section 1.3."""
    found = answer_plain(join(*PLAIN), new_site(), FORWARDED, loopback=True)
    assert found is not None
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in found[0].response


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET ", b"POST "),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"GET /", b"GET  /"),
        (b"GET /stream", b"GET http://localhost/stream"),
        (b"GET /stream", b"GET /other"),
        (b"GET /stream", b"GET /healthz"),
        (b"localhost:8765", b"[::1]:8765"),
        (b"localhost:8765", b"localhost:"),
        (b"localhost:8765", b"user@localhost"),
        (b"Upgrade: websocket", b"Upgrade: h2c"),
        (b"Upgrade: websocket", b"Upgrade: websocket, h2c"),
        (b"keep-alive, Upgrade", b"keep-alive"),
        (b"keep-alive, Upgrade", b"keep-alive,, Upgrade"),
        (b"keep-alive, Upgrade", b"keep-alive Upgrade"),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhlIHNhbXBsZSBub25jZQ="),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhlIHNhbXBsZSBub25jZ==="),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhlIHNhbXBsZSBub25jZ?=="),
        (b"Version: 13", b"Version: 8"),
        (b"Version: 13", b"Version: 13, 8"),
        (b"http://localhost:3000", b"https://evil.example"),
        (b"permessage-deflate; ", b"permessage-deflate;;"),
        (b"wsbroker.v1", b"wsbroker.v2"),
        (b"wsbroker.v1", b"wsbroker.v1, bearer.x"),
        (b"User-Agent: test", b"Authorization: Bearer x"),
        (b"User-Agent: test", b"Content-Length: 1"),
        (b"User-Agent: test", b"Content-Length: 00"),
        (b"User-Agent: test", b"Transfer-Encoding: chunked"),
        (b"User-Agent: test", b"User-Agent : test"),
        (b"User-Agent: test", b"User-Agent: t\xe9st"),
        (b"User-Agent: test", b"User-Agent: t\x00st"),
        (b"User-Agent: test", b" folded: test"),
        (b"User-Agent: test", b"User-Agent"),
        (b"User-Agent: test", b"Host: localhost:8765"),
        (b"User-Agent: test", b"x-forwarded-for: 192.0.2.2"),
        (b"User-Agent: test", b"\r\n".join([b"User-Agent: test"] * 100)),
        (b"User-Agent: test\r\n", b"User-Agent: test\n"),
        (b"Cookie: a=b; c=d\r\n", b"Cookie: a=b; c=d\r"),
        (b"Host: localhost:8765\r\n", b""),
        (b"Upgrade: websocket\r\n", b""),
        (b"Sec-WebSocket-Version: 13\r\n", b""),
    ],
)
def test_request_that_is_not_plain_is_left_to_websockets(old: bytes, new: bytes) -> None:
    head = join(*PLAIN)
    assert check(head, new_site(compression=True))
    assert old in head
    assert not check(head.replace(old, new, 1), new_site(compression=True))


@pytest.mark.parametrize("end", range(len(join(*PLAIN))))
def test_part_of_a_head_is_not_plain(end: int) -> None:
    assert read_upgrade(join(*PLAIN)[:end], FORWARDED) is None


def test_site_with_a_backend_for_identities_has_no_fast_path() -> None:
    site = Site("/", Origins([]), 65536, compression=False, passed_on=["Cookie"])
    assert answer_plain(join(b"GET / HTTP/1.1", *PLAIN[1:]), site, FORWARDED, loopback=True) is None


def test_what_is_remembered_is_bounded() -> None:
    site = new_site(compression=True)
    for i in range(200):
        head = join(
            *PLAIN[:6],
            b"Origin: http://localhost:%d" % (3000 + i),
            b"Sec-WebSocket-Extensions: x-%d, permessage-deflate" % i,
        )
        assert check(head, site)
    assert len(site._welcome) == len(site._agreements) == 64
    long = join(*PLAIN[:6], b"Origin: https://example.org", b"Sec-WebSocket-Extensions: " + b"x" * 300)
    site = new_site(compression=True)
    assert check(long, site)
    assert len(site._welcome) == 1
    assert not site._agreements


NAMES = st.sampled_from(
    [line.partition(b":")[0] for line in PLAIN[1:]] + [b"host", b"X", b"Sec-WebSocket-Foo", b"Accept"]
)
VALUES = st.sampled_from(
    [
        *(line.partition(b": ")[2] for line in PLAIN[1:]),
        b"", b" ", b",", b"Upgrade", b"upgrade,close", b"WebSocket", b"null", b"*", b"localhost", b"LOCALHOST:8765",
        b"permessage-deflate", b"permessage-deflate; server_no_context_takeover; client_max_window_bits=10",
        b"permessage-deflate; client_max_window_bits=7", b"a b", b"\xc3\xa9", b"wsbroker.v1, x", b"HTTP://LOCALHOST",
    ]
)  # fmt: skip
SPACE = st.sampled_from([b"", b" ", b"  ", b"\t", b" \t "])
LINES = st.builds(lambda name, before, value, after: name + b":" + before + value + after, NAMES, SPACE, VALUES, SPACE)


@given(
    start=st.sampled_from(
        [PLAIN[0], b"GET / HTTP/1.1", b"GET /stream/ HTTP/1.1", b"get /stream HTTP/1.1", b"GET /stream"]
    ),
    kept=st.sets(st.integers(1, len(PLAIN) - 1)),
    more=st.lists(LINES, max_size=3),
    order=st.randoms(use_true_random=False),
    case=st.sampled_from([bytes.lower, bytes.upper, bytes.title, bytes]),
    compression=st.booleans(),
    loopback=st.booleans(),
)
@examples(1000)
def test_both_paths_agree_on_any_request(
    start: bytes, kept: set[int], more: list[bytes], order: object, case: object, compression: bool, loopback: bool
) -> None:
    lines = [line for place, line in enumerate(PLAIN) if place and place not in kept] + more
    order.shuffle(lines)  # type: ignore[attr-defined]
    cased = [case(name) + colon + value for name, colon, value in (line.partition(b":") for line in lines)]  # type: ignore[operator]
    check(join(start, *cased), new_site(compression=compression), loopback=loopback)


@given(
    place=st.integers(0, len(join(*PLAIN)) - 1),
    byte=st.binary(min_size=0, max_size=2),
    size=st.integers(0, 2),
    loopback=st.booleans(),
)
@examples(2000)
def test_both_paths_agree_on_a_request_with_a_few_other_bytes(
    place: int, byte: bytes, size: int, loopback: bool
) -> None:
    head = join(*PLAIN)
    head = head[:place] + byte + head[place + size :]
    if head.find(b"\r\n\r\n") == len(head) - 4:  # a complete head, as `HeadReader` gives
        check(head, new_site(), loopback=loopback)
