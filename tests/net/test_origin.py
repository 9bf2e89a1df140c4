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
        ("http://broker.example/", "broker.example"),
        ("http://[fe80::1%25eth0]:8765", "[fe80::1%eth0]:8765"),
        ("https://xn--bcher-kva.example", "bücher.example"),
        ("https://Bücher.example", "xn--bcher-kva.example"),
    ],
)
def test_same_host_origin_is_allowed(origin: str, host: str) -> None:
    assert Origins([]).refusal(origin, host, loopback=False) is None


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
        ("http://broker.example//", "broker.example"),
        ("http://broker.example/a", "broker.example"),
        ("http://broker.example ", "broker.example"),
        ("file://", ""),
        ("http://", ""),
        ("", "broker.example"),
        ("null", "broker.example"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_other_origins_are_refused(origin: str, host: str) -> None:
    assert Origins([]).refusal(origin, host, loopback=False) is not None


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
    assert Origins([]).refusal(origin, "127.0.0.1:8765", loopback=True) is None
    assert Origins([]).refusal(origin, "127.0.0.1:8765", loopback=False) is not None


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
    assert Origins([]).refusal(origin, "127.0.0.1:8765", loopback=True) is not None


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("https://app.example", "https://app.example:443"),
        ("https://App.example", "https://app.example"),
        ("null", "null"),
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("https://app.example/", "https://app.example"),
        ("https://app.example", "https://app.example/"),
        ("file://", "file://"),
        ("file:///", "file://"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("ionic://localhost", "ionic://localhost/"),
        ("qrc://", "qrc://"),
        ("tauri://localhost", "tauri://localhost"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example", "https://BÜCHER.example"),
        ("https://faß.example", "https://xn--fa-hia.example"),
        ("http://app.example:080", "http://app.example"),
        ("http://[0:0::1]:80", "http://[::1]"),
        ("https://[2001:DB8:0:0::1]", "https://[2001:db8::1]"),
        ("https://app_1.example.", "https://app_1.example."),
        ("https://*.example.com", "https://a.example.com"),
        ("https://*.example.com", "https://a.b.example.com:443"),
        ("https://*.Example.com:8443/", "https://a.example.com:8443"),
        ("https://*.bücher.example", "https://a.xn--bcher-kva.example"),
        ("*", "https://any.example"),
        ("*", "null"),
    ],
)
def test_listed_origin_is_allowed(listed: str, origin: str) -> None:
    assert Origins([listed]).refusal(origin, "broker.example", loopback=False) is None


@pytest.mark.parametrize(
    "origin", ["http://app.example", "https://app.example:8443", "https://www.app.example", "null"]
)
def test_listed_origin_matches_exactly(origin: str) -> None:
    assert Origins(["https://app.example"]).refusal(origin, "broker.example", loopback=False) is not None


@pytest.mark.parametrize(
    "origin",
    [
        "https://example.com",
        "https://.example.com.evil.example",
        "https://badexample.com",
        "http://a.example.com",
        "https://a.example.com:8443",
        "https://a.example.com@evil.example",
        "https://evil.example/.example.com",
        "https://.example.com",
        "https://a..example.com",
        "https://evil.example\\.example.com",
        "https://evil.example%2f.example.com",
        "https://evil.example;.example.com",
        "null",
    ],
)
def test_wildcard_stands_for_subdomains_only(origin: str) -> None:
    assert Origins(["https://*.example.com"]).refusal(origin, "broker.example", loopback=False) is not None


@pytest.mark.parametrize("origin", ["capacitor://evil", "capacitor://", "http://localhost", "file://localhost", "null"])
def test_listed_origin_of_another_scheme_matches_exactly(origin: str) -> None:
    rule = Origins(["capacitor://localhost", "file://"])
    assert rule.refusal(origin, "broker.example", loopback=False) is not None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "192.0.2.1", "[::2]"]
)
@pytest.mark.parametrize("origin", ["http://evil.example:8765", "http://localhost", "http://app.example", "null"])
def test_loopback_listener_takes_pages_under_its_own_names_only(origin: str, host: str) -> None:
    # DNS rebinding: the page's own name resolves to this machine, and the browser takes the broker for its server.
    assert Origins(["http://app.example", "null"]).refusal(origin, host, loopback=True) is not None


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8765", "a.localhost:1", "127.0.0.1", "127.5.6.7:8765", "[::1]:8765", "app.example"]
)
@pytest.mark.parametrize("origin", ["http://localhost:5173", "http://app.example"])
def test_loopback_listener_takes_pages_under_loopback_and_listed_names(origin: str, host: str) -> None:
    assert Origins(["http://app.example"]).refusal(origin, host, loopback=True) is None


def test_any_origin_takes_any_host() -> None:
    assert Origins(["*"]).refusal("http://evil.example", "evil.example", loopback=True) is None
