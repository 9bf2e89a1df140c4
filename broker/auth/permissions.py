"""Permissions: which topics and patterns an identity may publish to, subscribe to, and so on.

A role lists patterns for each right. An identity has the rights of all its roles together.

Invariant: a subscription to a pattern is allowed only if every topic that the pattern can match is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeVar, get_args

import msgspec

from broker.config import Role
from broker.identity import Identity
from broker.topics import MAX_BYTES, RESERVED, covers, is_pattern, is_token, matches

IDENTITY_TOKEN: Final = "{identity}"
"""The token of a role's pattern that stands for the name of the identity."""

Right = Literal["publish", "subscribe", "presence", "history", "block"]
RIGHTS: Final[tuple[Right, ...]] = get_args(Right)

Number = TypeVar("Number", int, float)

FRESH: Final = "\0"
"""A token that no pattern names: it is not allowed in a name."""


class Rights(msgspec.Struct, frozen=True, kw_only=True):
    """What one identity may do: the patterns of all its roles, with its name filled in, and the largest limits.

    Two identities with equal rights have the same object.
    """

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    presence: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    max_connections: int | None = None
    connect_rate: float | None = None
    max_subscriptions: int | None = None
    publish_rate: float | None = None
    publish_burst: int | None = None

    def allows(self, right: Right, name: str) -> bool:
        """Whether it may do this to a valid topic, or to every topic that a valid pattern matches."""
        return is_covered(name, getattr(self, right))


class Permissions:
    """The configured roles. `rights` is what they come to for an identity."""

    def __init__(self, roles: Iterable[Role]) -> None:
        self._roles: Mapping[str, Role] = {role.name: role for role in roles}
        self._known: dict[tuple[tuple[str, ...], str | None], Rights] = {}

    def rights(self, identity: Identity) -> Rights:
        """Find the rights of an identity. A role that is not configured grants nothing."""
        roles = [self._roles[name] for name in dict.fromkeys(identity.roles) if name in self._roles]
        name = identity.name if any(_depends_on_name(role) for role in roles) else None
        key = (tuple(role.name for role in roles), name)
        rights = self._known.get(key)
        if rights is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            rights = self._known[key] = _combine(roles, name)
        return rights


REMEMBERED: Final = 4096
"""So many rights are remembered, so that clients with equal rights share them."""


def is_covered(name: str, patterns: Sequence[str]) -> bool:
    """Whether the patterns together match every topic that a valid topic or pattern matches.

    Exact, and without search. A token that no pattern names is matched by `*` and `>` alone, which match all other
    tokens as well. So if such a token stands for each `*` of `name` and the topic is matched, all topics are. `>`
    stands for one, two, … such tokens, up to one more than any pattern has: then only patterns with `>` are left, and
    the same ones for every length beyond.
    """
    if any(covers(pattern, name) for pattern in patterns):
        return True
    if not is_pattern(name):
        return False
    tokens = [FRESH if token == "*" else token for token in name.split(".")]
    topics = [tokens]
    if tokens[-1] == ">":
        longest = max((pattern.count(".") + 1 for pattern in patterns), default=0)
        rest = range(1, max(1, longest + 2 - len(tokens)) + 1)
        topics = [[*tokens[:-1], *[FRESH] * count] for count in rest]
    return all(
        any(matches(pattern, topic) for pattern in patterns)
        for topic in map(".".join, topics)
        if len(topic.encode()) <= MAX_BYTES  # no topic is longer
    )


def _depends_on_name(role: Role) -> bool:
    return any(IDENTITY_TOKEN in pattern.split(".") for right in RIGHTS for pattern in getattr(role, right))


def _combine(roles: Sequence[Role], name: str | None) -> Rights:
    granted = {
        right: tuple(
            dict.fromkeys(
                filled
                for role in roles
                for pattern in getattr(role, right)
                if (filled := _fill(pattern, name)) is not None
            )
        )
        for right in RIGHTS
    }
    return Rights(
        **granted,
        max_connections=_largest(role.max_connections for role in roles),
        connect_rate=_largest(role.connect_rate for role in roles),
        max_subscriptions=_largest(role.max_subscriptions for role in roles),
        publish_rate=_largest(role.publish_rate for role in roles),
        publish_burst=_largest(role.publish_burst for role in roles),
    )


def _fill(pattern: str, name: str | None) -> str | None:
    """Put the name of the identity into a pattern of a role. None: then it matches nothing."""
    tokens = pattern.split(".")
    if IDENTITY_TOKEN not in tokens:
        return pattern
    if name is None or not is_token(name) or name.startswith(RESERVED):
        return None
    filled = ".".join(name if token == IDENTITY_TOKEN else token for token in tokens)
    return filled if len(filled.encode()) <= MAX_BYTES else None


def _largest(values: Iterable[Number | None]) -> Number | None:
    """Find the largest limit. None, the broker's own, if no role names one."""
    return max((value for value in values if value is not None), default=None)
