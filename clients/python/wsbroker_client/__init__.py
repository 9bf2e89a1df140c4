"""A client of wsbroker for asyncio: it connects, reconnects, and announces missed events.

    from wsbroker_client import Client

    async with Client("wss://broker.example/ws") as client:
        async for event in client.subscribe("prices.*"):
            print(event.topic, event.data)

`wsbroker_client.sync` is the same for threads, `wsbroker_client.http` publishes from backends without a connection.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from wsbroker_client.actions import Changed
    from wsbroker_client.client import Client
    from wsbroker_client.errors import (
        AlreadySubscribed,
        ClientClosed,
        ClientError,
        Closed,
        CommandRefused,
        ConnectionLost,
        InvalidEvent,
        LoadFailed,
        NotABroker,
        NotConnected,
        Refused,
        TimedOut,
        TokenFailed,
        Unreachable,
    )
    from wsbroker_client.model import Event, Gap, Join, Leave, Live, Member, Position, Receipt
    from wsbroker_client.states import State, SubscriptionState
    from wsbroker_client.subscription import Subscription
    from wsbroker_client.wire import DEFAULT_URL

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_URL",
    "AlreadySubscribed",
    "Changed",
    "Client",
    "ClientClosed",
    "ClientError",
    "Closed",
    "CommandRefused",
    "ConnectionLost",
    "Event",
    "Gap",
    "InvalidEvent",
    "Join",
    "Leave",
    "Live",
    "LoadFailed",
    "Member",
    "NotABroker",
    "NotConnected",
    "Position",
    "Receipt",
    "Refused",
    "State",
    "Subscription",
    "SubscriptionState",
    "TimedOut",
    "TokenFailed",
    "Unreachable",
]

_MODULES: Final = {
    "Changed": "actions",
    "Client": "client",
    "DEFAULT_URL": "wire",
    "State": "states",
    "Subscription": "subscription",
    "SubscriptionState": "states",
    **dict.fromkeys(("Event", "Gap", "Join", "Leave", "Live", "Member", "Position", "Receipt"), "model"),
}
"""Where each name is; those that are not here are errors."""


def __getattr__(name: str) -> Any:
    """Import a name on its first use: a program that uses one connection does not load the rest (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
