"""The rules for topics: defaults and limits of subscriptions to some topics, and the maximum age of their events.

Of the rules that match, the most specific one applies, and it alone: what it does not say is as in the limits, not as
in a rule that is less specific. Defaults go by the rule that matches all topics of a pattern; what may be asked for by
every rule that applies to some of them, so that a wider pattern is no way around a rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from broker.config import Limits, TopicRule
from broker.errors import CommandError, ConfigError, Problem
from broker.overflow import OVERFLOWS
from broker.topics import check_pattern, covers, matches, overlap, rank


class SubscriptionPolicy(msgspec.Struct, frozen=True):
    """What holds for subscriptions to a topic or pattern."""

    max_queue: int
    """For those that do not say themselves."""
    max_queue_limit: int
    overflow: str | None
    """For those that do not say themselves; None: they have to say."""
    overflows: tuple[str, ...]
    """The policies that may be asked for."""


class Retention(msgspec.Struct, frozen=True):
    """What of a topic is kept, as its rule says."""

    events: int = 0
    """The newest so many events. 0: the topic keeps no history."""
    age: float | None = None
    """Seconds; None: events of any age."""
    bytes: int | None = None
    """Of `data` and `key` together; None: any number."""
    compact: bool = False
    """Whether only the newest event of each key is kept."""


NOTHING_KEPT = Retention()


class Rules:
    """The rules of the configuration. Raises ConfigError, with every mistake, for rules that are wrong or can never
    apply."""

    def __init__(self, rules: Sequence[TopicRule], limits: Limits) -> None:
        if problems := check_rules(dict(enumerate(rules, 1)), limits):
            raise ConfigError(problems)
        self._rules = sorted(rules, key=lambda rule: rank(rule.match))
        self._limits = limits
        self._ages: dict[str, float | None] = {}

    def policy(self, name: str) -> SubscriptionPolicy:
        """Find what holds for subscriptions to a valid topic or pattern."""
        own = None
        stricter = []
        for rule in self._rules:
            if covers(rule.match, name):
                own = rule
                break  # those behind it apply to none of the topics
            if overlap(rule.match, name):
                stricter.append(_policy(rule, self._limits))
        policy = _policy(own, self._limits)
        return _strictest(policy, stricter) if stricter else policy

    def max_age(self, topic: str) -> float | None:
        """Give the age in seconds beyond which an event of a topic is not sent any more; None: it never is too old."""
        try:
            return self._ages[topic]
        except KeyError:
            rule = next((rule for rule in self._rules if matches(rule.match, topic)), None)
            if len(self._ages) >= _REMEMBERED:
                self._ages.clear()
            age = self._ages[topic] = None if rule is None else rule.max_age
            return age

    def retention(self, topic: str) -> Retention:
        """Find what of a topic is kept: nothing, as long as no rule can say otherwise."""
        return NOTHING_KEPT


def _policy(rule: TopicRule | None, limits: Limits) -> SubscriptionPolicy:
    if rule is None:
        rule = TopicRule(match=">")
    ceiling = limits.max_queue_limit if rule.max_queue_limit is None else rule.max_queue_limit
    return SubscriptionPolicy(
        max_queue=min(limits.max_queue, ceiling) if rule.max_queue is None else rule.max_queue,
        max_queue_limit=ceiling,
        overflow=rule.overflow or (rule.overflows or OVERFLOWS)[0],
        overflows=tuple(rule.overflows or OVERFLOWS),
    )


def _strictest(policy: SubscriptionPolicy, others: Sequence[SubscriptionPolicy]) -> SubscriptionPolicy:
    """Combine rules: the result allows only what all of them allow. Allowed defaults stay."""
    ceiling = min(each.max_queue_limit for each in (policy, *others))
    allowed = tuple(name for name in policy.overflows if all(name in each.overflows for each in others))
    overflow = policy.overflow
    if overflow not in allowed:
        # `block` makes publishers wait: it is a default only if a rule for all of the topics says so.
        overflow = next((name for name in allowed if name not in ("block", "replay")), None)
    return SubscriptionPolicy(min(policy.max_queue, ceiling), ceiling, overflow, allowed)


def check_rules(rules: Mapping[int, TopicRule], limits: Limits) -> list[Problem]:
    """Find what is wrong with rules, by their numbers in the file: each on its own, and those that can never apply."""
    problems, valid = [], {}
    for number, rule in rules.items():
        try:
            check_pattern(rule.match)
        except CommandError as error:
            problems.append(Problem(error.message, f"topics[{number}].match"))
            continue
        valid[number] = rule
        problems += [Problem(message, f"topics[{number}].{name}") for name, message in _mistakes(rule, limits)]
    return problems + list(_dead(valid))


def _mistakes(rule: TopicRule, limits: Limits) -> Iterator[tuple[str, str]]:
    """Find mistakes in one rule: the key, and what is wrong."""
    policy = _policy(rule, limits)
    if policy.max_queue > policy.max_queue_limit:
        name = "max_queue_limit" if rule.max_queue is None else "max_queue"
        yield name, f"`{rule.match}`: max_queue must not be more than its ceiling, which is {policy.max_queue_limit}"
    if policy.overflow not in policy.overflows:
        yield "overflow", f"`{rule.match}`: {policy.overflow} is not among its overflows"
    if policy.overflow == "replay":
        name = "overflow" if rule.overflow else "overflows"
        yield name, f"`{rule.match}`: replay is not supported yet: no topic keeps history"


def _dead(rules: Mapping[int, TopicRule]) -> Iterator[Problem]:
    """Find the rules that can never apply."""
    first: dict[str, int] = {}
    every = list(rules.values())
    for number, rule in rules.items():
        if first.setdefault(rule.match, number) != number:
            message = f"`{rule.match}` is there twice, also in topics[{first[rule.match]}]"
            yield Problem(message, f"topics[{number}].match")
    for number, rule in rules.items():
        # To a subscription to its very pattern each rule applies. But an age goes by the topic of the event.
        ageless = msgspec.structs.replace(rule, max_age=None) == TopicRule(match=rule.match)
        if ageless and rule.max_age is not None and not _may_apply(rule, every):
            message = f"`{rule.match}` never applies: each topic that it matches has a rule of its own"
            yield Problem(message, f"topics[{number}].match")


def _may_apply(rule: TopicRule, rules: Sequence[TopicRule]) -> bool:
    """Whether some topic has no rule that is more specific.

    Topics whose tokens no rule names are the least likely ones to have such a rule, so they are tried; for `>` in each
    length up to where only rules with `>` are left.
    """
    named = {token for other in rules for token in other.match.split(".")}
    fresh = next(token for token in map(str, range(len(named) + 1)) if token not in named)
    tokens = [fresh if token == "*" else token for token in rule.match.split(".")]
    topics = [tokens]
    if tokens[-1] == ">":
        longest = max(len(other.match.split(".")) for other in rules)
        topics = [[*tokens[:-1], *[fresh] * more] for more in range(1, longest + 2)]
    for topic in map(".".join, topics):
        best = min((other for other in rules if matches(other.match, topic)), key=lambda other: rank(other.match))
        if best.match == rule.match:
            return True
    return False


_REMEMBERED: Final = 4096
"""So many topics' ages are remembered. As many as routes."""
