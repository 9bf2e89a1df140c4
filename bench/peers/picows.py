"""picows: the library's core API on uvloop, which sends to each subscriber."""

from bench.peers import relay
from bench.peers.base import Peer, module_missing, module_version

PICOWS = Peer(
    "picows",
    "picows, send to each, uvloop",
    frozenset({"tcp", "unix", "tls", "topics", "unsubscribed"}),
    relay.program("bench.peers.picows_relay"),
    relay.dialogue,
    module_missing("picows", "uvloop"),
    module_version("picows"),
)
