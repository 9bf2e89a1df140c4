"""What is kept of a topic, as its rule says, and what may be wrong with that in a rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from broker.config import Limits, TopicRule

DEFAULT_TOMBSTONE_AGE: Final = 86_400.0
"""Seconds for which a tombstone is kept where the rule does not say."""
DEFAULT_DEDUP_AGE: Final = 120.0
"""The same for the `dedup` of a publish."""
MAX_DEDUP_AGE: Final = 86_400.0
"""The longest that a rule may have: for what was remembered under rules that are no longer known."""


class Retention(msgspec.Struct, frozen=True):
    """What of a topic is kept, as its rule says."""

    events: int = 0
    """The newest so many events. 0: the topic keeps no history."""
    age: float | None = None
    """Seconds; None: events of any age."""
    bytes: int | None = None
    """Of `data` and `key` together; None: any number. The newest event is kept in any case."""
    compact: bool = False
    """Whether only the newest event of each key is kept."""
    tombstone_age: float = DEFAULT_TOMBSTONE_AGE
    """On a compacted topic: seconds for which an event that removes its key is kept."""
    dedup_age: float = DEFAULT_DEDUP_AGE
    """Seconds for which the `dedup` of a publish is remembered, whether or not the topic keeps history."""


NOTHING_KEPT: Final = Retention()

ONLY_WITH_HISTORY: Final = ("history_age", "history_bytes", "compact", "tombstone_age")


def retention_of(rule: TopicRule | None) -> Retention:
    """Give what the rule of a topic says; None: no rule applies to it."""
    if rule is None:
        return NOTHING_KEPT
    return Retention(
        events=rule.history or 0,
        age=rule.history_age,
        bytes=rule.history_bytes,
        compact=bool(rule.compact),
        tombstone_age=DEFAULT_TOMBSTONE_AGE if rule.tombstone_age is None else rule.tombstone_age,
        dedup_age=DEFAULT_DEDUP_AGE if rule.dedup_age is None else rule.dedup_age,
    )


def retention_mistakes(rule: TopicRule, limits: Limits) -> Iterator[tuple[str, str]]:
    """Find what is wrong with the retention of one rule: the key, and what is wrong."""
    given = [name for name in ONLY_WITH_HISTORY if getattr(rule, name) not in (None, False)]
    if not rule.history:
        for name in given:
            yield name, f"`{rule.match}`: needs history beside it, the number of events to keep"
    if "tombstone_age" in given and not rule.compact:
        yield "tombstone_age", f"`{rule.match}`: counts only with compact = true"
    if rule.history_bytes is not None and rule.history_bytes > limits.history_bytes:
        most = limits.history_bytes
        yield "history_bytes", f"`{rule.match}`: must not be more than limits.history_bytes, which is {most}"
