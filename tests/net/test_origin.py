"""Which web pages may connect."""

from __future__ import annotations

import pytest

from broker.net.origin import Origins


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://broker.example", "broker.example"),
        ("http://broker.example", "broker.example:80"),
        ("http://broker.example:80", "broker.example"),
        ("https://broker.example", "broker.example"),
        ("https://broker.example", "broker.example:443"),
        ("https://broker.example:8443", "broker.example:8443"),
        ("HTTP://Broker.Example", "bROKER.eXAMPLE"),
        ("http://[2001:db8::1]:8765", "[2001:DB8::1]:8765"),
        ("http://127.0.0.1:8765", "127.0.0.1:8765"),
    ],
)
def test_same_host_origin_is_allowed(origin: str, host: str) -> None:
    assert Origins([]).allow(origin, host, loopback=False)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "broker.example"),
        ("http://evil.example", ""),
        ("http://broker.example.evil.example", "broker.example"),
        ("http://evil.example/broker.example", "broker.example"),
        ("http://broker.example@evil.example", "broker.example"),
        ("http://broker.example", "broker.example:8765"),
        ("http://broker.example:8765", "broker.example"),
        ("https://broker.example", "broker.example:80"),
        ("http://broker.example", "broker.example:443"),
        ("ws://broker.example", "broker.example"),
        ("chrome-extension://broker.example", "broker.example"),
        ("broker.example", "broker.example"),
        ("http://broker.example/", "broker.example"),
        ("http://broker.example ", "broker.example"),
        ("http://", ""),
        ("", "broker.example"),
        ("null", "broker.example"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_other_origins_are_refused(origin: str, host: str) -> None:
    assert not Origins([]).allow(origin, host, loopback=False)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:5173",
        "https://localhost:3000",
        "http://app.localhost:3000",
        "http://127.0.0.1:8080",
        "http://127.1.2.3",
        "http://[::1]:8080",
    ],
)
def test_loopback_origin_is_allowed_on_a_loopback_listener(origin: str) -> None:
    assert Origins([]).allow(origin, "127.0.0.1:8765", loopback=True)
    assert not Origins([]).allow(origin, "127.0.0.1:8765", loopback=False)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://1270.0.0.1",
        "http://[::1].evil.example",
        "http://[::2]",
        "http://evillocalhost",
        "file://localhost",
        "null",
    ],
)
def test_cross_origin_page_is_refused_on_a_loopback_listener(origin: str) -> None:
    assert not Origins([]).allow(origin, "127.0.0.1:8765", loopback=True)


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("https://app.example", "https://app.example:443"),
        ("https://App.example", "https://app.example"),
        ("null", "null"),
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("*", "https://any.example"),
        ("*", "null"),
    ],
)
def test_listed_origin_is_allowed(listed: str, origin: str) -> None:
    assert Origins([listed]).allow(origin, "broker.example", loopback=False)


@pytest.mark.parametrize(
    "origin", ["http://app.example", "https://app.example:8443", "https://www.app.example", "null"]
)
def test_listed_origin_matches_exactly(origin: str) -> None:
    assert not Origins(["https://app.example"]).allow(origin, "broker.example", loopback=False)
