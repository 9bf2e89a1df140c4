"""Addresses to listen on."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Address, parse_address
from broker.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8765", Address("127.0.0.1", 8765)),
        ("localhost:0", Address("localhost", 0)),
        ("a-b.example.:65535", Address("a-b.example.", 65535)),
        ("[::1]:80", Address("::1", 80)),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
        ("unix:/run/wsbroker/ws.sock", Address(path="/run/wsbroker/ws.sock")),
        ("unix:/a:1", Address(path="/a:1")),
        ("systemd", Address(systemd=True)),
    ],
)
def test_address_round_trips(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be host:port"),
        ("localhost", "must be host:port"),
        ("localhost:", "must be host:port"),
        ("localhost:http", "must be host:port"),
        ("localhost:-1", "must be host:port"),
        ("localhost:65536", "must be host:port"),
        ("localhost:٣", "must be host:port"),
        (":8765", "for every interface say 0.0.0.0 or [::]"),
        ("*:8765", "for every interface say 0.0.0.0 or [::]"),
        ("a b:1", "the host must be a name or an IP address"),
        ("-a:1", "the host must be a name or an IP address"),
        ("ws://a:1", "an IPv6 address is put in brackets"),
        ("::1:80", "an IPv6 address is put in brackets"),
        ("[::g]:80", "must be an IPv6 address"),
        ("[127.0.0.1]:80", "must be an IPv6 address"),
        ("unix:", "absolute path"),
        ("unix:run/x", "absolute path"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
        ("unix:/a\0b", "absolute path"),
    ],
)
def test_invalid_address_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        parse_address(text)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_ip_address_is_accepted(ip: object, port: int) -> None:
    text = f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"
    assert str(parse_address(text)) == text
