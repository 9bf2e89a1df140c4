"""nats-server, through its WebSocket listener. NATS' own protocol runs in the frames, as a byte stream."""

import re

from bench.peers.base import Dialogue, Peer, Setting, Talk, data, program_missing, program_says, topic

# What a client says first; the ping's answer shows that the server has taken all before it.
CONNECT = 'CONNECT {"verbose":false,"pedantic":false,"headers":false}\r\n'


def command(setting: Setting) -> list[str]:
    """One server without monitoring or a listener for plain NATS that others could reach."""
    tls = f'tls {{ cert_file: "{setting.certificate}", key_file: "{setting.key}" }}'
    config = setting.folder / "nats.conf"
    config.write_text(
        f"""\
listen: "127.0.0.1:-1"
max_connections: 100000
websocket {{
    listen: "127.0.0.1:{setting.port}"
    {tls if setting.transport == "tls" else "no_tls: true"}
    compression: false
}}
"""
    )
    return ["nats-server", "-c", str(config)]


def talk(talk: Talk) -> Dialogue:
    """The client protocol of NATS: a subscription with the id 1, publishes without an answer."""
    payload = f'"{data(talk)}"'
    return Dialogue(
        framing="stream",
        subscribe=f"{CONNECT}SUB {'p.*.t%t' if talk.patterns else 't%t'} 1\r\nPING\r\n",
        answer="PONG\r\n",
        hello=f"{CONNECT}PING\r\n",
        publisher_answer="PONG\r\n",
        publish=f"PUB {topic(talk)} {len(payload)}\r\n{payload}\r\n",
        event=f"MSG {topic(talk)} 1 {len(payload)}\r\n{payload}\r\n",
        ping="PING\r\n",
        pong="PONG\r\n",
    )


def version() -> str | None:
    """As `nats-server --version` has it."""
    found = re.search(r"v(\d[\w.-]*)", program_says("nats-server", "--version"))
    return found[1] if found else None


NATS = Peer(
    "nats",
    "nats-server over WebSocket",
    # It compresses what it happens to send together, so that no two subscribers need get the same bytes: no "deflate".
    frozenset({"tcp", "tls", "topics", "patterns", "unsubscribed", "rapid"}),
    command,
    talk,
    program_missing("nats-server", "nats-server"),
    version,
)
