"""The server program of the peer `picows`: its core API with a listener for each client. Speaks the relay protocol."""

from collections import defaultdict

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from bench.peers.relay import BACKLOG, RELAY_TOPIC, Arguments

subscribers: defaultdict[bytes, set[WSTransport]] = defaultdict(set)


class Relay(WSListener):
    """One client: remembers what it subscribes to, and relays what it publishes."""

    def __init__(self) -> None:
        self.subscribed: list[bytes] = []

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Takes a message; the library answers pings and closes itself only where it is asked to."""
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()
        if frame.msg_type != WSMsgType.TEXT:
            return
        message = frame.get_payload_as_bytes()
        if message.startswith(b"sub "):
            self.subscribed.append(message[4:])
            subscribers[message[4:]].add(transport)
            transport.send(WSMsgType.TEXT, b"ok")
            return
        for subscriber in subscribers[message[RELAY_TOPIC]]:
            subscriber.send(WSMsgType.TEXT, message)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """Forgets the client."""
        for topic in self.subscribed:
            subscribers[topic].discard(transport)


def listen(_: WSUpgradeRequest) -> Relay:
    """Takes every client, whatever the path."""
    return Relay()


async def main(given: Arguments) -> None:
    """Serves until it is killed."""
    server = await ws_create_server(listen, given.host, given.port, ssl=given.tls(), backlog=BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(Arguments.read()))
