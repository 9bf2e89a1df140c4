"""websockets: the asyncio server of the library, on uvloop, with its own broadcast()."""

from bench.peers import relay
from bench.peers.base import Peer, module_missing, module_version

WEBSOCKETS = Peer(
    "websockets",
    "websockets broadcast, uvloop",
    frozenset({"tcp", "unix", "tls", "topics", "deflate", "unsubscribed", "rapid"}),
    relay.program("bench.peers.websockets_relay"),
    relay.dialogue,
    module_missing("websockets", "uvloop"),
    module_version("websockets"),
)
