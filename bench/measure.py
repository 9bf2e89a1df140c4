"""What can be done to a server and measured: starts the server on one core and the load program on another.

A server is fresh for every run, so that no run inherits what an earlier one left behind.
"""

import dataclasses
import os
import resource
import socket
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.peers import LACKS, Dialogue, Peer, Setting, Talk
from broker.cli import load as load_program
from broker.cli.measure import Latency

ROOT = Path(__file__).parent.parent
START_TIMEOUT = 15.0
STOP_TIMEOUT = 15.0
# What a run may take beyond its warm-up and its measured time. It ends by itself when nothing happens for some seconds.
LOAD_TIMEOUT = 60.0
# A server that pings disconnects a client that stands still at 20 (websockets) to 35 s (wsbroker).
PINGS_MATTER = 25.0
# Seconds to start and stop a server and a load program, and for a connection. Only for the progress bar and the plan.
EXPECTED_START = 0.6
EXPECTED_CONNECTION = 0.0003
EXPECTED_TLS = 0.0015


class MeasureError(Exception):
    """A run failed: the server did not start, or the load program gave up. The text says why."""


class Published(msgspec.Struct, frozen=True):
    """What one run of `load publish` measured. CPU shares are of one core; `other_cpu` is everybody else's.

    The totals are those of the whole run, with warm-up and end; everything else is of the measured time. `unsent`: in
    an open loop, the publishes that the server did not take in time. `samples`: seconds and the server's memory in
    bytes.
    """

    subscribers: int
    topics: int
    window: int
    event_bytes: int
    seconds: float
    publishes: int
    deliveries: int
    deliveries_per_second: float
    total_publishes: int
    total_deliveries: int
    server_cpu: float
    load_cpu: float
    other_cpu: float
    server_us_per_delivery: float
    server_rss: int
    publishes_per_write: float
    deliveries_per_read: float
    done_us: Latency
    delivery_us: Latency
    rate: float = 0.0
    unsent: int = 0
    stalled: int = 0
    samples: tuple[tuple[float, int], ...] = ()
    server_rss_before: int = 0
    learned: str = ""


class Opened(msgspec.Struct, frozen=True):
    """What one run of `load open` measured: the connections beyond the first `base`. Memory is in bytes."""

    connections: int
    base: int
    seconds: float
    connects_per_second: float
    server_cpu: float
    load_cpu: float
    other_cpu: float
    server_us_per_connect: float
    server_rss_base: int
    server_rss: int
    rss_per_connection: float
    connect_us: Latency | None = None


class Flushed(msgspec.Struct, frozen=True):
    """What one run of `load flush` measured. `done_us`: from a publish until the last subscriber has it."""

    subscribers: int
    event_bytes: int
    seconds: float
    publishes: int
    server_cpu: float
    load_cpu: float
    other_cpu: float
    server_us_per_delivery: float
    done_us: Latency


Result = Published | Opened | Flushed
ResultT = TypeVar("ResultT", Published, Opened, Flushed)


class Publishing(msgspec.Struct, frozen=True, tag_field="what", tag="publish", kw_only=True, omit_defaults=True):
    """Subscribers spread over the topics, and one publisher. Times in seconds, sizes in bytes.

    Either a closed loop, with so many publishes under way (`window`), or an open one, with so many a second (`rate`).
    `stalled` subscribers come on top, which never read. `sample`: how often the server's memory is read, 0 never.
    `most_memory`: with more than so many megabytes in a sample the measuring ends, 0 for any.
    """

    subscribers: int
    window: int = 0
    rate: float = 0.0
    topics: int = 1
    payload: int = 128
    stalled: int = 0
    patterns: bool = False
    deflate: bool = False
    transport: str = "tcp"
    warmup: float = 0.2
    seconds: float = 0.5
    sample: float = 0.0
    most_memory: int = 0

    def __str__(self) -> str:
        topics = f", {self.topics:,} {'patterns' if self.patterns else 'topics'}" if self.topics > 1 else ""
        pace = f"window {self.window}" if self.window else f"{self.rate:g} publishes/s"
        stalled = f", {self.stalled} more stalled" if self.stalled else ""
        how = f", {'Unix socket' if self.transport == 'unix' else 'TLS'}" if self.transport != "tcp" else ""
        deflate = ", deflate" if self.deflate else ""
        plural = "" if self.subscribers == 1 else "s"
        size = f"{self.payload} B" if self.payload < 1024 else f"{self.payload / 1024:g} kB"
        return f"{self.subscribers:,} subscriber{plural}{topics}, {pace}, {size}{stalled}{how}{deflate}"

    @property
    def needs(self) -> frozenset[str]:
        """What the server must be able to do, as peers state it."""
        wanted = {self.transport: True, "topics": self.topics > 1, "patterns": self.patterns, "deflate": self.deflate}
        # With one subscriber and no waiting in between, a topic has as many events as the server can move.
        wanted["rapid"] = self.subscribers == 1 and self.window > 1
        return frozenset(ability for ability, needed in wanted.items() if needed)

    @property
    def expected(self) -> float:
        """About how long a run takes, in seconds."""
        connections = self.subscribers + self.stalled
        each = EXPECTED_TLS if self.transport == "tls" else EXPECTED_CONNECTION
        return EXPECTED_START + connections * each + self.warmup + self.seconds

    def run(self, peer: Peer) -> Published:
        """Measures this on a fresh server. Raises MeasureError, BuildError."""
        talk = Talk(self.payload, self.patterns, self.deflate)
        options: dict[str, object] = {
            "subscribers": self.subscribers,
            "topics": self.topics,
            "warmup": self.warmup,
            "duration": self.seconds,
        }
        options |= {"window": self.window} if self.window else {"rate": self.rate}
        options |= {name: value for name in ("stalled", "sample", "most_memory") if (value := getattr(self, name))}
        dialogue = peer.talk(talk)
        result = msgspec.json.decode(_run_load("publish", self, peer, dialogue, options), type=Published)
        if self.deflate:
            _check_inflated(result.learned, dialogue.event)
        return msgspec.structs.replace(result, learned="")


class Opening(msgspec.Struct, frozen=True, tag_field="what", tag="open", kw_only=True, omit_defaults=True):
    """Connections that are opened, `opening` at a time, and then left alone for `settle` seconds.

    The first `base` are not counted. `subscribed`: all to the same topic. `patience`: for how many seconds nothing may
    happen before the run is given up.
    """

    connections: int
    base: int = 500
    opening: int = 64
    subscribed: bool = False
    settle: float = 0.5
    patience: float = 5.0
    transport: str = "tcp"

    def __str__(self) -> str:
        what = "subscribed" if self.subscribed else "idle"
        return f"{self.connections:,} connections, {what}, {self.opening:,} at a time"

    @property
    def needs(self) -> frozenset[str]:
        """What the server must be able to do, as peers state it."""
        return frozenset({self.transport} if self.subscribed else {self.transport, "unsubscribed"})

    @property
    def expected(self) -> float:
        """About how long a run takes, in seconds."""
        return EXPECTED_START + self.connections * EXPECTED_CONNECTION + 2 * self.settle

    def run(self, peer: Peer) -> Opened:
        """Measures what the connections cost a fresh server. Raises MeasureError, BuildError."""
        dialogue = peer.dialogue(0)
        if not self.subscribed:
            dialogue = dataclasses.replace(
                dialogue,
                subscribe=dialogue.hello,
                answer=dialogue.publisher_answer,
                subscriber_greetings=dialogue.publisher_greetings,
            )
        options = {name: getattr(self, name) for name in ("connections", "base", "opening", "settle", "patience")}
        return msgspec.json.decode(_run_load("open", self, peer, dialogue, options), type=Opened)


class Flushing(msgspec.Struct, frozen=True, tag_field="what", tag="flush", kw_only=True, omit_defaults=True):
    """One publish at a time to so many subscribers, which do not read meanwhile. The server has all cores.

    `threads`: so many threads are to send, 0 as many as the server takes of itself.
    """

    subscribers: int
    threads: int = 0
    payload: int = 128
    warmup: float = 0.3
    seconds: float = 1.0

    def __str__(self) -> str:
        threads = "" if not self.threads else ", 1 thread" if self.threads == 1 else f", {self.threads} threads"
        return f"{self.subscribers:,} subscribers{threads or ', all cores'}"

    @property
    def needs(self) -> frozenset[str]:
        """What the server must be able to do, as peers state it."""
        return frozenset({"tcp", "threads"} if self.threads else {"tcp"})

    @property
    def expected(self) -> float:
        """About how long a run takes, in seconds."""
        return EXPECTED_START + self.subscribers * EXPECTED_CONNECTION + self.warmup + self.seconds

    def run(self, peer: Peer) -> Flushed:
        """Measures this on a fresh server. Raises MeasureError, BuildError."""
        options = {"subscribers": self.subscribers, "warmup": self.warmup, "duration": self.seconds}
        output = _run_load("flush", self, peer, peer.dialogue(self.payload), options)
        return msgspec.json.decode(output, type=Flushed)


Load = Publishing | Opening | Flushing


def missing_ability(peer: Peer, load: Load) -> str | None:
    """What the peer lacks for this load, if anything."""
    lacking = sorted(load.needs - peer.abilities)
    return f"has no {', no '.join(LACKS[ability] for ability in lacking)}" if lacking else None


@contextmanager
def server(
    peer: Peer,
    transport: str = "tcp",
    deflate: bool = False,
    pings: bool = True,
    stalled: bool = False,
    threads: int | None = None,
) -> Iterator[tuple[int, Setting]]:
    """Runs the peer's server on its own core, or with `threads` on all cores.

    Gives its process id and where it is. Raises MeasureError, BuildError.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, tempfile.TemporaryFile() as log:
        setting = Setting(Path(folder), _free_port(), transport, deflate, pings, stalled, threads or 0)
        if transport == "tls":
            _make_certificate(setting)
        # A setting of the shell that starts the bench must not change what is measured.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WSBROKER_")}
        with _pinned(server_core()) if threads is None else nullcontext():
            process = subprocess.Popen(
                peer.command(setting),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_until_listening(process, setting)
            yield process.pid, setting
        except MeasureError as error:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
            raise MeasureError(f"{error}\nThe server said:\n{said[-2000:]}" if said else str(error)) from None
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def server_core() -> int:
    """The core for the server: the last one that this program may use."""
    return max(os.sched_getaffinity(0))


def load_core() -> int:
    """The core for the load: the first one that this program may use. The same as the server's if there is only one."""
    return min(os.sched_getaffinity(0))


def raise_open_files() -> None:
    """Lets this program and those that it starts open as many files as the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run_load(what: str, load: Load, peer: Peer, dialogue: Dialogue, options: Mapping[str, object]) -> bytes:
    transport, deflate, seconds, stalled, threads = "tcp", False, 0.0, False, None
    if isinstance(load, Publishing):
        deflate, seconds, stalled = load.deflate, load.warmup + load.seconds, load.stalled > 0
    if isinstance(load, Flushing):
        threads = load.threads
    else:
        transport = load.transport
    with server(peer, transport, deflate, seconds < PINGS_MATTER, stalled, threads) as (pid, setting):
        command = [*load_program.command(), what, f"--server={setting.address}", f"--pid={pid}", *dialogue.options()]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        if transport == "tls":
            command.append("--tls=1")
        if server_core() != load_core() and threads is None:
            command.append("--spin=1")
        with _pinned(load_core()):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, complaint = process.communicate(timeout=LOAD_TIMEOUT + seconds)
        except subprocess.TimeoutExpired:
            raise MeasureError("the load program did not end") from None
        finally:
            process.kill()
            process.communicate()
        if process.returncode != 0:
            raise MeasureError(complaint.decode(errors="replace").strip() or f"load exited with {process.returncode}")
        return output


def _check_inflated(learned: str, event: str) -> None:
    """The load program has compared the events with the first one; here that one is compared with what it should be."""
    if learned.startswith("-"):
        raise MeasureError("the server took permessage-deflate, and sends events uncompressed")
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(bytes.fromhex(learned) + b"\x00\x00\xff\xff").decode()
    except (zlib.error, ValueError) as error:
        raise MeasureError(f"the events cannot be inflated: {error}") from None
    if inflated != event.replace("%t", "00000"):
        raise MeasureError(f"the inflated events are not those that were published: {inflated[:200]}")


@contextmanager
def _pinned(core: int) -> Iterator[None]:
    """What is started meanwhile stays on this core: a child has the affinity of its parent."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _make_certificate(setting: Setting) -> None:
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=localhost"
    command = [*new.split(), "-keyout", str(setting.key), "-out", str(setting.certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        raise MeasureError("a certificate needs the program openssl; apt install openssl") from None
    except subprocess.CalledProcessError as error:
        raise MeasureError(f"openssl: {error.stderr.decode(errors='replace').strip()}") from None


def _wait_until_listening(process: subprocess.Popen[bytes], setting: Setting) -> None:
    local = setting.transport == "unix"
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MeasureError(f"the server ended with status {process.returncode} before it listened")
        with socket.socket(socket.AF_UNIX if local else socket.AF_INET) as client:
            client.settimeout(1)
            try:
                client.connect(str(setting.socket) if local else ("127.0.0.1", setting.port))
            except OSError:
                time.sleep(0.02)
            else:
                return
    raise MeasureError(f"the server did not listen within {START_TIMEOUT:.0f} s")
