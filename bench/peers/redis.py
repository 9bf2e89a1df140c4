"""Redis pub/sub over its own protocol on plain TCP: no WebSocket, so a yardstick and not a peer."""

import re

from bench.peers.base import Dialogue, Peer, Setting, Talk, data, program_missing, program_says, topic


def command(setting: Setting) -> list[str]:
    """A server that keeps nothing on disk, and drops no subscriber for being behind."""
    port = ["--port", "0"] if setting.transport != "tcp" else ["--port", str(setting.port)]
    if setting.transport == "unix":
        port += ["--unixsocket", str(setting.socket)]
    if setting.transport == "tls":
        files = ["--tls-cert-file", str(setting.certificate), "--tls-key-file", str(setting.key)]
        port += ["--tls-port", str(setting.port), *files, "--tls-auth-clients", "no"]
    limits = ["--maxclients", "30000", "--tcp-backlog", "4096", "--client-output-buffer-limit", "pubsub 0 0 0"]
    return ["redis-server", "--bind", "127.0.0.1", *port, "--save", "", "--dir", str(setting.folder), *limits]


def talk(talk: Talk) -> Dialogue:
    """RESP2. A publisher is told how many got each message, which it ignores."""
    name, subscribed = topic(talk), "p.*.t%t" if talk.patterns else "t%t"
    payload = f'"{data(talk)}"'
    verb, kind = ("PSUBSCRIBE", ["pmessage", subscribed]) if talk.patterns else ("SUBSCRIBE", ["message"])
    return Dialogue(
        framing="raw",
        subscribe=_resp([verb, subscribed]),
        answer=":1\r\n",
        hello="PING\r\n",
        publisher_answer="+PONG\r\n",
        publish=_resp(["PUBLISH", name, payload]),
        event=_resp([*kind, name, payload]),
        publisher_ignores=True,
    )


def _resp(parts: list[str]) -> str:
    # "%t" will be five digits.
    texts = (f"${len(part.replace('%t', '00000'))}\r\n{part}\r\n" for part in parts)
    return f"*{len(parts)}\r\n{''.join(texts)}"


def version() -> str | None:
    """As `redis-server --version` has it."""
    found = re.search(r"v=([\w.]+)", program_says("redis-server", "--version"))
    return found[1] if found else None


REDIS = Peer(
    "redis",
    "Redis pub/sub, no WebSocket",
    frozenset({"tcp", "unix", "tls", "topics", "patterns", "unsubscribed", "rapid"}),
    command,
    talk,
    program_missing("redis-server", "redis-server"),
    version,
    websocket=False,
)
