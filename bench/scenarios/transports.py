"""Other ways to the server: a Unix socket, TLS, compression."""

from bench.figures import size
from bench.measure import Publishing
from bench.peers import BROKER, FLOOR, NATS, NCHAN, PICOWS, REDIS, SOCKETIFY, WEBSOCKETS
from bench.scenarios.base import PUBLISHING, Column, Plot, Scenario, deliveries


def _over(load: Publishing) -> str:
    over = {"tcp": "TCP", "unix": "Unix socket", "tls": "TLS"}[load.transport]
    return f"{over}, window {load.window}"


UNIX = Scenario(
    "unix",
    "Unix socket",
    "Fan-out to 1,000 subscribers over a Unix socket, as behind a proxy on the same machine, and for comparison over "
    "TCP.",
    (
        Publishing(subscribers=1000, window=1),
        Publishing(subscribers=1000, window=1, transport="unix"),
        Publishing(subscribers=1000, window=16, transport="unix"),
    ),
    (BROKER, WEBSOCKETS, SOCKETIFY, FLOOR),
    PUBLISHING,
    deliveries,
    alternate=True,
    plots=(
        Plot(
            "rate",
            "1,000 subscribers, 128 bytes",
            "bars",
            "deliveries/s",
            deliveries,
            label=_over,
            metric="deliveries per second",
        ),
    ),
)

TLS = Scenario(
    "tls",
    "TLS",
    "Fan-out to 500 subscribers over TLS; the server itself encrypts. Each subscriber has its own key, so the server "
    "encrypts each delivery separately.",
    (
        Publishing(subscribers=500, window=1, transport="tls"),
        Publishing(subscribers=500, window=16, transport="tls"),
    ),
    (BROKER, WEBSOCKETS, PICOWS, SOCKETIFY, NATS, NCHAN, REDIS),
    PUBLISHING,
    deliveries,
    repetitions=lambda load, peer: 2 if peer in (BROKER, SOCKETIFY) else 1,
    plots=(
        Plot(
            "rate",
            "500 subscribers, 128 bytes",
            "bars",
            "deliveries/s",
            deliveries,
            label=_over,
            metric="deliveries per second",
        ),
    ),
)

DEFLATE = Scenario(
    "deflate",
    "Compression",
    "Fan-out to 1,000 subscribers that have negotiated permessage-deflate without context takeover, so a server may "
    "compress an event once for all of them. An event is 1 kB of prose, and the window is 16.",
    (Publishing(subscribers=1000, window=16, payload=1024, deflate=True),),
    (BROKER, WEBSOCKETS, SOCKETIFY, NCHAN),
    (*PUBLISHING, Column("on the wire", lambda result: result.event_bytes, size)),
    deliveries,
    plots=(
        Plot(
            "rate",
            "1,000 subscribers, 1 kB of prose, window 16",
            "bars",
            "deliveries/s",
            deliveries,
            metric="deliveries per second",
        ),
    ),
)
