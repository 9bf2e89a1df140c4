"""The server program of the peer `websockets`.

It is written as the library's documentation teaches, with the defaults of `serve()`
but for the backlog, and speaks the relay protocol.
"""

from collections import defaultdict

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve, unix_serve

from bench.peers.relay import BACKLOG, RELAY_TOPIC, Arguments

subscribers: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def relay(connection: ServerConnection) -> None:
    """Serves one client: remembers what it subscribes to, and relays what it publishes."""
    subscribed: list[str] = []
    try:
        async for message in connection:
            if not isinstance(message, str):
                continue
            if message.startswith("sub "):
                topic = message[4:]
                subscribed.append(topic)
                subscribers[topic].add(connection)
                await connection.send("ok")
            else:
                broadcast(subscribers[message[RELAY_TOPIC]], message)
    finally:
        for topic in subscribed:
            subscribers[topic].discard(connection)


async def main(given: Arguments) -> None:
    """Serves until it is killed. It compresses (its default) for the clients that ask for it."""
    if given.path:
        listening = unix_serve(relay, str(given.path), backlog=BACKLOG)
    else:
        listening = serve(relay, given.host, given.port, ssl=given.tls(), backlog=BACKLOG)
    async with listening as server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(Arguments.read()))
