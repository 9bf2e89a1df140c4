"""How an example's program uses the client: it says its states, and passes over what cannot be published now."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from wsbroker_client import Changed, Client, ClientError, State


@contextlib.asynccontextmanager
async def client_of(url: str, token: Callable[[], str] | None = None) -> AsyncIterator[Client]:
    """A client of the broker at `url`, which comes back after every loss, and writes its states to the terminal.

    `token()` makes the token of a connection.
    """

    def show(change: Changed) -> None:
        if change.state is State.CONNECTED:
            print(f"connected to {url}", flush=True)
        elif change.state is State.WAITING:
            print(f"{change.failure}; next try in {change.delay or 0:.1f} s", flush=True)

    async with Client(url, token=token, on_state=show) as client:
        yield client


async def tell(client: Client, topic: str, data: Any, key: str | None = None) -> None:
    """Publishes what is soon outdated: where that is not possible now, it is passed over.

    Raises SystemExit where the client has ended: the broker says that to come back is of no use.
    """
    try:
        await client.publish(topic, data, key=key, queue=False)
    except ClientError:
        if client.state is State.CLOSED:
            raise SystemExit(str(client.failure)) from None
