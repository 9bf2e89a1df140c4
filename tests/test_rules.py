"""The rules for topics: which one applies, and which never can."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Limits, TopicRule
from broker.errors import ConfigError
from broker.overflow import OVERFLOWS
from broker.rules import NOTHING_KEPT, Retention, Rules, SubscriptionPolicy
from broker.topics import covers, matches, overlap
from tests.test_topics import patterns, topics


def rules(*made: TopicRule) -> Rules:
    return Rules(made, Limits())


def problems(*made: TopicRule) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        rules(*made)
    return [str(problem) for problem in raised.value.problems]


def test_policy_without_rules_is_that_of_the_limits() -> None:
    assert rules().policy("a.b") == SubscriptionPolicy(256, 65_536, "drop_oldest", OVERFLOWS)
    assert rules().max_age("a") is None


def test_only_the_most_specific_rule_applies() -> None:
    found = rules(
        TopicRule(">", max_queue=1, max_age=1.0),
        TopicRule("a.>", max_queue=2, overflow="latest"),
        TopicRule("a.*", overflows=["close", "latest"]),
        TopicRule("a.b", max_queue_limit=100, max_age=2.0),
    )
    assert found.policy("x") == SubscriptionPolicy(1, 65_536, "drop_oldest", OVERFLOWS)
    assert found.policy("a.c.d") == SubscriptionPolicy(2, 65_536, "latest", OVERFLOWS)
    assert found.policy("a.c") == SubscriptionPolicy(256, 65_536, "close", ("close", "latest"))
    assert found.policy("a.b") == SubscriptionPolicy(100, 100, "drop_oldest", OVERFLOWS)
    assert [found.max_age(topic) for topic in ("x", "a.c", "a.b", "x")] == [1.0, None, 2.0, 1.0]


def test_retention_is_that_of_the_most_specific_rule() -> None:
    found = rules(
        TopicRule("a.>", history=10, history_age=60.0, history_bytes=1000),
        TopicRule("a.b", compact=True, history=5, tombstone_age=7.0, dedup_age=3.0),
        TopicRule("a.c", dedup_age=9.0),
    )
    assert found.keeps_history
    assert not rules(TopicRule("a", max_age=1.0)).keeps_history
    assert found.retention("a.x") == Retention(10, 60.0, 1000)
    assert found.retention("a.b") == Retention(5, compact=True, tombstone_age=7.0, dedup_age=3.0)
    assert found.retention("a.c") == Retention(dedup_age=9.0)
    assert found.retention("b") == NOTHING_KEPT


def test_pattern_does_not_get_replay_as_its_default() -> None:
    found = rules(TopicRule("a.*", history=10, overflow="replay", overflows=["block", "replay", "latest"]))
    assert found.policy("a.b").overflow == "replay"
    assert found.policy("a.*").overflow == "latest"
    assert rules(TopicRule("a.*", history=1, overflow="replay", overflows=["replay"])).policy("a.*").overflow is None


def test_rule_with_history_for_topics_that_have_rules_of_their_own_is_reported() -> None:
    made = TopicRule("a.>", history=1, dedup_age=5.0)
    never = ["topics[1].match: `a.>` never applies: each topic that it matches has a rule of its own"]
    assert problems(made, TopicRule("a.*"), TopicRule("a.*.>")) == never
    assert rules(made, TopicRule("a.*")).retention("a.b.c").events == 1


def test_pattern_is_allowed_what_all_its_topics_are_allowed() -> None:
    found = rules(TopicRule("a.b", max_queue=1), TopicRule("a.*", max_queue=2), TopicRule("a.>", max_queue=3))
    assert [found.policy(name).max_queue for name in ("a.b", "a.*", "a.>", "a.*.c", ">", "*.b")] == [
        1,
        2,
        3,
        3,
        256,
        256,
    ]


def test_wider_pattern_does_not_bypass_a_rule() -> None:
    found = rules(
        TopicRule("prices.*", max_queue_limit=16, overflows=["latest", "close"]),
        TopicRule("*.eur", max_queue_limit=9),
        TopicRule("prices.>", max_queue=100, max_queue_limit=100, overflow="drop_newest"),
        TopicRule("other", max_queue_limit=1, overflows=["close"]),
    )
    assert found.policy("prices.*") == SubscriptionPolicy(16, 16, "latest", ("latest", "close"))
    assert found.policy("prices.>") == SubscriptionPolicy(16, 16, "latest", ("latest", "close"))
    assert found.policy("*.*") == SubscriptionPolicy(9, 9, "latest", ("latest", "close"))
    assert found.policy("x.*") == SubscriptionPolicy(9, 9, "drop_oldest", OVERFLOWS)
    assert found.policy(">") == SubscriptionPolicy(1, 1, "close", ("close",))
    assert found.policy("prices.a.>") == SubscriptionPolicy(100, 100, "drop_newest", OVERFLOWS)
    assert found.policy("$sys.>") == found.policy("x.a.*") == SubscriptionPolicy(256, 65_536, "drop_oldest", OVERFLOWS)


def test_less_specific_rules_do_not_restrict_a_specific_rule() -> None:
    found = rules(TopicRule(">", max_queue_limit=1), TopicRule("a.*", max_queue_limit=50))
    assert found.policy("a.*").max_queue_limit == found.policy("a.b").max_queue_limit == 50
    assert found.policy("a.>").max_queue_limit == 1


def test_block_is_a_default_only_if_a_rule_says_so() -> None:
    found = rules(TopicRule("a", overflow="block", overflows=["block"]), TopicRule("b", overflows=["close"]))
    assert found.policy("a").overflow == "block"
    assert found.policy("*") == SubscriptionPolicy(256, 65_536, None, ())
    assert rules(TopicRule("a", overflow="block", overflows=["block"])).policy("*") == SubscriptionPolicy(
        256, 65_536, None, ("block",)
    )


@given(st.lists(st.builds(TopicRule, patterns, max_queue_limit=st.integers(1, 9)), max_size=5), patterns, topics)
def test_pattern_has_no_more_rights_than_its_topics(made: list[TopicRule], pattern: str, topic: str) -> None:
    try:
        found = Rules([msgspec.structs.replace(rule, max_queue=1) for rule in made], Limits(max_queue=1))
    except ConfigError:  # twice the same
        return
    if matches(pattern, topic):
        assert found.policy(pattern).max_queue_limit <= found.policy(topic).max_queue_limit


@given(patterns, patterns, topics)
def test_patterns_that_match_one_topic_overlap(one: str, other: str, topic: str) -> None:
    assert overlap(one, other) == overlap(other, one)
    if matches(one, topic) and matches(other, topic):
        assert overlap(one, other)
    if covers(one, other):
        assert overlap(one, other)
    assert overlap(one, topic) == matches(one, topic)


@given(patterns, patterns, topics)
def test_covering_pattern_matches_every_topic_of_the_covered_one(wide: str, narrow: str, topic: str) -> None:
    if covers(wide, narrow) and matches(narrow, topic):
        assert matches(wide, topic)


@given(patterns, topics)
def test_matching_pattern_covers_the_topic(pattern: str, topic: str) -> None:
    assert covers(pattern, topic) == matches(pattern, topic)
    assert covers(pattern, pattern)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (TopicRule("a..b"), "topics[1].match: `a..b`: a token is empty; tokens are joined by single dots"),
        (
            TopicRule("a", max_queue=7, max_queue_limit=6),
            "topics[1].max_queue: `a`: max_queue must not be more than its ceiling",
        ),
        (
            TopicRule("a", max_queue=70_000),
            "topics[1].max_queue: `a`: max_queue must not be more than its ceiling, which is 65536",
        ),
        (TopicRule("a", overflow="close", overflows=["latest"]), "close is not among its overflows"),
        (TopicRule("a", overflow="replay"), "overflow: `a`: replay needs history beside it"),
        (TopicRule("a", overflows=["replay"], history=0), "overflows: `a`: replay needs history beside it"),
        (TopicRule("a", history_age=1.0), "history_age: `a`: needs history beside it"),
        (TopicRule("a", history_bytes=1, history=0), "history_bytes: `a`: needs history beside it"),
        (TopicRule("a", compact=True), "compact: `a`: needs history beside it"),
        (TopicRule("a", tombstone_age=1.0, compact=True), "compact: `a`: needs history beside it"),
        (TopicRule("a", history=1, tombstone_age=1.0), "tombstone_age: `a`: counts only with compact = true"),
        (TopicRule("a", history=1, history_bytes=2**30), "history_bytes: `a`: must not be more than limits.history_"),
    ],
)
def test_invalid_rule_is_reported(wrong: TopicRule, why: str) -> None:
    assert why in problems(wrong)[0]


def test_rules_that_can_never_apply_are_reported() -> None:
    assert problems(TopicRule("a"), TopicRule("b"), TopicRule("a", max_queue=1)) == [
        "topics[3].match: `a` is there twice, also in topics[1]"
    ]
    age = TopicRule("a.>", max_age=1.0)
    never = ["topics[1].match: `a.>` never applies: each topic that it matches has a rule of its own"]
    assert problems(age, TopicRule("a.*"), TopicRule("a.*.>")) == never
    assert problems(age, TopicRule("a.*"), TopicRule("a.*.*"), TopicRule("a.*.*.>", max_age=2.0)) == never
    for others in (["a.*"], ["a.*.>"], ["a.*", "a.b.>"], ["a.*", "a.*.*.>"], [">", "*.>"]):
        rules(age, *map(TopicRule, others))
    # A subscription to the very pattern has it.
    rules(TopicRule("a.>", max_queue=5, max_age=1.0), TopicRule("a.*"), TopicRule("a.*.>"))


def test_many_rules_are_checked_without_comparing_each_with_all() -> None:
    # If each of them were compared with all, this would take half an hour.
    made = [TopicRule(f"a.b{number}.>", max_age=1.0 + number) for number in range(20_000)]
    found = rules(*made)
    assert found.max_age("a.b19999.c") == 20_000
    assert found.max_age("a.b") is None


def test_wildcard_rule_does_not_apply_to_reserved_topics() -> None:
    found = rules(TopicRule("*.>", max_age=1), TopicRule("$sys.*", max_age=2), TopicRule(">", max_age=3))
    assert [found.max_age(topic) for topic in ("a.b", "$sys.a", "$sys.a.b", "$other.a", "$other")] == [
        1,
        2,
        None,
        None,
        None,
    ]


@given(st.lists(patterns, min_size=1, max_size=6, unique=True), topics)
def test_rule_that_applies_to_some_topic_is_not_reported(names: list[str], topic: str) -> None:
    made = [TopicRule(name, max_age=number + 1.0) for number, name in enumerate(names)]
    try:
        dead = []
        rules(*made)
    except ConfigError as error:
        dead = [str(problem) for problem in error.problems]
    lively = Rules([rule for rule in made if not any(f"`{rule.match}`" in str(problem) for problem in dead)], Limits())
    # Without those that never apply, all is as it would be with them.
    best = min((name for name in names if matches(name, topic)), key=rank_of, default=None)
    assert lively.max_age(topic) == (None if best is None else names.index(best) + 1.0)


def rank_of(name: str) -> list[int]:
    return [{"*": 1, ">": 2}.get(token, 0) for token in name.split(".")]
