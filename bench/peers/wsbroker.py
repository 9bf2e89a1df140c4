"""The broker itself, from the sources that the bench lies beside, with its default configuration."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from bench.peers.base import ABILITIES, Dialogue, Peer, Setting, Talk, data, event, topic

ROOT = Path(__file__).parent.parent.parent


def command(setting: Setting) -> list[str]:
    """Not the installed command, nor a configuration file of this machine's: the defaults of the checkout."""
    lines = ["[server]"]
    if setting.transport == "tls":
        lines += [f'certificate = "{setting.certificate}"', f'key = "{setting.key}"']
    if setting.deflate:
        lines.append("compression = true")
    if setting.threads:
        lines.append(f"threads = {setting.threads}")
    if not setting.pings:
        # A client that stands still answers no ping, and would be gone before a long run has ended.
        lines += ["[limits]", "ping_interval = 0"]
    config = setting.folder / "wsbroker.toml"
    config.write_text("".join(f"{line}\n" for line in lines))
    serve = [sys.executable, "-m", "broker", "serve", "--config", str(config), "--listen", setting.address]
    # The admin listener is there as it is by default, on a port that is free.
    return [*serve, "--admin", "127.0.0.1:0"]


def talk(talk: Talk) -> Dialogue:
    """The protocol of docs/protocol.md, with publishes that ask for no answer."""
    return Dialogue(
        subscribe='{"op":"subscribe","id":1,"topic":"%s"}' % ("p.*.t%t" if talk.patterns else "t%t"),
        answer='"op":"ok"',
        subscriber_greetings=2,  # welcome, ok
        publisher_greetings=1,  # welcome
        publish=f'{{"op":"publish","topic":"{topic(talk)}","data":"{data(talk)}"}}',
        event=event(talk),
        deflate=talk.deflate,
    )


def missing() -> str | None:
    """Whether the extension is built."""
    if importlib.util.find_spec("broker") is None or importlib.util.find_spec("broker._speedups") is None:
        return "broker._speedups is not built; tools/setup run"
    return None


def version() -> str:
    """The commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


BROKER = Peer(
    "wsbroker",
    "wsbroker",
    ABILITIES,
    command,
    talk,
    missing,
    version,
)
