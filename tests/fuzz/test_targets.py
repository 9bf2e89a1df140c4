"""The targets of the fuzzer take their corpora, and any bytes; and one that is broken is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.auth.tokens import TokenPolicy, TokenVerifier
from broker.auth.verification_keys import Secret
from tests.fuzz import targets
from tests.fuzz.targets import CORPUS, TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_target_takes_its_corpus(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert len(files) >= 5
    for file in files:
        TARGETS[name](file.read_bytes())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_target_takes_any_bytes(target: Callable[[bytes], None]) -> None:
    @given(st.binary() | st.text().map(str.encode))
    def take(data: bytes) -> None:
        target(data)

    take()


def test_accepted_forgery_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"another key that is long enough 123"  # that of the corpus
    verifier = TokenVerifier(TokenPolicy(algorithms=("HS256",)), Secret(key, ("HS256",)), lambda: 1.8e9)
    monkeypatch.setattr(targets, "VERIFIER", verifier)
    with pytest.raises(AssertionError, match="nobody knows the key"):
        targets.token((CORPUS / "token" / "00").read_bytes())


def test_wrong_containment_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "is_covered", lambda name, allowed: True)
    with pytest.raises(AssertionError):
        targets.patterns(b"*\na")
