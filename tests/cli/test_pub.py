"""What `wsbroker pub` and `sub` are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures_command import Result, wsbroker

ROOT = Path(__file__).parent.parent.parent


async def test_a_key_that_is_not_utf8_is_refused() -> None:
    result = await wsbroker("pub", "t", "1", "--key", b"\xff".decode("utf-8", "surrogateescape"))
    assert result.status == 2
    assert "--key: it is not UTF-8" in result.err


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["pub", "a..b", "1"], "bad_topic: `a..b`: a token is empty; tokens are joined by single dots"),
        (["pub", "a.*", "1"], "bad_topic: `a.*`: `*` and `>` are for subscriptions, a topic holds neither"),
        (["sub", "a", ">.b"], "bad_topic: `>.b`: `>` must be the last token"),
        (
            ["pub", "t", "hello"],
            "bad_json: not valid JSON at character 1: invalid character (with --text, DATA is a plain string)",
        ),
        (["pub", "t", ""], "bad_json: not valid JSON: it ends too early (with --text, DATA is a plain string)"),
        (
            ["pub", "t", '1,"topic":"u"'],
            "bad_json: not valid JSON at character 2: trailing characters (with --text, DATA is a plain string)",
        ),
        (["pub", "t", "\udcff", "--text"], "bad_json: the text is not UTF-8: invalid start byte"),
    ],
)
async def test_invalid_data_is_refused_without_connecting(arguments: list[str], wrong: str) -> None:
    assert await wsbroker(*arguments, "--url", "unix:/nowhere") == Result(65, "", f"wsbroker: {wrong}\n")
