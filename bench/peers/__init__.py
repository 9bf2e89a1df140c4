"""The servers that the bench compares: how each is started, and what a client says to it.

All peers move the same bytes to a subscriber: those of the broker's `event`. The broker makes it from a `publish`
command; a peer without a protocol of its own gets the finished event from the publisher and relays it as it is. This
is the relay protocol: a message `sub TOPIC` subscribes and is answered `ok`; any other goes unchanged to the
subscribers of the topic that stands in it at `RELAY_TOPIC`.
"""

import importlib.util
import os
import random
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass

from bench import native

# The topic in an event: "t" and five digits, which the load program puts in for "%t".
_BEFORE_TOPIC = '{"op":"event","topic":"'
RELAY_TOPIC = slice(len(_BEFORE_TOPIC), len(_BEFORE_TOPIC) + 6)


@dataclass(frozen=True)
class Dialogue:
    """What a client says and hears; `%t` stands for the number of a topic.

    The greetings are the messages that a client gets before the first event; the last of a subscriber's contains
    `answer`.
    """

    subscribe: str
    answer: str
    subscriber_greetings: int
    publisher_greetings: int
    publish: str
    event: str
    path: str = "/"


@dataclass(frozen=True)
class Peer:
    """A server that the bench can start."""

    name: str
    title: str
    dialogue: Callable[[int], Dialogue]
    """Takes the size of the payload in bytes."""
    command: Callable[[int], list[str]]
    """Takes the port on 127.0.0.1 to listen on."""
    missing: Callable[[], str | None] = lambda: None
    """Why this server cannot run here, if so."""
    topics: bool = True
    """Whether it tells topics apart."""


def event(payload: int) -> str:
    """The broker's event with this many bytes of data, between the quotes."""
    return f'{_BEFORE_TOPIC}t%t","data":"{_data(payload)}"}}'


def _data(payload: int) -> str:
    # Letters and digits without a pattern, the same in every run.
    return "".join(random.Random(payload).choices(string.ascii_letters + string.digits, k=payload))


def _broker_dialogue(payload: int) -> Dialogue:
    return Dialogue(
        subscribe='{"op":"subscribe","id":1,"topic":"t%t"}',
        answer='"op":"ok"',
        subscriber_greetings=2,  # welcome, ok
        publisher_greetings=1,  # welcome
        publish=f'{{"op":"publish","topic":"t%t","data":"{_data(payload)}"}}',
        event=event(payload),
    )


def _relay_dialogue(payload: int) -> Dialogue:
    return Dialogue(
        subscribe="sub t%t",
        answer="ok",
        subscriber_greetings=1,
        publisher_greetings=0,
        publish=event(payload),
        event=event(payload),
    )


def _broker_command(port: int) -> list[str]:
    # Not the installed command: the bench measures the sources that it lies beside. Nor a configuration file of this
    # machine's: the bench measures the defaults.
    serve = [sys.executable, "-m", "broker", "serve", "--config", os.devnull, "--admin", ""]
    return [*serve, "--listen", f"127.0.0.1:{port}", "--log-level", "warning"]


def _broker_missing() -> str | None:
    if importlib.util.find_spec("broker") is None or importlib.util.find_spec("broker._speedups") is None:
        return "broker._speedups is not built"
    return None


def _websockets_missing() -> str | None:
    missing = [name for name in ("websockets", "uvloop") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


BROKER = Peer("wsbroker", "wsbroker", _broker_dialogue, _broker_command, _broker_missing)
WEBSOCKETS = Peer(
    "websockets",
    "websockets broadcast, uvloop",
    _relay_dialogue,
    lambda port: [sys.executable, "-m", "bench.peers.websockets_relay", str(port)],
    _websockets_missing,
)
FLOOR_MESSAGE = Peer(
    "floor-message",
    "C floor, a send per message",
    _relay_dialogue,
    lambda port: [str(native.c_floor()), str(port), "message"],
    topics=False,
)
FLOOR = Peer(
    "floor",
    "C floor, a send per read batch",
    _relay_dialogue,
    lambda port: [str(native.c_floor()), str(port), "batch"],
    topics=False,
)
PEERS = {peer.name: peer for peer in (BROKER, WEBSOCKETS, FLOOR_MESSAGE, FLOOR)}
