"""picows: the library's core API on uvloop, which sends to each subscriber."""

from bench.peers import relay
from bench.peers.base import Peer, module_missing, module_version

PICOWS = Peer(
    "picows",
    "picows, send to each, uvloop",
    # It sets TCP_NODELAY on every socket, which a Unix socket refuses: no "unix".
    frozenset({"tcp", "tls", "topics", "unsubscribed", "rapid"}),
    relay.program("bench.peers.picows_relay"),
    relay.dialogue,
    module_missing("picows", "uvloop"),
    module_version("picows"),
)
