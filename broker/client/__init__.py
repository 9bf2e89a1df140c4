"""A client of the broker for asyncio, on top of `websockets`. `wsbroker pub` and `wsbroker sub` are made of it."""

from broker.client.connection import DEFAULT_URL, Client, connect
from broker.client.failures import ClientError, Closed, CommandRefused, LoadFailed, NotABroker, Refused, Unreachable

__all__ = [
    "DEFAULT_URL",
    "Client",
    "ClientError",
    "Closed",
    "CommandRefused",
    "LoadFailed",
    "NotABroker",
    "Refused",
    "Unreachable",
    "connect",
]
