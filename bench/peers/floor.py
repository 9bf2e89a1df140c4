"""The C floor: what it costs at least to unmask a frame and to send it to all."""

import os
import shlex
import shutil

from bench import native
from bench.peers import relay
from bench.peers.base import Peer, Setting


def _peer(name: str, title: str, mode: str) -> Peer:
    def command(setting: Setting) -> list[str]:
        return [str(native.c_floor()), setting.address, mode]

    return Peer(
        name,
        title,
        frozenset({"tcp", "unix", "unsubscribed", "rapid"}),
        command,
        relay.dialogue,
        _missing,
        lambda: None,
        websocket=False,
    )


def _missing() -> str | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))[0]
    return None if shutil.which(compiler) else f"there is no C compiler {compiler}; apt install gcc libc6-dev"


FLOOR = _peer("floor", "C floor, a send per read batch", "batch")
FLOOR_MESSAGE = _peer("floor-message", "C floor, a send per message", "message")
