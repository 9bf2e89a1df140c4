"""What a peer is: a server that the bench can start, and what a client says to it.

Every subscriber gets the same data: a JSON string. Where the server's own protocol names the topic beside the message
(wsbroker, NATS, Redis), the publisher hands over the data alone. A server without such a protocol relays the finished
event, `{"op":"event","topic":"t00000","data":"…"}`, unchanged.
"""

import importlib.metadata
import importlib.util
import random
import shutil
import string
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

# What a server may be able to do, besides "tcp", "unix" and "tls", the ways to reach it.
#   topics    tells topics apart, all of them on one publisher's connection
#   patterns  takes subscriptions with a wildcard
#   deflate   permessage-deflate without context takeover
#   unsubscribed  a client can be connected without a subscription
#   threads   can be told how many threads send
#   rapid     takes more than 32,767 events of one topic in a second
ABILITIES = frozenset({"tcp", "unix", "tls", "topics", "patterns", "deflate", "unsubscribed", "threads", "rapid"})

# In words that read on after "has no".
LACKS = {
    "unix": "listener on a Unix socket",
    "tls": "TLS",
    "topics": "publisher of many topics",
    "patterns": "patterns",
    "deflate": "permessage-deflate that is comparable",
    "unsubscribed": "connection without a subscription",
    "threads": "setting for the threads that send",
    "rapid": "numbers for more than 32,767 events of a topic in a second, and stops there",
}


@dataclass(frozen=True)
class Setting:
    """What a server is started for. The folder is its own, and goes when it has ended."""

    folder: Path
    port: int
    transport: str = "tcp"
    deflate: bool = False
    pings: bool = True
    """Off: clients that do not answer pings are to stay connected, where the server has a setting for it."""
    stalled: bool = False
    """Some clients will stop reading: what may wait for them is what the server's own defaults allow."""
    threads: int = 0
    """How many threads send, where the server can be told; 0: what it takes of itself."""

    @property
    def address(self) -> str:
        """Where clients find it: `127.0.0.1:PORT` or `unix:/path`, as the load program takes it."""
        return f"unix:{self.socket}" if self.transport == "unix" else f"127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        """The path of the Unix socket."""
        return self.folder / "socket"

    @property
    def certificate(self) -> Path:
        """A self-signed certificate, PEM. It is there if the transport is "tls"."""
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        """Its key, PEM, not encrypted."""
        return self.folder / "key.pem"


@dataclass(frozen=True)
class Talk:
    """What the messages of a run are like."""

    payload: int = 128
    """Bytes of data, without the quotes around."""
    patterns: bool = False
    """Each subscriber has a pattern of its own, which one topic matches."""
    deflate: bool = False
    """Compressed; the data is prose then, which compresses about as well as real messages do."""


@dataclass(frozen=True)
class Dialogue:
    """What a client says and hears; `%t` stands for the number of a topic, in five digits.

    Each field is an option of the load program, with "-" for "_"; what is left at its default here has the same
    default there. Framing: `text`, each message in a WebSocket text frame; `stream`, a byte stream in binary frames;
    `raw`, a byte stream and no WebSocket. The greetings are the messages that a client gets before the first event
    (text only); the last of a subscriber's contains `answer`. In a stream a subscriber waits for `answer`, a publisher
    sends `hello` and waits for `publisher_answer`; a `ping` of the server is answered by `pong`.
    """

    subscribe: str = ""
    answer: str = ""
    subscriber_greetings: int = 0
    publisher_greetings: int = 0
    publish: str = ""
    event: str = ""
    path: str = "/"
    publisher_path: str = ""
    framing: str = "text"
    hello: str = ""
    publisher_answer: str = ""
    ping: str = ""
    pong: str = ""
    publisher_ignores: bool = False
    deflate: bool = False

    def options(self) -> list[str]:
        """The command line of the load program."""
        given = ((each.name, each.default, getattr(self, each.name)) for each in fields(self))
        return [
            f"--{name.replace('_', '-')}={int(value) if isinstance(value, bool) else value}"
            for name, default, value in given
            if value != default
        ]


@dataclass(frozen=True)
class Peer:
    """A server that the bench can start."""

    name: str
    title: str
    abilities: frozenset[str]
    """A choice from ABILITIES."""
    command: Callable[[Setting], list[str]]
    """The command line, for a process of its own that stays in the foreground. May write files to the folder."""
    talk: Callable[[Talk], Dialogue]
    missing: Callable[[], str | None]
    """Why this server cannot run here and how to get it, if so; None if it can."""
    version: Callable[[], str | None]
    websocket: bool = True
    """False for a yardstick of another kind."""

    def dialogue(self, payload: int) -> Dialogue:
        """The dialogue with this many bytes of data."""
        return self.talk(Talk(payload))


def data(talk: Talk) -> str:
    """The data of an event, without the quotes: the same in every run, and with nothing that JSON escapes."""
    chosen = random.Random(talk.payload)
    if not talk.deflate:
        # Letters and digits without a pattern, so that nothing on the way can make use of one.
        return "".join(chosen.choices(string.ascii_letters + string.digits, k=talk.payload))
    prose = " ".join(chosen.choices(_WORDS.split(), k=talk.payload // 2 + 1))
    return prose[: talk.payload]


_WORDS = (
    "price order trade volume open high low close bid ask market limit filled pending user room message joined left "
    "sensor temperature humidity pressure north south east west online offline 0.1 12.5 1084 2026 true false"
)


def topic(talk: Talk) -> str:
    """The topic that is published to."""
    return "p.x.t%t" if talk.patterns else "t%t"


def event(talk: Talk) -> str:
    """The broker's event."""
    return f'{{"op":"event","topic":"{topic(talk)}","data":"{data(talk)}"}}'


def module_missing(*names: str) -> Callable[[], str | None]:
    """For a peer that is a Python package: those of the names that are not installed, and how to get them."""

    def missing() -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}; pip install {' '.join(absent)}" if absent else None

    return missing


def program_missing(program: str, package: str) -> Callable[[], str | None]:
    """For a peer that is a program: whether it is on the path, and how to get it."""
    return lambda: None if shutil.which(program) else f"there is no {program}; apt install {package}"


def module_version(name: str) -> Callable[[], str | None]:
    """The version of an installed Python package."""

    def version() -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return version


def program_says(*command: str) -> str:
    """What a program prints when it is asked for its version, on either stream; empty if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr
