"""Addresses of listeners and clients."""

from __future__ import annotations

import pytest

from broker.net.addresses import UNIX, UNKNOWN, Address, Peer, parse_ip, parse_node, peer_of


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.7:5000", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:5000", "2001:db8::1"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%anything", "fe80::1"),
        ("[fe80::1%a]:1", "fe80::1"),
        ("203.0.113", "None"),
        ("localhost", "None"),
        ("", "None"),
    ],
)
def test_address_formats_of_proxies_are_parsed(text: str, address: str) -> None:
    assert str(parse_node(text)) == address


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        (Peer(parse_ip("203.0.113.7")), "203.0.113.7"),
        (Peer(parse_ip("203.0.113.7"), 5000), "203.0.113.7"),
        (Peer(parse_ip("203.0.113.7"), forwarded=True), "203.0.113.7"),
        (Peer(parse_ip("2001:db8:1:2:3::4"), 5000), "2001:db8:1:2::/64"),
        (Peer(parse_ip("2001:db8:1:2:5::6")), "2001:db8:1:2::/64"),
        (UNIX, "None"),
        (UNKNOWN, "None"),
    ],
)
def test_clients_are_counted_by_address_or_ipv6_network(peer: Peer, network: str) -> None:
    assert str(peer.network) == network


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        (Peer(parse_ip("127.0.0.1"), 5), True),
        (Peer(parse_ip("127.0.0.1")), True),
        (Peer(parse_ip("::1"), 5), True),
        (Peer(parse_ip("::ffff:127.0.0.1"), 5), True),
        (UNIX, True),
        (Peer(parse_ip("192.0.2.1"), 5), False),
        (UNKNOWN, False),
        # What a proxy says is never this machine.
        (Peer(parse_ip("203.0.113.7"), forwarded=True), False),
        (Peer(parse_ip("127.0.0.1"), forwarded=True), False),
        (Peer(parse_ip("::1"), 5, forwarded=True), False),
        (Peer(forwarded=True), False),
    ],
)
def test_peer_is_local_on_loopback_and_unix_sockets_unless_forwarded(peer: Peer, local: bool) -> None:
    assert peer.local == local


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (("192.0.2.1", 5), "192.0.2.1:5"),
        (("::1", 5, 0, 0), "[::1]:5"),
        (("fe80::1%eth0", 5, 0, 2), "[fe80::1]:5"),
        (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1:5"),
        (None, "unknown"),
    ],
)
def test_peer_of_a_tcp_socket(name: tuple[str, int] | tuple[str, int, int, int] | None, text: str) -> None:
    assert str(peer_of(name)) == text


def test_text_that_is_too_long_for_an_address_is_none() -> None:
    assert str(parse_ip("fe80::1%" + "z" * 15)) == "fe80::1"
    assert parse_ip("fe80::1%" + "z" * 100) is None  # it would be remembered with its zone


def test_peers_are_compared_by_what_they_are() -> None:
    assert Peer(parse_ip("192.0.2.1"), 5) == Peer(parse_ip("192.0.2.1"), 5)
    assert len({Peer(parse_ip("192.0.2.1"), 5), Peer(parse_ip("192.0.2.1"), 5)}) == 1
    assert Peer(parse_ip("192.0.2.1"), 5) != Peer(parse_ip("192.0.2.1"), 5, forwarded=True)
    assert Peer(parse_ip("192.0.2.1"), 5) != "192.0.2.1:5"


@pytest.mark.parametrize(
    ("address", "local"),
    [
        (Address(host="127.0.0.1"), True),
        (Address(host="::1"), True),
        (Address(host="::ffff:127.0.0.1"), True),
        (Address(host="LocalHost"), True),
        (Address(host="a.localhost"), True),
        (Address(path="/run/a"), True),
        (Address(systemd=True), True),
        (Address(host="0.0.0.0"), False),
        (Address(host="::"), False),
        (Address(host="broker.example"), False),
        (Address(host="192.0.2.1"), False),
    ],
)
def test_address_is_local_if_only_this_machine_can_connect(address: Address, local: bool) -> None:
    assert address.local == local
