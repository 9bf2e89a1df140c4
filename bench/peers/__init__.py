"""The servers that the bench compares, each in a file of its own."""

from bench.peers.base import ABILITIES, LACKS, Dialogue, Peer, Setting, Talk, event
from bench.peers.floor import FLOOR, FLOOR_MESSAGE
from bench.peers.nats import NATS
from bench.peers.nchan import NCHAN
from bench.peers.picows import PICOWS
from bench.peers.redis import REDIS
from bench.peers.relay import RELAY_TOPIC
from bench.peers.socketify import SOCKETIFY
from bench.peers.websockets import WEBSOCKETS
from bench.peers.wsbroker import BROKER

__all__ = [
    "ABILITIES",
    "BROKER",
    "FLOOR",
    "FLOOR_MESSAGE",
    "LACKS",
    "NATS",
    "NCHAN",
    "PEERS",
    "PICOWS",
    "REDIS",
    "RELAY_TOPIC",
    "SOCKETIFY",
    "WEBSOCKETS",
    "Dialogue",
    "Peer",
    "Setting",
    "Talk",
    "event",
]

# In the order of every table.
PEERS = {peer.name: peer for peer in (BROKER, WEBSOCKETS, PICOWS, SOCKETIFY, NATS, NCHAN, REDIS, FLOOR_MESSAGE, FLOOR)}
