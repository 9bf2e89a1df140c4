"""The client's address behind a proxy, and which peers are trusted to state it."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.net.addresses import UNIX, Peer, parse_ip
from broker.net.proxy import FORWARDED, Proxies
from tests.net.harness import harness, request


@pytest.mark.parametrize(
    ("networks", "host", "forwarded", "client"),
    [
        # Nobody said anything, or somebody who is not believed.
        ([], None, [], None),
        ([], "192.0.2.1", ["203.0.113.7"], None),
        (["10.0.0.0/8"], "192.0.2.1", ["203.0.113.7"], None),
        (["::/0"], "192.0.2.1", ["203.0.113.7"], None),
        # One proxy.
        ([], None, ["203.0.113.7"], "203.0.113.7"),
        (["10.0.0.0/8"], "10.1.2.3", ["203.0.113.7"], "203.0.113.7"),
        (["10.0.0.0/8"], "::ffff:10.1.2.3", ["203.0.113.7"], "203.0.113.7"),
        (["2001:db8::/32"], "2001:db8::1", ["2001:db9::7"], "2001:db9::7"),
        # What a client says of itself stands first, and does not count.
        ([], None, ["127.0.0.1, 203.0.113.7"], "203.0.113.7"),
        ([], None, ["127.0.0.1", "203.0.113.7"], "203.0.113.7"),
        # Several proxies.
        (["10.0.0.0/8"], None, ["127.0.0.1, 203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        (["10.0.0.0/8"], "10.0.0.1", ["203.0.113.7", "10.0.0.3,10.0.0.2"], "203.0.113.7"),
        # All are proxies: the one furthest away.
        (["10.0.0.0/8"], None, ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # No address, and what stands before it.
        ([], None, ["unknown"], "unknown"),
        ([], None, [""], "unknown"),
        ([], None, ["203.0.113.7, unknown"], "unknown"),
        (["10.0.0.0/8"], "10.0.0.1", ["unknown"], "10.0.0.1"),
        (["10.0.0.0/8"], None, ["203.0.113.7, _hidden, 10.0.0.2"], "10.0.0.2"),
        ([], None, ["203.0.113.7, [2001:db8::7]x"], "unknown"),
        # Empty elements.
        ([], None, ["203.0.113.7, ,", ""], "203.0.113.7"),
        (["10.0.0.0/8"], None, ["203.0.113.7,, 10.0.0.2"], "203.0.113.7"),
        ([], None, [" , "], "unknown"),
        # A hundred elements are read.
        (["10.0.0.0/8"], None, ["203.0.113.7" + ", 10.0.0.2" * 99], "203.0.113.7"),
        (["10.0.0.0/8"], None, ["203.0.113.7" + ", 10.0.0.2" * 100], "10.0.0.2"),
    ],
)
def test_client_is_the_last_address_that_is_no_trusted_proxy(
    networks: list[str], host: str | None, forwarded: list[str], client: str | None
) -> None:
    peer = UNIX if host is None else Peer(parse_ip(host), 5000)
    found = Proxies(networks).resolve_client(peer, forwarded)
    assert (None if found is None else str(found)) == client
    assert found is None or (found.forwarded and not found.local)


async def test_forwarded_address_from_a_unix_socket_is_trusted(tmp_path: Path) -> None:
    async with harness(f"unix:{tmp_path}/ws.sock") as opened:
        await opened.upgrade(request("GET / HTTP/1.1", "X-Forwarded-For: 192.0.2.9, 203.0.113.7"))
        await opened.upgrade(request("GET / HTTP/1.1"))
        assert [str(taken.peer) for taken in opened.node.taken] == ["203.0.113.7", "unix:"]


async def test_forwarded_address_from_untrusted_tcp_is_ignored(tmp_path: Path) -> None:
    async with harness() as opened:
        await opened.upgrade(request("GET / HTTP/1.1", "X-Forwarded-For: 203.0.113.7"))
        assert str(opened.node.taken[0].peer).startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("networks", "values", "client"),
    [
        ([], ["for=203.0.113.7"], "203.0.113.7"),
        ([], ["For=203.0.113.7;proto=https;by=10.0.0.1"], "203.0.113.7"),
        ([], ["proto=https; for=203.0.113.7"], "203.0.113.7"),
        ([], ['for="203.0.113.7:5000"'], "203.0.113.7"),
        ([], ['for="[2001:db8::7]:5000";host="a,b"'], "2001:db8::7"),
        ([], ['for="[2001:db8::7]"'], "2001:db8::7"),
        ([], ['for="\\203.0.113.7"'], "203.0.113.7"),
        # What a client says of itself stands first, and does not count, whatever quotation marks it opens.
        ([], ["for=127.0.0.1, for=203.0.113.7"], "203.0.113.7"),
        ([], ["for=127.0.0.1", "for=203.0.113.7"], "203.0.113.7"),
        ([], ['for="127.0.0.1, for=203.0.113.7'], "203.0.113.7"),
        ([], ['for=127.0.0.1;x="', "for=203.0.113.7"], "203.0.113.7"),
        ([], ["for=203.0.113.7, ,"], "203.0.113.7"),
        # Several proxies.
        (["10.0.0.0/8"], ["for=203.0.113.7, for=10.0.0.3", "for=10.0.0.2"], "203.0.113.7"),
        (["10.0.0.0/8"], ["for=203.0.113.7, for=unknown, for=10.0.0.2"], "10.0.0.2"),
        # No address, or no valid element.
        ([], ["for=unknown"], "unknown"),
        ([], ["for=_hidden"], "unknown"),
        ([], ["proto=https"], "unknown"),
        ([], ["203.0.113.7"], "unknown"),
        ([], ["for=203.0.113.7, proto=http"], "unknown"),
        ([], ["for=203.0.113.7 x"], "unknown"),
        ([], [""], "unknown"),
        ([], ["for=203.0.113.7," + ";" * 100_000], "unknown"),
        ([], ["for=203.0.113.7" + "," * 200], "unknown"),
        ([], ['for="' + '"' * 100_000], "unknown"),
    ],
)
def test_client_in_the_header_forwarded(networks: list[str], values: list[str], client: str) -> None:
    found = Proxies(networks, FORWARDED).resolve_client(UNIX, values)
    assert str(found) == client
    assert found is not None
    assert found.forwarded


async def test_only_the_configured_header_is_read(tmp_path: Path) -> None:
    both = request("GET / HTTP/1.1", "X-Forwarded-For: 192.0.2.9", "Forwarded: for=203.0.113.7")
    for header, client in (("X-Forwarded-For", "192.0.2.9"), ("Forwarded", "203.0.113.7")):
        async with harness(f"unix:{tmp_path}/ws.sock", forwarded_header=header) as opened:
            await opened.upgrade(both)
            assert [str(taken.peer) for taken in opened.node.taken] == [client]
