"""A real nginx before the server of the Autobahn suite, with the location of the shipped site for the WebSocket."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SITE = ROOT / "nginx" / "wsbroker.conf"
PATIENCE = 10.0
"""Seconds until nginx listens."""

MAIN = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
{user}
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    map $http_upgrade $wsbroker_connection {{
        default upgrade;
        '' '';
    }}
    upstream wsbroker {{
        server {server};
    }}
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


def websocket_location(site: str) -> str:
    """The location of the WebSocket in the site, without its limits of connections and handshakes."""
    found = re.search(r"^    location = /ws \{\n.*?^    \}\n", site, re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.sub(r"^ +limit_\w+ [^\n]*\n", "", found[0], flags=re.MULTILINE)


@contextmanager
def nginx(url: str) -> Iterator[str]:
    """Run nginx in front of a server at `url` (ws://host:port/); gives the URL of its own WebSocket."""
    subprocess.run(["tools/packages", "nginx=nginx-light"], cwd=ROOT, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        user = "user root;" if os.geteuid() == 0 else ""
        server = url.removeprefix("ws://").rstrip("/")
        main = MAIN.format(
            folder=folder, user=user, server=server, port=port, location=websocket_location(SITE.read_text())
        )
        (folder / "nginx.conf").write_text(main)
        process = subprocess.Popen(["nginx", "-p", scratch, "-c", str(folder / "nginx.conf")])
        try:
            wait_listening(process, port)
            yield f"ws://127.0.0.1:{port}/ws"
        finally:
            process.terminate()
            process.wait()


def wait_listening(process: subprocess.Popen[bytes], port: int) -> None:
    """Return once somebody listens. Raises RuntimeError if nginx ends or does not in time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("nginx does not listen")
