"""What 1,000 clients with tokens cost the broker when they connect at once, and what a connected client feels of it.

`python -m bench.authentication` starts the broker for each algorithm. All clients have connected before the first one
sends its request. Meanwhile one client, a process of its own, pings as fast as it gets answers.

Two figures are of the broker's processor time, so that they hold on a busy machine too: what all connects took, and how
long the broker has worked on other things, at most, before it answered a ping.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from websockets.sync.client import connect

CLIENTS = 1000
RUNS = 5
CONFIG = """
[server]
admin = ""
[auth]
required = {required}
algorithms = ["{algorithm}"]
{key}
[[roles]]
name = "default"
subscribe = [">"]
[[roles]]
name = "anonymous"
subscribe = [">"]
"""
REQUEST = (
    "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{more}\r\n"
)


def private_keys() -> dict[str, Any]:
    """The key for each algorithm."""
    return {
        "none": None,
        "HS256": secrets.token_bytes(32).hex(),
        "RS256": rsa.generate_private_key(65537, 2048),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        "ES512": ec.generate_private_key(ec.SECP521R1()),
    }


@contextlib.asynccontextmanager
async def broker(algorithm: str, key: Any) -> AsyncIterator[tuple[int, int]]:
    """A broker that takes these tokens; its port and process id."""
    with tempfile.TemporaryDirectory() as folder:
        if key is None or isinstance(key, str):
            line = f'secret = "{key or "x" * 32}"'
        else:
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            text = key.public_key().public_bytes(serialization.Encoding.PEM, form)
            line = f'key = """{text.decode()}"""'
        file = Path(folder) / "wsbroker.toml"
        required = "false" if key is None else "true"
        name = "HS256" if key is None else algorithm
        file.write_text(CONFIG.format(algorithm=name, key=line, required=required))
        command = [sys.executable, "-m", "broker", "serve", "--listen", "127.0.0.1:0", "--config", str(file)]
        process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, env=dict(os.environ))
        assert process.stderr is not None
        try:
            while not (found := re.search(rb"127\.0\.0\.1:(\d+)", line_ := await process.stderr.readline())):
                assert line_, "the broker did not start"
            yield int(found[1]), process.pid
        finally:
            process.terminate()
            await process.wait()


async def measure(algorithm: str, key: Any) -> tuple[float, float, float]:
    """The seconds until all clients were welcomed, those of the broker's processor time, and those before a ping."""
    name = "HS256" if key is None else algorithm
    token = None if key is None else jwt.encode({"sub": "a", "exp": time.time() + 600}, key, name)
    header = "" if token is None else f"Authorization: Bearer {token}\r\n"
    request = REQUEST.format(more=header).encode()
    async with broker(algorithm, key) as (port, pid):
        watcher = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.authentication", str(port), str(pid), token or ""),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        await watcher.stdout.readline()
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CLIENTS)]
        await asyncio.sleep(0.2)
        began, worked = time.perf_counter(), work(pid)
        for _, writer in streams:
            writer.write(request)
        heads = await asyncio.gather(*(reader.readuntil(b"\r\n\r\n") for reader, _ in streams))
        took, worked = time.perf_counter() - began, work(pid) - worked
        assert all(head.startswith(b"HTTP/1.1 101 ") for head in heads)
        out, _ = await watcher.communicate(b"\n")
        for _, writer in streams:
            writer.close()
    return took, worked, float(out)


def work(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def watch(port: str, pid: str, token: str) -> None:
    """Ping until standard input has a line; print for how long the broker worked, at most, until it answered."""
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with connect(f"ws://127.0.0.1:{port}/", additional_headers=headers, proxy=None) as client:
        client.recv()
        print("ready", flush=True)
        slowest = 0.0
        while not select.select([sys.stdin], [], [], 0)[0]:
            began, worked = time.perf_counter(), work(int(pid))
            client.send('{"op":"ping","id":1}')
            client.recv()
            slowest = max(slowest, min(time.perf_counter() - began, work(int(pid)) - worked))
    print(slowest)


async def main() -> None:
    print(f"{CLIENTS:,} clients at once; the best of {RUNS} runs")
    print(f"{'':8}{'all connected':>16}{'processor time':>16}{'before a ping':>16}")
    for algorithm, key in private_keys().items():
        runs = [await measure(algorithm, key) for _ in range(RUNS)]
        took, worked, before = (min(each) * 1000 for each in zip(*runs, strict=True))
        print(f"{algorithm:8}{took:13.0f} ms{worked:13.0f} ms{before:13.1f} ms", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        watch(*sys.argv[1:])
    else:
        asyncio.run(main())
