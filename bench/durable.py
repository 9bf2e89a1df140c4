"""Acknowledged publishes, by what keeps them: `python -m bench durable`.

Eight publishers have 64 publishes each under way, of 128 bytes, each to a topic of its own; a publish counts when it is
acknowledged. Servers take turns, and the best of some runs counts. Beside the broker: Redis Streams (`appendfsync
everysec`) and the JetStream of nats-server (file storage), where they are installed.

Then 1,000 clients at once ask for the last 1,000 events of a topic, with the memory that it takes.

One process publishes for all and does little for each event: it counts the acknowledgements in what it reads, and sends
as many publishes as there were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from websockets.frames import Frame, Opcode

from bench.tables import Table
from bench.terminal import console, show

PUBLISHERS = 8
WINDOW = 64
DATA = json.dumps("x" * 126)
SECONDS = 3.0
RUNS = 3
PATIENCE = 20.0
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
RULES = "[[topics]]\nmatch = 'kept.*'\nhistory = 100000\n"
REPLAYED = 1000
CLIENTS = 1000


class Server(NamedTuple):
    """A server that runs, and how it is spoken to."""

    process: subprocess.Popen[bytes]
    address: tuple[str, int]
    hello: bytes
    """Sent first."""
    ready: bytes
    """What then comes, among other things."""
    publish: str
    """A publish; `{topic}` stands for its topic."""
    acknowledged: bytes
    """What every acknowledgement holds, and nothing else."""
    framed: bool
    """Whether each publish is a WebSocket message."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: Sequence[str], port: int, **how: object) -> Iterator[Server]:
    """A server, once it accepts connections."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if time.monotonic() > until or process.poll() is not None:
                    raise
                time.sleep(0.02)
        yield Server(process, ("127.0.0.1", port), **how)  # type: ignore[arg-type]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def wsbroker(topic: str, engine: str = "memory", durability: str = "full") -> Iterator[Server]:
    """The broker with this engine; `{}` in its name stands for a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        file = Path(folder) / "wsbroker.toml"
        engine = engine.format(folder)
        file.write_text(f"[server]\nadmin = ''\nengine = '{engine}'\ndurability = '{durability}'\n{RULES}")
        command = [sys.executable, "-m", "broker", "serve", "--listen", f"127.0.0.1:{port}", "--config", str(file)]
        message = '{"op":"publish","topic":"' + topic + '.{topic}","id":1,"data":' + DATA + "}"
        with running(
            command,
            port,
            hello=HANDSHAKE,
            ready=b'"max_queue":',
            publish=message,
            acknowledged=b'"op":"ok"',
            framed=True,
        ) as server:
            yield server


@contextlib.contextmanager
def redis() -> Iterator[Server]:
    """Redis Streams: an acknowledged XADD is on the disk within a second."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        settings = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--dir", folder]
        size = len(DATA)
        message = (
            "*8\r\n$4\r\nXADD\r\n${topic_size}\r\nkept.{topic}\r\n$6\r\nMAXLEN\r\n$1\r\n~\r\n$6\r\n100000\r\n"
            f"$1\r\n*\r\n$1\r\nd\r\n${size}\r\n{DATA}\r\n"
        )
        with running(
            ["redis-server", "--port", str(port), *settings],
            port,
            hello=b"PING\r\n",
            ready=b"+PONG\r\n",
            publish=message,
            acknowledged=b"$",
            framed=False,
        ) as server:
            yield server


@contextlib.contextmanager
def jetstream() -> Iterator[Server]:
    """JetStream with file storage: it is synced to the disk every two minutes unless configured otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        stream = json.dumps({"name": "S", "subjects": ["kept.*"], "storage": "file", "max_msgs_per_subject": 100000})
        hello = (
            'CONNECT {"verbose":false}\r\nSUB made.{topic} 2\r\nSUB inbox.{topic} 1\r\n'
            f"PUB $JS.API.STREAM.CREATE.S made.{{topic}} {len(stream)}\r\n{stream}\r\nPING\r\n"
        )
        message = f"PUB kept.{{topic}} inbox.{{topic}} {len(DATA)}\r\n{DATA}\r\n"
        with running(
            ["nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder],
            port,
            hello=hello.encode(),
            ready=b"stream_create_response",
            publish=message,
            acknowledged=b'"seq":',
            framed=False,
        ) as server:
            yield server


class Publisher:
    """One connection, with its window of publishes under way."""

    def __init__(self, server: Server, number: int) -> None:
        self.socket = socket.create_connection(server.address)
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(server.hello.replace(b"{topic}", str(number).encode()))
        received = b""
        while server.ready not in received:
            more = self.socket.recv(65536)
            assert more, received
            received += more
        topic_size = len(f"kept.{number}")
        message = server.publish.replace("{topic}", str(number)).replace("{topic_size}", str(topic_size)).encode()
        self.frame = Frame(Opcode.TEXT, message).serialize(mask=True) if server.framed else message
        self.frames = self.frame * WINDOW
        self.acknowledged = server.acknowledged
        self.rest = b""
        self.errors = 0
        self.send(WINDOW)

    def send(self, count: int) -> None:
        while count > WINDOW:
            self.socket.sendall(self.frames)
            count -= WINDOW
        self.socket.sendall(self.frames[: count * len(self.frame)])

    def turn(self) -> int:
        """Read, and send as many publishes as were acknowledged."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server has closed the connection")
        if b'"op":"error"' in data:
            raise RuntimeError(re.findall(rb'{"op":"error"[^}]*}', data)[0].decode())
        data = self.rest + data
        count = data.count(self.acknowledged)
        keep = len(self.acknowledged) - 1
        tail = data[-keep:] if keep else b""
        self.rest = b"" if self.acknowledged in tail else tail
        if keep and data.endswith(self.acknowledged):
            self.rest = b""
        self.send(count)
        return count


def work(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """What one run has shown: acknowledged publishes a second, and the server's processor time for each, in us."""

    rate: float
    cost: float


def measure(server: Server, seconds: float) -> Run:
    """Publish for so long, after a third of it to warm up."""
    publishers = [Publisher(server, number) for number in range(PUBLISHERS)]
    with selectors.DefaultSelector() as selector:
        for publisher in publishers:
            selector.register(publisher.socket, selectors.EVENT_READ, publisher)
        done = 0
        began = time.perf_counter()
        counting, worked = 0.0, 0.0
        while True:
            now = time.perf_counter()
            if not counting and now - began > seconds / 3:
                counting, done, worked = now, 0, work(server.process.pid)
            elif counting and now - counting > seconds:
                break
            ready = selector.select(PATIENCE)
            assert ready, "no acknowledgement for a long time"
            for key, _ in ready:
                done += key.data.turn()
    worked = work(server.process.pid) - worked
    for publisher in publishers:
        publisher.socket.close()
    return Run(done / (now - counting), 1e6 * worked / max(1, done))


SERVERS = {
    "wsbroker, no history": lambda: wsbroker("plain"),
    "wsbroker, memory": lambda: wsbroker("kept"),
    "wsbroker, SQLite normal": lambda: wsbroker("kept", "sqlite://{}/broker.db", "normal"),
    "wsbroker, SQLite full": lambda: wsbroker("kept", "sqlite://{}/broker.db", "full"),
    "Redis Streams, everysec": redis,
    "JetStream, file": jetstream,
}
PROGRAMS = {"Redis Streams, everysec": "redis-server", "JetStream, file": "nats-server"}


def rss(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def replay(clients: int, events: int) -> tuple[float, int, int]:
    """Let clients ask for the last events at once. The seconds until all have them, the memory before and the most."""
    with wsbroker("kept") as server:
        publisher = Publisher(server, 0)
        count = 0
        while count < events:
            count += publisher.turn()
        publisher.socket.close()
        message = json.dumps({"op": "subscribe", "topic": "kept.0", "last": events, "max_queue": 65536}).encode()
        subscribe = Frame(Opcode.TEXT, message).serialize(mask=True)
        sockets = []
        for _ in range(clients):
            each = socket.create_connection(server.address)
            each.sendall(HANDSHAKE)
            received = b""
            while not received.endswith(b"}"):
                received += each.recv(65536)
            sockets.append(each)
        before = most = rss(server.process.pid)
        began = time.perf_counter()
        with selectors.DefaultSelector() as selector:
            for each in sockets:
                each.sendall(subscribe)
                selector.register(each, selectors.EVENT_READ, [b""])
            left = clients
            while left:
                for key, _ in selector.select(PATIENCE):
                    tail = key.data[0] + key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                    if b'"op":"live"' in tail:
                        left -= 1
                        selector.unregister(key.fileobj)
                    key.data[0] = tail[-10:]
                most = max(most, rss(server.process.pid))
        took = time.perf_counter() - began
        for each in sockets:
            each.close()
        return took, before, most


def main(arguments: Sequence[str]) -> int:
    """Measure, and show two tables."""
    parser = argparse.ArgumentParser(prog="python -m bench durable", description="Acknowledged publishes a second.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each run")
    parser.add_argument("--repeat", type=int, default=RUNS, help="runs of each server")
    parser.add_argument("--server", action="append", choices=SERVERS, help="only this one; may be repeated")
    options = parser.parse_args(arguments)
    names = [name for name in options.server or SERVERS if name not in PROGRAMS or shutil.which(PROGRAMS[name])]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(options.repeat):
        for name in names:
            with SERVERS[name]() as server:
                runs[name].append(measure(server, options.seconds))
    rows = []
    for name in names:
        best = max(runs[name])
        others = ", ".join(f"{run.rate:,.0f}" for run in runs[name])
        rows.append([name, f"{best.rate:,.0f}", f"{best.cost:.2f}", others])
    out = console()
    title = f"{PUBLISHERS} publishers, window {WINDOW}, 128 bytes"
    show(out, Table(title, ["server", "acknowledged/s", "server CPU, us each", "all runs"], rows))
    if options.server is None:
        took, before, most = replay(CLIENTS, REPLAYED)
        total = CLIENTS * REPLAYED
        out.print(
            f"replay of {REPLAYED:,} events to each of {CLIENTS:,} clients at once: {took:.2f} s, {total / took:,.0f} "
            f"events/s; resident memory {before / 1e6:.0f} MB before, {most / 1e6:.0f} MB at most"
        )
    return 0
