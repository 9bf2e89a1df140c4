"""Which names are allowed, and which pattern means which topic."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import CommandError
from broker.topics import MAX_BYTES, check_pattern, check_topic, is_pattern, matches, rank

# Few different tokens, so that patterns and topics often meet.
tokens = st.sampled_from(["a", "b", "$s", "é", "a-b"])
topics = st.lists(tokens, min_size=1, max_size=4).map(".".join)
patterns = st.builds(
    lambda leading, last: ".".join((*leading, last)),
    st.lists(tokens | st.just("*"), max_size=3),
    tokens | st.sampled_from("*>"),
)


def model(pattern: str, topic: str) -> bool:
    """The rule once more, as a regular expression."""
    if topic[0] == "$" and pattern[0] != "$":
        return False
    parts = (re.escape(token).replace(r"\*", r"[^.]+").replace(">", r".+") for token in pattern.split("."))
    return re.fullmatch(r"\.".join(parts), topic) is not None


class TestMatches:
    @pytest.mark.parametrize(
        ("pattern", "topic"),
        [
            ("a.b", "a.b"),
            ("a.*", "a.b"),
            ("*", "a"),
            ("*.b", "a.b"),
            ("a.*.c", "a.b.c"),
            (">", "a"),
            (">", "a.b.c"),
            ("a.>", "a.b"),
            ("a.>", "a.b.c"),
            ("*.>", "a.b"),
            ("$broker.*", "$broker.stats"),
            ("$broker.>", "$broker.stats.connections"),
        ],
    )
    def test_matching_pairs(self, pattern: str, topic: str) -> None:
        assert matches(pattern, topic)

    @pytest.mark.parametrize(
        ("pattern", "topic"),
        [
            ("a.b", "a.B"),
            ("a", "a.b"),
            ("a.b", "a"),
            ("*", "a.b"),
            ("a.*", "a"),
            ("a.*", "a.b.c"),
            ("a.>", "a"),
            ("a.>", "ab.c"),
            ("*.>", "a"),
            (">", "$broker.stats"),
            ("*.stats", "$broker.stats"),
            ("$broker.>", "$broker"),
        ],
    )
    def test_pairs_that_do_not_match(self, pattern: str, topic: str) -> None:
        assert not matches(pattern, topic)

    @given(patterns, topics)
    def test_matches_like_the_model(self, pattern: str, topic: str) -> None:
        assert matches(pattern, topic) == model(pattern, topic)

    @given(topics)
    def test_a_topic_matches_itself(self, topic: str) -> None:
        assert matches(topic, topic)


class TestRank:
    def test_a_name_ranks_before_star_before_rest_token_by_token(self) -> None:
        wanted = ["a.b.c", "a.b.*", "a.b.>", "a.*.c", "a.*.*", "a.>", "*.b.c", "*.>", ">"]
        assert sorted(sorted(wanted), key=rank) == wanted

    @given(st.lists(patterns, unique=True, max_size=6), topics)
    def test_patterns_that_match_a_topic_have_different_ranks(self, some: list[str], topic: str) -> None:
        matching = [pattern for pattern in some if matches(pattern, topic)]
        assert len({rank(pattern) for pattern in matching}) == len(matching)

    @given(patterns, topics)
    def test_an_exact_topic_ranks_before_patterns(self, pattern: str, topic: str) -> None:
        if pattern != topic and matches(pattern, topic):
            assert rank(topic) < rank(pattern)


@given(patterns)
def test_name_with_a_wildcard_is_a_pattern(pattern: str) -> None:
    assert is_pattern(pattern) == (not {"*", ">"}.isdisjoint(pattern.split(".")))


def complaint(check: Callable[[str], None], name: str) -> str:
    """What the check says against the name; nothing if it takes it."""
    try:
        check(name)
    except CommandError as error:
        return error.message
    return ""


GOOD = ["a", "a.b", "Prices.EUR-USD_1", "é.日本.😀", "a" * MAX_BYTES, "é" * 127, "a.$b", "a\u200bb"]
BAD = {
    "": "must not be empty",
    ".": "a token is empty",
    "a.": "a token is empty",
    ".a": "a token is empty",
    "a..b": "a token is empty",
    "a b": "U+0020 is not allowed",
    "a\tb": "U+0009 is not allowed",
    "a\n": "U+000A is not allowed",
    "\0": "U+0000 is not allowed",
    "a\x7f": "U+007F is not allowed",
    "a\x85b": "U+0085 is not allowed",
    "a\xa0b": "U+00A0 is not allowed",
    "a\u2028b": "U+2028 is not allowed",
    "a\u2029b": "U+2029 is not allowed",
    "a\u3000b": "U+3000 is not allowed",
    "a\ud800": "U+D800 is not allowed",
    "a" * 256: "it has 256 characters, at most 255 bytes of UTF-8 are allowed",
    "é" * 128: "it has 256 bytes, at most 255 bytes of UTF-8 are allowed",
    "\ud800" * 1000: "it has 1000 characters, at most 255 bytes of UTF-8 are allowed",
}


class TestCheckTopic:
    @pytest.mark.parametrize("topic", GOOD)
    def test_accepts_valid_names(self, topic: str) -> None:
        check_topic(topic)

    @pytest.mark.parametrize(
        ("topic", "why"),
        [
            *BAD.items(),
            ("a.*", "`*` and `>` are for subscriptions"),
            ("a>", "`*` and `>` are for subscriptions"),
            ("$broker.stats", "begin with `$` belong to the broker"),
            ("$", "begin with `$` belong to the broker"),
        ],
    )
    def test_refuses_invalid_names(self, topic: str, why: str) -> None:
        with pytest.raises(CommandError, match=re.escape(why)) as raised:
            check_topic(topic)
        assert raised.value.code == "bad_topic"

    @given(topics)
    def test_accepts_generated_names(self, topic: str) -> None:
        check_topic(topic.replace("$", ""))


class TestCheckPattern:
    @pytest.mark.parametrize(
        "pattern", [*GOOD, "*", ">", "a.*", "*.b", "*.*", "a.>", "*.>", "$broker.stats", "$broker.*", "$broker.>"]
    )
    def test_accepts_valid_names(self, pattern: str) -> None:
        check_pattern(pattern)

    @pytest.mark.parametrize(
        ("pattern", "why"),
        [
            *BAD.items(),
            ("a*", "must be tokens of their own"),
            ("a.b*.c", "must be tokens of their own"),
            ("**", "must be tokens of their own"),
            ("a.>>", "must be tokens of their own"),
            ("a>", "must be tokens of their own"),
            (">.a", "`>` must be the last token"),
            ("a.>.b", "`>` must be the last token"),
            (">.>", "`>` must be the last token"),
        ],
    )
    def test_refuses_invalid_names(self, pattern: str, why: str) -> None:
        with pytest.raises(CommandError, match=re.escape(why)) as raised:
            check_pattern(pattern)
        assert raised.value.code == "bad_topic"

    @given(patterns)
    def test_accepts_generated_names(self, pattern: str) -> None:
        check_pattern(pattern)


def test_characters_are_allowed_one_by_one_as_the_rule_says() -> None:
    wrong = [
        code
        for code in range(0x110000)
        if chr(code) not in "*>$."
        and (complaint(check_topic, chr(code)) == "")
        != (not chr(code).isspace() and unicodedata.category(chr(code)) not in ("Cc", "Cs"))
    ]
    assert wrong == []


@given(st.text(max_size=300))
def test_error_message_is_short_and_printable_for_any_name(name: str) -> None:
    for check in (check_topic, check_pattern):
        message = complaint(check, name)
        assert len(message) < 250
        assert message == "" or message.isprintable()
        message.encode()


@given(st.text(st.sampled_from("a$*>. ") | st.characters(), max_size=12))
def test_valid_topic_is_a_valid_pattern(name: str) -> None:
    if not complaint(check_topic, name):
        check_pattern(name)
        assert not is_pattern(name)


def test_every_small_pattern_matches_like_the_model() -> None:
    names = [".".join(some) for size in (1, 2, 3) for some in itertools.product("ab*>", repeat=size)]
    for pattern in (name for name in names if not complaint(check_pattern, name)):
        for topic in (name for name in names if not complaint(check_topic, name)):
            assert matches(pattern, topic) == model(pattern, topic)
