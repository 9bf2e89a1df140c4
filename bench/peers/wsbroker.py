"""The broker itself, from the sources that the bench lies beside, with its default configuration."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.peers.base import Dialogue, Peer, Setting, Talk, data, event, topic
from broker.config import Server

ROOT = Path(__file__).parent.parent.parent
# Abilities that are behind a key of the configuration: the key below [server], and what turns it on.
FEATURES: dict[str, Callable[[Setting], dict[str, str]]] = {
    "tls": lambda setting: {"certificate": f'"{setting.certificate}"', "key": f'"{setting.key}"'},
    "deflate": lambda setting: {"compression": "true"},
}


def command(setting: Setting) -> list[str]:
    """Not the installed command, nor a configuration file of this machine's: the defaults of the checkout."""
    config = setting.folder / "wsbroker.toml"
    # A client that stands still answers no ping, and would be gone before a long run has ended.
    limits = [] if setting.pings else ["[limits]", "ping_interval = 0"]
    config.write_text("".join(f"{line}\n" for line in ["[server]", *_features(setting), *limits]))
    serve = [sys.executable, "-m", "broker", "serve", "--config", str(config), "--admin", ""]
    return [*serve, "--listen", setting.address, "--log-level", "warning"]


def _features(setting: Setting) -> list[str]:
    """The lines of the configuration below [server] that turn on what a run needs."""
    wanted = {"tls": setting.transport == "tls", "deflate": setting.deflate}
    keys = [FEATURES[ability](setting) for ability, needed in wanted.items() if needed]
    return [f"{key} = {value}" for turned_on in keys for key, value in turned_on.items()]


def abilities(keys: Iterable[str] = Server.__struct_fields__) -> frozenset[str]:
    """What a broker with these keys below [server] can do."""
    setting = Setting(Path(), 0)
    known = {ability for ability, turned_on in FEATURES.items() if set(turned_on(setting)) <= set(keys)}
    return frozenset({"tcp", "unix", "topics", "patterns", "unsubscribed"} | known)


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
    abilities(),
    command,
    talk,
    missing,
    version,
)
