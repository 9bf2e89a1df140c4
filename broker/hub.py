"""The subscriptions of a node: filters, patterns, audiences.

There are two indexes. A dict has the filters that are exact topics. A tree of tokens has the patterns, so that the cost
of a publish depends on its matches and not on the number of patterns. The filters that match a topic form its audience;
topics that match the same filters share an audience.

Invariant: publishing to a topic leaves no state behind, except for a bounded number of routes.
"""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

from broker._speedups import Audience, Connection, Filter, LoopContext, RouteCache, Subscription
from broker.topics import RESERVED, is_pattern, overlap, rank

Rank = tuple[int, ...]

UNLIMITED = -1
"""The credit of a subscription that needs none."""


class Branch:
    """A node of the pattern tree: the tokens from the root to here are the beginning of a pattern."""

    __slots__ = ("branches", "here", "rest")

    def __init__(self) -> None:
        self.branches: dict[str, Branch] = {}
        """Children by the next token, including `*`."""
        self.here: tuple[Rank, Filter] | None = None
        """The pattern that ends here."""
        self.rest: tuple[Rank, Filter] | None = None
        """The pattern that ends here with `>`."""

    @property
    def is_unused(self) -> bool:
        """Whether no pattern needs this branch any more."""
        return not self.branches and self.here is None and self.rest is None


class Hub:
    """The subscriptions of one node."""

    def __init__(self, context: LoopContext) -> None:
        self.routes = RouteCache()
        """Routes for the fast path, invalidated when subscriptions change."""
        self._context = context
        self._topics: dict[str, Filter] = {}
        self._patterns: dict[str, Filter] = {}
        self._tree = Branch()
        self._audiences: WeakValueDictionary[tuple[Filter, ...], Audience] = WeakValueDictionary()

    @property
    def filters(self) -> int:
        """The number of distinct topics and patterns with subscribers."""
        return len(self._topics) + len(self._patterns)

    def subscribe(
        self,
        connection: Connection,
        topic: str,
        *,
        max_queue: int,
        overflow: str,
        echo: bool,
        credit: int = UNLIMITED,
    ) -> Subscription:
        """Subscribe an open connection to a valid topic or pattern. `credit` -1: any number of events may come."""
        filters = self._patterns if is_pattern(topic) else self._topics
        found = filters.get(topic)
        if found is None:
            found = self._add(topic)
        try:
            return Subscription(connection, found, max_queue=max_queue, overflow=overflow, echo=echo, credit=credit)
        except Exception:
            if found.subscribers == 0:
                self._remove(found)
            raise

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription and discard its queue."""
        subscription.cancel()
        if subscription.filter.subscribers == 0:
            self._remove(subscription.filter)

    def audience(self, topic: str) -> Audience:
        """Find the audience of a topic. It follows changes of the subscriptions to its filters."""
        filters = self._match(topic)
        audience = self._audiences.get(filters)
        if audience is None:
            audience = self._audiences[filters] = Audience(self._context, filters)
        return audience

    def subscriptions(self, filter: str) -> list[Subscription]:
        """Find the subscriptions that a possible loss of events of a topic or pattern concerns.

        For a pattern all filters are compared with it.
        """
        if not is_pattern(filter):
            return self.audience(filter).subscriptions()
        filters = [
            found
            for name, found in itertools.chain(self._topics.items(), self._patterns.items())
            if overlap(filter, name)
        ]
        audiences = [Audience(self._context, (found,)) for found in filters]
        return [subscription for audience in audiences for subscription in audience.subscriptions()]

    def _add(self, topic: str) -> Filter:
        # Some topics get another audience now. Their batched events are sent first, to keep each topic's order.
        self._context.flush_matching(topic)
        new = Filter(topic)
        if not is_pattern(topic):
            self._topics[topic] = new
            self.routes.withdraw(topic)
            return new
        self._patterns[topic] = new
        self.routes.withdraw_matching(topic)
        *tokens, last = topic.split(".")
        branch = self._tree
        for token in tokens if last == ">" else (*tokens, last):
            branch = branch.branches.setdefault(token, Branch())
        if last == ">":
            branch.rest = (rank(topic), new)
        else:
            branch.here = (rank(topic), new)
        return new

    def _remove(self, filter: Filter) -> None:
        topic = filter.topic
        self._context.flush_matching(topic)
        self.routes.withdraw_filter(filter)
        if not is_pattern(topic):
            del self._topics[topic]
            return
        del self._patterns[topic]
        *tokens, last = topic.split(".")
        if last != ">":
            tokens.append(last)
        way = [self._tree]
        for token in tokens:
            way.append(way[-1].branches[token])
        if last == ">":
            way[-1].rest = None
        else:
            way[-1].here = None
        for parent, token, branch in zip(reversed(way[:-1]), reversed(tokens), reversed(way[1:]), strict=True):
            if not branch.is_unused:
                break
            del parent.branches[token]

    def _match(self, topic: str) -> tuple[Filter, ...]:
        """Find the filters that match, the most specific first."""
        exact = self._topics.get(topic)
        first = () if exact is None else (exact,)
        if not self._patterns:
            return first
        matches: list[tuple[Rank, Filter]] = []
        tokens = topic.split(".")
        # `*` and `>` at the beginning of a pattern do not stand for the broker's own topics.
        reserved = topic.startswith(RESERVED)
        branches = [self._tree]
        for depth, token in enumerate(tokens):
            wild = not (reserved and depth == 0)
            onward = []
            for branch in branches:
                if wild and branch.rest is not None:
                    matches.append(branch.rest)
                if (found := branch.branches.get(token)) is not None:
                    onward.append(found)
                if wild and (found := branch.branches.get("*")) is not None:
                    onward.append(found)
            branches = onward
        matches.extend(branch.here for branch in branches if branch.here is not None)
        matches.sort()  # of the patterns that match a topic no two have the same rank
        return (*first, *[found for _, found in matches])
