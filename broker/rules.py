"""The rules for topics: defaults and limits of subscriptions to some topics, and what is kept of their events.

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
from broker.retention import NOTHING_KEPT, Retention, retention_mistakes, retention_of
from broker.topics import check_pattern, covers, is_pattern, matches, overlap, rank

__all__ = ["NOTHING_KEPT", "Retention", "Rules", "SubscriptionPolicy", "check_rules"]

BY_EVENT: Final = (
    "max_age",
    "history",
    "history_age",
    "history_bytes",
    "compact",
    "tombstone_age",
    "dedup_age",
    "presence",
)
"""The keys of a rule that go by the topic of an event, and not by what was subscribed to."""


class SubscriptionPolicy(msgspec.Struct, frozen=True):
    """What holds for subscriptions to a topic or pattern."""

    max_queue: int
    """For those that do not say themselves."""
    max_queue_limit: int
    overflow: str | None
    """For those that do not say themselves; None: they have to say."""
    overflows: tuple[str, ...]
    """The policies that may be asked for."""


class Rules:
    """The rules of the configuration. Raises ConfigError, with every mistake, for rules that are wrong or can never
    apply."""

    def __init__(self, rules: Sequence[TopicRule], limits: Limits) -> None:
        if problems := check_rules(dict(enumerate(rules, 1)), limits):
            raise ConfigError(problems)
        self._rules = sorted(rules, key=lambda rule: rank(rule.match))
        self._limits = limits
        self._ages: dict[str, float | None] = {}
        self._retentions: dict[str, Retention] = {}
        self.keeps_history = any(rule.history for rule in rules)
        """Whether there is a topic that may keep history."""
        self._retains = any(retention_of(rule) != NOTHING_KEPT for rule in rules)
        self.has_presence = any(rule.presence for rule in rules)
        """Whether there is a topic that may have members."""

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
        policy = _strictest(policy, stricter) if stricter else policy
        return policy if not is_pattern(name) else _without_replay(policy)

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

    def presence(self, topic: str) -> bool:
        """Whether the subscribers of a topic are its members."""
        if not self.has_presence:
            return False
        rule = next((rule for rule in self._rules if matches(rule.match, topic)), None)
        return rule is not None and bool(rule.presence)

    def retention(self, topic: str) -> Retention:
        """Find what is kept of a topic."""
        if not self._retains:
            return NOTHING_KEPT
        try:
            return self._retentions[topic]
        except KeyError:
            rule = next((rule for rule in self._rules if matches(rule.match, topic)), None)
            if len(self._retentions) >= _REMEMBERED:
                self._retentions.clear()
            found = self._retentions[topic] = retention_of(rule)
            return found


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
        overflow = _first_harmless(allowed)
    return SubscriptionPolicy(min(policy.max_queue, ceiling), ceiling, overflow, allowed)


def _without_replay(policy: SubscriptionPolicy) -> SubscriptionPolicy:
    """Give the policy for a pattern: `replay` is fed from the history of one topic. A default gives way to another."""
    if policy.overflow != "replay":
        return policy
    return msgspec.structs.replace(policy, overflow=_first_harmless(policy.overflows))


def _first_harmless(overflows: Sequence[str]) -> str | None:
    """Find the first policy that may be a default that no rule names: not what makes publishers wait."""
    return next((name for name in overflows if name not in ("block", "replay")), None)


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
    if policy.overflow == "replay" and not rule.history:
        name = "overflow" if rule.overflow else "overflows"
        yield name, f"`{rule.match}`: replay needs history beside it, the number of events to keep"
    yield from retention_mistakes(rule, limits)


def _dead(rules: Mapping[int, TopicRule]) -> Iterator[Problem]:
    """Find the rules that can never apply."""
    first: dict[str, int] = {}
    every = list(rules.values())
    for number, rule in rules.items():
        if first.setdefault(rule.match, number) != number:
            message = f"`{rule.match}` is there twice, also in topics[{first[rule.match]}]"
            yield Problem(message, f"topics[{number}].match")
    for number, rule in rules.items():
        # To a subscription to its very pattern each rule applies. But some keys go by the topic of the event.
        rest = msgspec.structs.replace(rule, **{name: getattr(_NO_RULE, name) for name in BY_EVENT})
        if rest == TopicRule(match=rule.match) != rule and not _may_apply(rule, every):
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


_NO_RULE: Final = TopicRule(match=">")
_REMEMBERED: Final = 4096
"""Of so many topics the age and the retention are remembered. As many as routes."""
