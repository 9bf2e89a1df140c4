"""The relay protocol, for servers that have no protocol of their own.

A message `sub TOPIC` subscribes and is answered `ok`; any other goes unchanged to the subscribers of the topic that
stands in it at `RELAY_TOPIC`. The server programs are started with
`ADDRESS [--certificate FILE --key FILE] [--deflate] [--stalled]`.
"""

import argparse
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peers.base import Dialogue, Setting, Talk, event

# Connections that may wait to be accepted. With asyncio's default of 100 the kernel turns clients away when thousands
# come at once.
BACKLOG = 4096
# The topic in an event: "t" and five digits.
RELAY_TOPIC = slice(len('{"op":"event","topic":"'), len('{"op":"event","topic":"t00000'))


def dialogue(talk: Talk) -> Dialogue:
    """What the clients of a relay say."""
    return Dialogue(
        subscribe="sub t%t",
        # A server may compress this, too; it is not looked into then.
        answer="" if talk.deflate else "ok",
        subscriber_greetings=1,
        publish=event(talk),
        event=event(talk),
        deflate=talk.deflate,
    )


def program(module: str) -> Callable[[Setting], list[str]]:
    """The command that starts a relay which is a Python module."""

    def command(setting: Setting) -> list[str]:
        options = []
        if setting.transport == "tls":
            options = ["--certificate", str(setting.certificate), "--key", str(setting.key)]
        options += [f"--{name}" for name in ("deflate", "stalled") if getattr(setting, name)]
        return [sys.executable, "-m", module, setting.address, *options]

    return command


@dataclass(frozen=True)
class Arguments:
    """What a relay was started with. Either a host and a port, or the path of a socket."""

    host: str
    port: int
    path: Path | None
    certificate: Path | None
    key: Path | None
    deflate: bool
    stalled: bool

    @classmethod
    def read(cls) -> "Arguments":
        """Takes them from the command line of this process."""
        parser = argparse.ArgumentParser()
        parser.add_argument("address")
        parser.add_argument("--certificate", type=Path)
        parser.add_argument("--key", type=Path)
        parser.add_argument("--deflate", action="store_true")
        parser.add_argument("--stalled", action="store_true")
        given = parser.parse_args()
        rest = (given.certificate, given.key, given.deflate, given.stalled)
        if given.address.startswith("unix:"):
            return cls("", 0, Path(given.address.removeprefix("unix:")), *rest)
        host, port = given.address.rsplit(":", 1)
        return cls(host, int(port), None, *rest)

    def tls(self) -> ssl.SSLContext | None:
        """A context with the certificate, if there is one."""
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context
