"""Sessions and how far each lags: `GET /v1/sessions` and `GET /v1/sessions/{id}`."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web

from broker.admin.answers import respond
from broker.node import Node
from broker.session import Session, SubscriptionStats

DEFAULT_LIMIT: Final = 100
"""Sessions listed where `limit` is not given."""

MAX_LIMIT: Final = 1000
"""Upper bound of `limit`."""


class Sessions:
    """Answers for one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def list(self, request: web.Request) -> web.Response:
        """List sessions, those with the most queued bytes first: for each the sums, and its worst subscription."""
        given = request.query.get("limit", str(DEFAULT_LIMIT))
        if not (
            given.isascii() and given.isdecimal() and len(given) <= len(str(MAX_LIMIT)) and 1 <= int(given) <= MAX_LIMIT
        ):
            return respond({"error": f"limit must be from 1 to {MAX_LIMIT}"}, 400)
        found = []
        for session, subscription_stats in self._node.subscription_stats(int(given)):
            found.append(_summarize(session, subscription_stats))
            await asyncio.sleep(0)  # one may have a thousand subscriptions, and there are clients to serve
        return respond({"total": len(self._node.sessions), "sessions": found})

    async def show(self, request: web.Request) -> web.Response:
        """Describe one session with each of its subscriptions."""
        session = self._node.sessions.get(request.match_info["id"])
        if session is None:
            return respond({"error": "there is no such session"}, 404)
        subscription_stats = session.subscription_stats()
        return respond({**_summarize(session, subscription_stats), "subscriptions": subscription_stats})


def _summarize(session: Session, subscription_stats: list[SubscriptionStats]) -> dict[str, Any]:
    return {
        "session": session.id,
        "peer": str(session.peer),
        "outbox_bytes": session.connection.queued_bytes,
        "queued": sum(stats.queued for stats in subscription_stats),
        "oldest_queued_seconds": max((stats.oldest_queued_seconds for stats in subscription_stats), default=0.0),
        "dropped": sum(stats.dropped for stats in subscription_stats),
        "parked": session.connection.parked_publishes,
        "subscriptions": len(subscription_stats),
        "worst": max(subscription_stats, key=_rank, default=None),
    }


def _rank(stats: SubscriptionStats) -> tuple[int, int]:
    return stats.queued, stats.dropped
