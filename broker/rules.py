"""The rules for topics: defaults and limits of subscriptions to some topics, and what is kept of their events.

Of the rules that match, the most specific one applies, and it alone: what it does not say is as in the limits, not as
in a rule that is less specific. Defaults go by the rule that matches all topics of a pattern; what may be asked for by
every rule that applies to some of them, so that a wider pattern is no way around a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from broker.config import Limits, TopicRule
from broker.errors import CommandError, ConfigError, Problem
from broker.overflow import OVERFLOWS
from broker.retention import NOTHING_KEPT, Retention, retention_mistakes, retention_of
from broker.topics import RESERVED, check_pattern, covers, is_pattern, overlap, rank

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
        self._tree = RuleTree(rules)
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
            rule = self._tree.find(topic)
            if len(self._ages) >= _REMEMBERED:
                self._ages.clear()
            age = self._ages[topic] = None if rule is None else rule.max_age
            return age

    def presence(self, topic: str) -> bool:
        """Whether the subscribers of a topic are its members."""
        if not self.has_presence:
            return False
        rule = self._tree.find(topic)
        return rule is not None and bool(rule.presence)

    def retention(self, topic: str) -> Retention:
        """Find what is kept of a topic."""
        if not self._retains:
            return NOTHING_KEPT
        try:
            return self._retentions[topic]
        except KeyError:
            rule = self._tree.find(topic)
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


def check_rules(
    rules: Mapping[int, TopicRule], limits: Limits, other_patterns: Mapping[int, str] | None = None
) -> list[Problem]:
    """Find what is wrong with rules, by their numbers in the file: each on its own, and those that can never apply.

    `other_patterns` are those of rules that are not among `rules`, because something else is wrong with them.
    """
    problems, valid = [], {}
    for number, pattern in (other_patterns or {}).items():
        try:
            check_pattern(pattern)
        except CommandError as error:
            problems.append(Problem(error.message, f"topics[{number}].match"))
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
    for number, rule in rules.items():
        if first.setdefault(rule.match, number) != number:
            message = f"`{rule.match}` is there twice, also in topics[{first[rule.match]}]"
            yield Problem(message, f"topics[{number}].match")
    tree = RuleTree(rules.values())
    samples = _Samples(rules.values())
    for number, rule in rules.items():
        # To a subscription to its very pattern each rule applies. But some keys go by the topic of the event.
        rest = msgspec.structs.replace(rule, **{name: getattr(_NO_RULE, name) for name in BY_EVENT})
        if rest == TopicRule(match=rule.match) != rule:
            found = (tree.find(topic) for topic in samples.of(rule.match))
            if all(best is None or best.match != rule.match for best in found):
                message = f"`{rule.match}` never applies: each topic that it matches has a rule of its own"
                yield Problem(message, f"topics[{number}].match")


class _Samples:
    """Topics that show whether a rule applies to any topic.

    Topics whose tokens no rule names are the least likely ones to have a more specific rule, so they are tried; for `>`
    in each length up to where only rules with `>` are left.
    """

    def __init__(self, rules: Iterable[TopicRule]) -> None:
        patterns = [rule.match.split(".") for rule in rules]
        named = {token for pattern in patterns for token in pattern}
        self._fresh = next(token for token in map(str, range(len(named) + 1)) if token not in named)
        self._longest = max(map(len, patterns), default=0)

    def of(self, pattern: str) -> Iterator[str]:
        """Give the topics to try for a pattern."""
        tokens = [self._fresh if token == "*" else token for token in pattern.split(".")]
        if tokens[-1] != ">":
            yield ".".join(tokens)
            return
        for more in range(1, self._longest + 2):
            yield ".".join([*tokens[:-1], *[self._fresh] * more])


class RuleTree:
    """The rules by the tokens of their patterns. Finds the most specific one for a topic, however many there are."""

    def __init__(self, rules: Iterable[TopicRule]) -> None:
        self._root = _Branch()
        for rule in rules:
            branch = self._root
            for token in rule.match.split("."):
                branch = branch.branches.setdefault(token, _Branch())
            branch.rule = rule

    def find(self, topic: str) -> TopicRule | None:
        """Give the most specific rule whose pattern matches a valid topic; None if there is none."""
        tokens = topic.split(".")
        if topic.startswith(RESERVED):  # no wildcard stands for its first token
            branch = self._root.branches.get(tokens[0])
            return None if branch is None else branch.find(tokens, 1)
        return self._root.find(tokens, 0)


class _Branch:
    """The rules whose patterns begin with the same tokens."""

    __slots__ = ("branches", "rule")

    def __init__(self) -> None:
        self.branches: dict[str, _Branch] = {}
        self.rule: TopicRule | None = None
        """The rule whose pattern ends here."""

    def find(self, tokens: Sequence[str], at: int) -> TopicRule | None:
        """Give the most specific rule for the tokens from `at` on: a name before `*` before `>` (see `topics.rank`)."""
        if at == len(tokens):
            return self.rule
        for token in (tokens[at], "*"):
            if token in self.branches and (found := self.branches[token].find(tokens, at + 1)) is not None:
                return found
        return self.branches[">"].rule if ">" in self.branches else None


_NO_RULE: Final = TopicRule(match=">")
_REMEMBERED: Final = 4096
"""Of so many topics the age and the retention are remembered. As many as routes."""
