"""Topics and patterns: which names are allowed, and which pattern means which topic.

A topic is a row of tokens joined by `.`. In a pattern the token `*` stands for exactly one token and `>`, which must be
the last, for one or more. The hub has an index that answers for many patterns at once; `matches` here is the rule
itself, which the index is tested against.
"""

from __future__ import annotations

import unicodedata

from broker.errors import CommandError

MAX_BYTES = 255
"""The longest topic or pattern, in bytes of UTF-8. Precedents: Kafka allows 249, TIBCO Rendezvous 255."""

RESERVED = "$"
"""The first character of the broker's own topics."""


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription to `pattern` (a valid pattern or topic) gets an event of `topic` (a valid topic).

    A topic that begins with `$` is matched only by a pattern that begins with `$` too.
    """
    if topic.startswith(RESERVED) and not pattern.startswith(RESERVED):
        return False
    wanted, tokens = pattern.split("."), topic.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
    elif len(tokens) != len(wanted):
        return False
    return all(want in ("*", token) for want, token in zip(wanted, tokens, strict=False))


def rank(pattern: str) -> tuple[int, ...]:
    """Give the sort key that puts the most specific pattern first: token by token, a name before `*` before `>`.

    Two different patterns that match one topic never have the same rank, so for every event exactly one of a
    connection's overlapping subscriptions is the most specific.
    """
    return tuple(_RANKS.get(token, 0) for token in pattern.split("."))


def covers(wide: str, narrow: str) -> bool:
    """Whether a topic or pattern matches every topic that another one does; both are valid."""
    if narrow.startswith(RESERVED) and not wide.startswith(RESERVED):
        return False
    wanted, tokens = wide.split("."), narrow.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
    elif len(tokens) != len(wanted) or tokens[-1] == ">":
        return False
    return all(want in ("*", token) for want, token in zip(wanted, tokens, strict=False))


def overlap(one: str, other: str) -> bool:
    """Whether some topic is matched by both topics or patterns, which are valid."""
    left, right = one.split("."), other.split(".")
    # `*` and `>` at the beginning do not stand for the broker's own topics.
    if (one.startswith(RESERVED) and other[0] in "*>") or (other.startswith(RESERVED) and one[0] in "*>"):
        return False
    for mine, theirs in zip(left, right, strict=False):
        if ">" in (mine, theirs):
            return True
        if mine != theirs and "*" not in (mine, theirs):
            return False
    return len(left) == len(right)


def is_pattern(name: str) -> bool:
    """Whether `name`, which is valid, may match more than the one topic of that name."""
    return "*" in name or ">" in name


def is_token(text: str) -> bool:
    """Whether `text` can be one token of a topic."""
    try:
        _check_name(text)
    except CommandError:
        return False
    return "." not in text and not is_pattern(text)


def check_topic(topic: str) -> None:
    """Check a name that events are published to or kept under.

    Raises CommandError with code `bad_topic`.
    """
    if topic.startswith(RESERVED):
        raise _bad(topic, "topics that begin with `$` belong to the broker")
    if is_pattern(topic):
        raise _bad(topic, "`*` and `>` are for subscriptions, a topic holds neither")
    _check_name(topic)


def check_pattern(pattern: str) -> None:
    """Check a name that is subscribed to: a topic, the broker's own (`$…`) included, or a pattern.

    Raises CommandError with code `bad_topic`.
    """
    _check_name(pattern)
    if not is_pattern(pattern):
        return
    *leading, last = pattern.split(".")
    if ">" in leading:
        raise _bad(pattern, "`>` must be the last token")
    for token in (*leading, last):
        if is_pattern(token) and token not in _RANKS:
            raise _bad(pattern, "`*` and `>` must be tokens of their own")


_RANKS = {"*": 1, ">": 2}


def _check_name(name: str) -> None:
    """Check what holds for topics and patterns alike: the length, the characters, no empty token."""
    if not name:
        raise CommandError("bad_topic", "a topic must not be empty")
    if len(name) > MAX_BYTES:  # before the characters are looked at: a name may be as long as a message
        raise _too_long(name, f"{len(name)} characters")
    if not name.isprintable() or " " in name:  # nearly every name is printable
        _check_characters(name)
    size = len(name.encode())
    if size > MAX_BYTES:
        raise _too_long(name, f"{size} bytes")
    if "" in name.split("."):
        raise _bad(name, "a token is empty; tokens are joined by single dots")


def _check_characters(name: str) -> None:
    for character in name:
        # No white space, no control character (Cc), no half of a surrogate pair (Cs), which UTF-8 cannot express.
        if character.isspace() or unicodedata.category(character) in ("Cc", "Cs"):
            raise _bad(name, f"U+{ord(character):04X} is not allowed: a topic has no white space or control characters")


def _too_long(name: str, size: str) -> CommandError:
    return _bad(name, f"it has {size}, at most {MAX_BYTES} bytes of UTF-8 are allowed")


def _bad(name: str, why: str) -> CommandError:
    # The message goes back to the client, so what it cites of a name stays short and printable.
    cited = name if len(name) <= 64 else f"{name[:64]}…"
    cited = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in cited)
    return CommandError("bad_topic", f"`{cited}`: {why}")
