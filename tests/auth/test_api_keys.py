"""API keys and their hashes."""

from __future__ import annotations

import hmac

import pytest

from broker.auth.api_keys import KeyRing, hash_key, is_hash, make_key
from broker.config import ApiKey
from broker.identity import Identity


def test_key_is_found_by_its_hash() -> None:
    keys = [make_key() for _ in range(3)]
    ring = KeyRing([ApiKey(f"key{number}", hash_key(key), ("publisher",)) for number, key in enumerate(keys)])
    assert [ring.find(key) for key in keys] == [
        Identity(f"key{number}", ("publisher",), key=hash_key(key)) for number, key in enumerate(keys)
    ]


@pytest.mark.parametrize("key", ["", "wsb_", "x" * 10_000, "é", "\ud800", "\0"])
def test_wrong_key_is_found_nowhere(key: str) -> None:
    assert KeyRing([ApiKey("one", hash_key(make_key()), ())]).find(key) is None
    assert KeyRing([]).find(key) is None


def test_keys_are_long_and_different() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("wsb_") and len(key) >= 47 for key in keys)


def test_each_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = [make_key() for _ in range(4)]
    ring = KeyRing([ApiKey(str(number), hash_key(key), ()) for number, key in enumerate(keys)])
    assert ring.find(keys[0]) is not None
    assert len(compared) == 4, "also behind the one that was found"
    ring.find("wrong")
    assert len(compared) == 8


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (hash_key("x"), True),
        ("sha256:", False),
        ("sha256:" + "g" * 64, False),
        ("sha512:" + "a" * 64, False),
        (hash_key("x").upper(), False),
        ("wsb_" + "x" * 43, False),
    ],
)
def test_hash_is_recognised(text: str, good: bool) -> None:
    assert is_hash(text) is good
