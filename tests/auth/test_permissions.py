"""What roles grant, and which patterns cover which."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.auth.permissions import Permissions, Rights, is_covered
from broker.config import Role
from broker.identity import ANONYMOUS, Identity
from broker.topics import matches

TOKENS = ("a", "b", "$s")
FRESH = "zz"
DEPTH = 5
TOPICS = [
    ".".join(tokens) for length in range(1, DEPTH + 1) for tokens in itertools.product((*TOKENS, FRESH), repeat=length)
]

patterns = st.builds(
    lambda leading, last: ".".join((*leading, last)),
    st.lists(st.sampled_from([*TOKENS, "*"]), max_size=2),
    st.sampled_from([*TOKENS, "*", ">"]),
)


def covered_by_brute_force(name: str, allowed: list[str]) -> bool:
    """Whether each topic of at most DEPTH tokens that `name` matches is matched by one of the patterns."""
    return all(any(matches(pattern, topic) for pattern in allowed) for topic in TOPICS if matches(name, topic))


@given(patterns, st.lists(patterns, max_size=5))
@example(">", ["*", "*.>"])
@example("a.>", ["a.*", "a.*.*", "a.*.*.>"])
@example("a.>", ["a.*", "a.*.*"])
@example("*", ["a", "b", "$s"])
@example(">", ["$>"])
@example("$s.>", [">"])
@example("*.a", [">"])
def test_pattern_is_covered_like_brute_force_says(name: str, allowed: list[str]) -> None:
    assert is_covered(name, allowed) == covered_by_brute_force(name, allowed)


@pytest.mark.parametrize(
    ("allowed", "name", "expected"),
    [
        (["prices.>"], "prices.eurusd", True),
        (["prices.>"], "prices", False),
        (["prices.*"], "prices.>", False),
        (["prices.>"], ">", False),
        ([">"], "prices.>", True),
        ([], "a", False),
        ([">"], "$broker.stats", False),
        (["$broker.>"], "$broker.stats", True),
        ([".".join("*" * length) for length in range(1, 128)], ">", False),
        # A topic has at most 255 bytes, so at most 128 tokens.
        ([".".join("*" * length) for length in range(1, 129)], ">", True),
    ],
)
def test_name_is_covered(allowed: list[str], name: str, expected: bool) -> None:
    assert is_covered(name, allowed) is expected


class TestPermissions:
    ROLES = (
        Role(name="user", subscribe=("prices.>", "user.{identity}.>"), publish=("chat.*",)),
        Role(name="moderator", publish=("rooms.*",), subscribe=("rooms.>",), max_subscriptions=50),
        Role(name="anonymous", subscribe=("public.>",), max_subscriptions=5),
    )

    def rights(self, name: str | None, *roles: str) -> Rights:
        return Permissions(self.ROLES).rights(Identity(name, roles))

    def test_identity_has_the_rights_of_all_its_roles(self) -> None:
        rights = self.rights("alice", "user", "moderator")
        assert rights.allows("publish", "chat.one")
        assert rights.allows("publish", "rooms.one")
        assert not rights.allows("publish", "prices.eurusd")
        assert rights.max_subscriptions == 50

    def test_role_that_is_not_configured_grants_nothing(self) -> None:
        rights = self.rights("alice", "admin")
        assert rights == Rights()
        assert not rights.allows("subscribe", "public.news")

    def test_right_that_a_role_does_not_name_is_not_granted(self) -> None:
        assert not self.rights("alice", "user").allows("history", "prices.eurusd")

    def test_identity_stands_for_one_token(self) -> None:
        rights = self.rights("alice", "user")
        assert rights.allows("subscribe", "user.alice.>")
        assert rights.allows("subscribe", "user.alice.inbox")
        assert not rights.allows("subscribe", "user.bob.inbox")
        assert not rights.allows("subscribe", "user.*.inbox")
        assert not rights.allows("subscribe", "user.{identity}.inbox")

    @pytest.mark.parametrize("name", ["*", ">", "a.b", "", "a b", "$a", "a\n", "x" * 300, "{identity}.>"])
    def test_identity_that_is_no_token_matches_nothing(self, name: str) -> None:
        rights = self.rights(name, "user")
        assert rights.subscribe == ("prices.>",)

    def test_identity_too_long_for_the_pattern_matches_nothing(self) -> None:
        assert self.rights("x" * 250, "user").subscribe == ("prices.>",)

    def test_anonymous_has_its_own_role(self) -> None:
        rights = Permissions(self.ROLES).rights(ANONYMOUS)
        assert rights.allows("subscribe", "public.news")
        assert not rights.allows("subscribe", "prices.eurusd")

    def test_clients_with_equal_rights_share_them(self) -> None:
        permissions = Permissions(self.ROLES)
        one = permissions.rights(Identity("alice", ("moderator",)))
        other = permissions.rights(Identity("bob", ("moderator",), expires=5.0))
        assert one is other
        assert permissions.rights(Identity("alice", ("user",))) is not permissions.rights(Identity("bob", ("user",)))

    def test_remembered_rights_are_bounded(self) -> None:
        permissions = Permissions(self.ROLES)
        for number in range(10_000):
            permissions.rights(Identity(str(number), ("user",)))
        assert len(permissions._known) <= 4096
