"""Who is connected, and how far behind: `GET /v1/sessions` and `GET /v1/sessions/{id}`."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from aiohttp import web

from broker.node import Node
from broker.session import Session, SubscriptionStats

LIMIT: Final = 100
"""So many sessions are listed unless `limit` says otherwise."""

MOST: Final = 1000
"""The most that `limit` may say."""

NOT_KEPT: Final = {"Cache-Control": "no-store"}


class Sessions:
    """Answers for one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def list(self, request: web.Request) -> web.Response:
        """List sessions, those furthest behind first: of each the sums, and the subscription for which most waits."""
        given = request.query.get("limit", str(LIMIT))
        if not (given.isascii() and given.isdecimal() and len(given) <= len(str(MOST)) and 1 <= int(given) <= MOST):
            return _answer({"error": f"limit must be from 1 to {MOST}"}, 400)
        found = []
        for session, subscription_stats in self._node.subscription_stats(int(given)):
            found.append(_summary(session, subscription_stats))
            await asyncio.sleep(0)  # one may have a thousand subscriptions, and there are clients to serve
        return _answer({"total": len(self._node.sessions), "sessions": found})

    async def one(self, request: web.Request) -> web.Response:
        """Tell of one session how each of its subscriptions stands."""
        session = self._node.sessions.get(request.match_info["id"])
        if session is None:
            return _answer({"error": "there is no such session"}, 404)
        subscription_stats = session.subscription_stats()
        return _answer({**_summary(session, subscription_stats), "subscriptions": subscription_stats})


def _summary(session: Session, subscription_stats: list[SubscriptionStats]) -> dict[str, Any]:
    return {
        "session": session.id,
        "peer": session.peer,
        "bytes": session.connection.outbox,
        "queued": sum(stats.queued for stats in subscription_stats),
        "waiting": max((stats.waiting for stats in subscription_stats), default=0.0),
        "dropped": sum(stats.dropped for stats in subscription_stats),
        "held": session.connection.parked_publishes,
        "subscriptions": len(subscription_stats),
        "worst": max(subscription_stats, key=_rank, default=None),
    }


def _rank(stats: SubscriptionStats) -> tuple[int, int]:
    return stats.queued, stats.dropped


def _answer(content: object, status: int = 200) -> web.Response:
    body = msgspec.json.encode(content)
    return web.Response(body=body, status=status, headers={**NOT_KEPT, "Content-Type": "application/json"})
