"""`wsbroker bench` without its command line and output: loads a running broker and measures it.

First one ordinary client connects: whatever keeps this program from using the broker is found out by it, the
certificate is verified, and one event is published. Then the load program (broker.cli.load) does the rest, at the
address that this client found; it does not verify the certificate again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import resource
import secrets
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
from websockets.uri import WebSocketURI, parse_uri

from broker.cli.load import command_by_input
from broker.errors import REFUSALS, CommandError
from wsbroker_client import Closed, LoadFailed, Refused, Unreachable
from wsbroker_client.connection import Connection, connect
from wsbroker_client.stream import LOST

MAX_PAYLOAD: Final = 65_000
"""Bytes of data in an event: the load program's frames have at most 65,535 in all."""

SPARE_FILES: Final = 16
"""Descriptors that the load program needs beside its connections."""

WARMUP: Final = 0.5
"""Seconds before the measuring begins, in which buffers grow and routes are found."""

PROGRESS: Final = 0.25
"""Seconds between two reports of the load program."""

OPEN_TIMEOUT: Final = 10.0


class Plan(msgspec.Struct, frozen=True):
    """The load. `window` publishes are kept under way, or `rate` are sent per second if it is not None.

    `payload` is the bytes of data of an event, quotes included; `subscribers` a multiple of `topics`.
    """

    url: str
    subscribers: int
    topics: int
    window: int
    rate: float | None
    payload: int
    seconds: float
    token: str | None = None
    ca: Path | None = None


class Latency(msgspec.Struct, frozen=True):
    """Percentiles, in microseconds."""

    p50: float
    p90: float
    p99: float
    p999: float = msgspec.field(name="p99.9")
    max: float


class Progress(msgspec.Struct, frozen=True):
    """Progress of the load program. The rate and the latencies are those since its last report."""

    phase: str
    seconds: float
    open: int
    publishes: int
    deliveries: int
    deliveries_per_second: float
    p50_us: float
    p99_us: float


class Measured(msgspec.Struct, frozen=True):
    """The results of the load program. CPU shares are of one core."""

    seconds: float
    connect_seconds: float
    publishes: int
    deliveries: int
    deliveries_per_second: float
    unsent: int
    load_cpu: float
    server_cpu: float
    server_rss: int
    delivery_us: Latency


class Broker(msgspec.Struct, frozen=True):
    """The process behind the connection: its id and name, or why it cannot be watched."""

    pid: int | None = None
    name: str | None = None
    why_not: str | None = None


class Outcome(msgspec.Struct, frozen=True):
    """The figures of a run, and the broker: its `welcome` and its process."""

    plan: Plan
    server: str
    broker: Broker
    measured: Measured

    @property
    def publishes_per_second(self) -> float:
        """Publishes per second that all subscribers have received."""
        return self.measured.publishes / self.measured.seconds


class Target(msgspec.Struct, frozen=True):
    """The address that the load program connects to."""

    address: str
    host: str
    path: str
    tls: bool
    server: str
    broker: Broker
    prefix: str


Show = Callable[[Progress], object]


def missing_files(subscribers: int) -> str | None:
    """Explain why the limit of open files does not allow so many connections; None if it does."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = subscribers + 1 + SPARE_FILES
    if most in (resource.RLIM_INFINITY, -1) or needed <= most:
        return None
    return f"{subscribers} subscribers need {needed} open files, and the limit is {most} (ulimit -Hn)"


async def measure(plan: Plan, show: Show) -> Outcome:
    """Load the broker as planned; `show` is called with each report on the way.

    Raises ClientError where there is no broker, or not for so many, and CommandError where it does not allow this.
    """
    target = await explore(plan)
    measured = await _run_load(arguments(plan, target), plan, show)
    return Outcome(plan, target.server, target.broker, measured)


async def explore(plan: Plan) -> Target:
    """Connect as any client does, subscribe to a topic and publish one event to it, and note where that was."""
    _refuse_proxy(plan.url)
    prefix = f"bench.{secrets.token_hex(4)}."
    async with connect(plan.url, token=plan.token, ca=plan.ca, timeout=OPEN_TIMEOUT) as client:
        size, most = len(_publish(f"{prefix}t00000", plan.payload)), client.welcome["max_size"]
        if size > most:
            raise CommandError("limit", f"a publish would have {size:,} bytes, the broker takes at most {most:,}")
        await client.subscribe(f"{prefix}t00000")
        receipt = await client.publish(f"{prefix}t00000", "x")
        if receipt.epoch is not None:  # the load program compares events byte by byte, and theirs have offsets
            raise LoadFailed("the topics bench.> keep history here: give them a topic rule with history = 0")
        sock = client_socket(client)
        address = f"unix:{plan.url.removeprefix('unix:')}" if plan.url.startswith("unix:") else _named(sock)
        uri = parse_uri("ws://localhost/" if plan.url.startswith("unix:") else plan.url)
        return Target(
            address, _host(uri), uri.resource_name, uri.secure, client.welcome["server"], find_broker(sock), prefix
        )


def arguments(plan: Plan, target: Target) -> list[str]:
    """The arguments of the load program (bench/load/options.c)."""
    topic = f"{target.prefix}t%t"
    options: dict[str, object] = {
        "server": target.address,
        "tls": int(target.tls),
        "host": target.host,
        "path": target.path,
        "framing": "text",
        "subscribe": f'{{"op":"subscribe","id":1,"topic":"{topic}"}}',
        "answer": '"op":"ok"',
        "subscriber-greetings": 2,  # welcome, ok
        "publisher-greetings": 1,  # welcome
        "publish": _publish(topic, plan.payload),
        "event": f'{{"op":"event","topic":"{topic}","data":{_data(plan.payload)}}}',
        "subscribers": plan.subscribers,
        "topics": plan.topics,
        "warmup": WARMUP,
        "duration": plan.seconds,
        "progress": PROGRESS,
    }
    options |= {"window": plan.window} if plan.rate is None else {"rate": plan.rate}
    if target.broker.pid is not None:
        options["pid"] = target.broker.pid
    if plan.token is not None:
        options["header"] = f"Authorization: Bearer {plan.token}"
    return ["publish", *(f"--{name}={value}" for name, value in options.items())]


async def _run_load(arguments: list[str], plan: Plan, show: Show) -> Measured:
    process = await asyncio.create_subprocess_exec(
        *command_by_input(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Ctrl-C is for this process, which then ends the other one.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    last: Progress | None = None
    line = b""
    try:
        process.stdin.write(json.dumps(arguments).encode())
        process.stdin.close()
        async for line in process.stdout:
            if line.startswith(_PROGRESS):
                last = msgspec.json.decode(line, type=_Report).progress
                show(last)
        complaint = (await process.stderr.read()).decode(errors="replace")
        if await process.wait() != 0:
            _fail(complaint, plan, last)
        return msgspec.json.decode(line, type=Measured)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
        # Or its pipes would be closed by the garbage collector, after the loop.
        process._transport.close()  # type: ignore[attr-defined]  # typeshed has it not


class _Report(msgspec.Struct):
    progress: Progress


_PROGRESS: Final = b'{"progress"'
_REFUSED: Final = re.compile(r"the server refused the handshake: HTTP/1\.[01] (\d{3})")
_ENDED: Final = re.compile(r"was (?:lost|ended by the server|closed by the server)")
_CODE: Final = re.compile(r"closed by the server: (\d{4})")


def _fail(complaint: str, plan: Plan, last: Progress | None) -> NoReturn:
    """Raise the error that the last line of the load program reports."""
    words = complaint.strip().rpartition("\n")[2].removeprefix("load: ") or "the load program ended without a word"
    opened = f"with {last.open if last else 0} of {plan.subscribers + 1} connections open"
    if refused := _REFUSED.search(words):
        status = int(refused[1])
        meaning = REFUSALS[status].meaning if status in REFUSALS else words
        raise Refused(f"{opened} the broker refused one: HTTP {status}: {meaning}", status=status)
    if "Connection refused" in words or "Connection reset" in words or "Cannot assign requested" in words:
        raise Unreachable(f"{opened}: {words}")
    if _ENDED.search(words):
        code = _CODE.search(words)
        raise Closed(f"{opened}: {words}", close_code=int(code[1]) if code else LOST, retry=False)
    if '"op":"gap"' in words or "more than were published" in words:
        raise LoadFailed("subscribers were too slow, and the broker dropped events: try a lower --rate, or --window")
    raise LoadFailed(f"{opened}: {words}")


# The data


def _data(size: int) -> str:
    """So many bytes of JSON: a string."""
    return '"' + "x" * (size - 2) + '"'


def _publish(topic: str, payload: int) -> str:
    return f'{{"op":"publish","topic":"{topic}","data":{_data(payload)}}}'


# The address


def _refuse_proxy(url: str) -> None:
    from websockets.proxy import get_proxy

    if url.startswith("unix:"):
        return
    uri = parse_uri(url)
    with contextlib.suppress(ValueError):
        if uri.host == "localhost" or ipaddress.ip_address(uri.host).is_loopback:
            return
    if get_proxy(uri) is not None:
        raise Unreachable(f"the environment names a proxy for {uri.host}, and a load cannot go through one: unset it")


def client_socket(client: Connection) -> socket.socket:
    """The socket of a connected client."""
    found: socket.socket = client._stream.transport.get_extra_info("socket")
    return found


def _named(sock: socket.socket) -> str:
    host, port = sock.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(uri: WebSocketURI) -> str:
    """The header Host: the name, and the port unless it is the default."""
    name = f"[{uri.host}]" if ":" in uri.host else uri.host
    return name if uri.port == (443 if uri.secure else 80) else f"{name}:{uri.port}"


# The process of the broker


def find_broker(sock: socket.socket, proc: Path = Path("/proc")) -> Broker:
    """Find the process at the other end of a connection, if it is on this machine and this user may inspect it.

    Behind a proxy it is the proxy.
    """
    try:
        if sock.family == socket.AF_UNIX:
            # Of the process that listens (unix(7), SO_PEERCRED).
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return _watchable(pid, proc)
        inode = _inode(sock, proc)
        if inode is None:
            return Broker(why_not="it is on another machine")
        pid = _owner(inode, proc)
        if pid is None:
            return Broker(why_not="its process belongs to another user")
        return _watchable(pid, proc)
    except (OSError, ValueError) as error:
        return Broker(why_not=f"its process cannot be found ({error})")


def _watchable(pid: int, proc: Path) -> Broker:
    if pid <= 0 or not (proc / str(pid)).exists():
        return Broker(why_not="its process is in another container")
    return Broker(pid=pid, name=(proc / str(pid) / "comm").read_text().strip())


def _inode(sock: socket.socket, proc: Path) -> int | None:
    """The inode of the socket at the other end: its own address is our peer, and the other way round (proc(5))."""
    ours, theirs = _ends(sock.getsockname()), _ends(sock.getpeername())
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if _parse(fields[1]) == theirs and _parse(fields[2]) == ours:
                    return int(fields[9])
    return None


End = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def _ends(name: tuple[Any, ...]) -> End:
    return _plain(ipaddress.ip_address(str(name[0]).partition("%")[0])), name[1]


def _parse(text: str) -> End:
    """An address as the kernel writes it: words of 32 bits in the machine's order, in hexadecimal."""
    words, port = text.split(":")
    packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address that came as an IPv6 one, as itself."""
    return getattr(address, "ipv4_mapped", None) or address


def _owner(inode: int, proc: Path) -> int | None:
    """The process that has this socket open."""
    wanted = f"socket:[{inode}]"
    for folder in proc.glob("[0-9]*"):
        # Processes end meanwhile, and those of others may not be looked at.
        with contextlib.suppress(OSError):
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) == wanted:
                        return int(folder.name)
    return None


__all__ = ["Broker", "Latency", "Measured", "Outcome", "Plan", "Progress", "measure", "missing_files"]
