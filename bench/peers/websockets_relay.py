"""The peer `websockets`: its asyncio server on uvloop, relaying messages with its own `broadcast()`.

Run as a program with the port as its argument. It is written as its documentation teaches, with the defaults of
`serve()`, and it speaks the relay protocol of `bench.peers`.
"""

import sys
from collections import defaultdict

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

from bench.peers import RELAY_TOPIC

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


async def main(port: int) -> None:
    async with serve(relay, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
