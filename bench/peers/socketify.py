"""socketify: uWebSockets with Python handlers; subscriptions and fan-out are those of its native code."""

from bench.peers import relay
from bench.peers.base import Peer, module_missing, module_version

SOCKETIFY = Peer(
    "socketify",
    "uWebSockets through socketify",
    frozenset({"tcp", "unix", "tls", "topics", "deflate", "unsubscribed", "rapid"}),
    relay.program("bench.peers.socketify_relay"),
    relay.dialogue,
    module_missing("socketify"),
    module_version("socketify"),
)
