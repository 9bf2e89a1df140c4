"""Starts a server on one core and the load program on another, and takes the measurements in turn.

A server is fresh for every run, so that no run inherits what an earlier one left behind. The peers take turns within a
load (A B A B), so that whatever else happens on the machine meets all of them.
"""

import dataclasses
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

from bench.peers import Dialogue, Peer
from broker.client import load as load_program

ROOT = Path(__file__).parent.parent
START_TIMEOUT = 15.0
STOP_TIMEOUT = 15.0
# A run of the load ends by itself: it gives up when nothing happens for five seconds.
LOAD_TIMEOUT = 300.0
# Above this much CPU used by other programs, of one core, a run is called disturbed.
DISTURBED = 0.1


class MeasureError(Exception):
    """A run failed: the server did not start, or the load program gave up. The text says why."""


class Latency(msgspec.Struct, frozen=True):
    """Percentiles in microseconds."""

    p50: float
    p90: float
    p99: float
    p999: float = msgspec.field(name="p99.9")
    max: float


class Published(msgspec.Struct, frozen=True):
    """What one run of `load publish` measured. CPU shares are of one core; `other_cpu` is everybody else's.

    The totals are those of the whole run, with warm-up and end; everything else is of the measured time.
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


Result = TypeVar("Result", bound=Published | Opened)
Result_co = TypeVar("Result_co", bound=Published | Opened, covariant=True)


class Load(Protocol[Result_co]):
    """Something to do to a server, and to measure."""

    def run(self, peer: Peer) -> Result_co:
        """Does it to a fresh server. Raises MeasureError, BuildError."""


@dataclass(frozen=True)
class Publishing:
    """So many subscribers spread over the topics, so many publishes under way; `payload` in bytes, times in seconds."""

    subscribers: int
    window: int
    topics: int = 1
    payload: int = 128
    seconds: float = 1.0
    warmup: float = 0.3

    def __str__(self) -> str:
        return f"subscribers {self.subscribers}, topics {self.topics}, window {self.window}"

    def run(self, peer: Peer) -> Published:
        """Measures this load on a fresh server. Raises MeasureError, BuildError."""
        options = {
            "subscribers": self.subscribers,
            "topics": self.topics,
            "window": self.window,
            "warmup": self.warmup,
            "duration": self.seconds,
        }
        return msgspec.json.decode(_run_load("publish", peer, peer.dialogue(self.payload), options), type=Published)


@dataclass(frozen=True)
class Opening:
    """Connections that are opened and then left alone for `settle` seconds; `subscribed`: all to the same topic."""

    connections: int
    base: int = 500
    subscribed: bool = False
    settle: float = 1.0

    def __str__(self) -> str:
        return f"{self.connections:,} connections{', subscribed' if self.subscribed else ''}"

    def run(self, peer: Peer) -> Opened:
        """Measures what the connections cost a fresh server. Raises MeasureError, BuildError."""
        dialogue = peer.dialogue(0)
        if not self.subscribed:
            greetings = dialogue.publisher_greetings
            dialogue = dataclasses.replace(dialogue, subscribe="", answer="", subscriber_greetings=greetings)
        options = {"connections": self.connections, "base": self.base, "settle": self.settle}
        return msgspec.json.decode(_run_load("open", peer, dialogue, options), type=Opened)


@dataclass(frozen=True)
class Run(Generic[Result]):
    """One measurement, and what it is one of."""

    peer: Peer
    load: Load[Result]
    result: Result


def take_turns(loads: Sequence[Load[Result]], peers: Sequence[Peer], repeat: int, retries: int) -> list[Run[Result]]:
    """Measures each load so many times, the peers in turn. Raises MeasureError, BuildError.

    A run that other programs disturbed is done again, up to `retries` times; the one that was disturbed least counts.
    """
    runs: list[Run[Result]] = []
    steps = [(load, peer) for load in loads for _ in range(repeat) for peer in peers]
    for number, (load, peer) in enumerate(steps, 1):
        _show_progress(f"{number}/{len(steps)} {peer.name} {load}")
        try:
            result = load.run(peer)
            for _ in range(retries):
                if result.other_cpu <= DISTURBED:
                    break
                result = min(result, load.run(peer), key=lambda either: either.other_cpu)
            runs.append(Run(peer, load, result))
        except MeasureError as error:
            raise MeasureError(f"{peer.name}, {load}: {error}") from None
        finally:
            _show_progress("")
    return runs


@contextmanager
def server(peer: Peer) -> Iterator[tuple[int, int]]:
    """Runs the peer's server on its own core; gives its process id and its port. Raises MeasureError, BuildError."""
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        with _pinned(server_core()):
            process = subprocess.Popen(
                peer.command(port), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            _wait_until_listening(process, port)
            yield process.pid, port
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


def _run_load(what: str, peer: Peer, dialogue: Dialogue, options: Mapping[str, object]) -> bytes:
    # The fields of a Dialogue are options of the load program.
    arguments = {name.replace("_", "-"): value for name, value in dataclasses.asdict(dialogue).items()} | dict(options)
    with server(peer) as (pid, port):
        command = [*load_program.command(), what, f"--server=127.0.0.1:{port}", f"--pid={pid}"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        if server_core() != load_core():
            command.append("--spin=1")
        with _pinned(load_core()):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, complaint = process.communicate(timeout=LOAD_TIMEOUT)
        finally:
            process.kill()
        if process.returncode != 0:
            raise MeasureError(complaint.decode(errors="replace").strip() or f"load exited with {process.returncode}")
        return output


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


def _wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MeasureError(f"the server ended with status {process.returncode} before it listened")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise MeasureError(f"the server did not listen within {START_TIMEOUT:.0f} s")


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
