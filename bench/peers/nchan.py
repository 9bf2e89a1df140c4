"""nchan, a module of nginx: one process, WebSocket on both sides.

A channel belongs to a location, so that a publisher's connection publishes to one channel only. A message's id is the
second in which it came and a signed 16-bit number within that second, so that from the 32,769th of a channel in one
second on subscribers get nothing more: one subscriber, with some publishes under way all the time, comes to that.
"""

import re
import shutil
from pathlib import Path

from bench.peers.base import Dialogue, Peer, Setting, Talk, event, program_says

# Where distributions put dynamic modules.
MODULES = [Path(folder, "ngx_nchan_module.so") for folder in ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules")]
GET = "apt install nginx-light libnginx-mod-nchan"


def command(setting: Setting) -> list[str]:
    """One process in the foreground: no master, no workers, no log of accesses."""
    listen = {"unix": f"unix:{setting.socket}", "tls": f"{setting.address} ssl"}.get(setting.transport, setting.address)
    tls = f"ssl_certificate {setting.certificate}; ssl_certificate_key {setting.key};"
    folders = "".join(
        f"    {name}_temp_path {setting.folder / name};\n"
        for name in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
    )
    config = setting.folder / "nginx.conf"
    config.write_text(
        f"""\
load_module {_module()};
daemon off;
master_process off;
pid {setting.folder / "nginx.pid"};
error_log stderr warn;
worker_rlimit_nofile 65535;
events {{ worker_connections 30000; }}
http {{
    access_log off;
{folders}
    nchan_shared_memory_size 256M;
    # Messages are kept only as long as the slowest subscriber of these runs needs them.
    nchan_message_buffer_length 1000;
    nchan_message_timeout 5s;
    server {{
        listen {listen} backlog=4096;
        {tls if setting.transport == "tls" else ""}
        location ~ ^/sub/(\\w+)$ {{
            nchan_subscriber websocket;
            nchan_channel_id $1;
            nchan_subscriber_first_message newest;
        }}
        location ~ ^/pub/(\\w+)$ {{
            nchan_publisher websocket;
            nchan_channel_id $1;
            {"nchan_deflate_message_for_websocket on;" if setting.deflate else ""}
        }}
    }}
}}
"""
    )
    return ["nginx", "-p", str(setting.folder), "-c", str(config)]


def talk(talk: Talk) -> Dialogue:
    """A subscriber has nothing to say; a publisher is told about every message, which it ignores."""
    return Dialogue(
        path="/sub/t%t",
        publisher_path="/pub/t00000",
        publish=event(talk),
        event=event(talk),
        publisher_ignores=True,
        deflate=talk.deflate,
    )


def _module() -> Path:
    return next((path for path in MODULES if path.exists()), MODULES[0])


def missing() -> str | None:
    """Whether nginx and the module are there."""
    if shutil.which("nginx") is None:
        return f"there is no nginx; {GET}"
    return None if _module().exists() else f"nginx has no module nchan; {GET}"


def version() -> str | None:
    """nginx' version; the module has none that it tells."""
    found = re.search(r"nginx/([\w.]+)", program_says("nginx", "-v"))
    return found[1] if found else None


NCHAN = Peer(
    "nchan",
    "nchan (nginx)",
    # No "rapid": see above.
    frozenset({"tcp", "unix", "tls", "deflate"}),
    command,
    talk,
    missing,
    version,
)
