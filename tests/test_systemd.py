"""What the broker and systemd tell each other, with a test in systemd's place, and with its own programs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed

from broker.systemd import Systemd, status
from tests.fixtures_command import wsbroker
from tests.fixtures_daemon import TIMEOUT, Daemon, launched
from tests.net.harness import request, until

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.needs("systemd")


class Manager:
    """The datagram socket on which a service says how it goes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[dict[str, str]] = []
        self.last = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    async def next(self) -> dict[str, str]:
        """The next message, by the names of its fields."""
        loop = asyncio.get_running_loop()
        data = await asyncio.wait_for(loop.sock_recv(self._socket, 65536), TIMEOUT)
        message = dict(line.split("=", 1) for line in data.decode().splitlines())
        self.said.append(message)
        return message

    async def until(self, *fields: str) -> dict[str, str]:
        """The next message that has these fields."""
        while not set(fields) <= set(message := await self.next()):
            pass
        return message

    def waiting(self) -> int:
        """Take what has come, and say how many messages there were."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.last = self._socket.recv(65536)
                count += 1
        return count

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    kind = getattr(request, "param", "path")
    found = Manager(str(tmp_path / "notify") if kind == "path" else f"@wsbroker-test-{os.getpid()}")
    yield found
    found.close()


# How it goes


def test_no_notification_without_systemd() -> None:
    systemd = Systemd({})
    systemd.notify("READY=1")
    assert (systemd.is_notified, systemd.watchdog, systemd.sockets) == (False, 0.0, [])
    systemd.close()


def test_systemd_variables_are_removed_from_the_environment(tmp_path: Path) -> None:
    environ = {
        "NOTIFY_SOCKET": str(tmp_path / "none"),
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_PID": str(os.getpid() + 1),
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "ws",
        "PATH": "/bin",
    }
    systemd = Systemd(environ)
    assert environ == {"PATH": "/bin"}
    assert systemd.watchdog == 3.0
    assert systemd.sockets == []  # they are another process's
    systemd.notify("READY=1")  # nobody takes it, and that is no error
    systemd.close()
    assert not systemd.is_notified


@pytest.mark.parametrize("message", ["READY=1", "STOPPING=1"])
def test_ready_and_stopping_wait_for_a_full_socket(manager: Manager, message: str) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": manager.address})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
        other.setblocking(False)
        while True:
            other.sendto(b"STATUS=", manager.address)
    systemd.notify("STATUS=none")  # the socket is full, and this message may be dropped
    telling = threading.Thread(target=systemd.notify, args=(message, "STATUS=there"))
    telling.start()
    assert telling.is_alive()
    found = manager.waiting()
    telling.join()
    assert found + manager.waiting() > 1
    assert manager.last == f"{message}\nSTATUS=there".encode()
    systemd.close()


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative/path", "/none/there"])
def test_notification_failure_is_logged_once(address: str) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": address})
    with capture_logs() as logs:
        for _ in range(3):
            systemd.notify("READY=1")
    assert [entry["socket"] for entry in logs] == [address]
    systemd.close()


def test_watchdog_for_another_pid_is_ignored() -> None:
    assert Systemd({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog == 0.0


def test_a_status_is_one_line() -> None:
    assert status("a\nb") == "STATUS=a b"


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
async def test_systemd_is_notified_from_start_to_stop(manager: Manager, tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\nreconnect_spread = 1\n'
    told = {"NOTIFY_SOCKET": manager.address}
    async with launched(folder=tmp_path, config=config, environ=told) as daemon:
        ready = await manager.next()
        assert ready == {"READY": "1", "STATUS": "serving: 0 connections, 0 subscriptions, 0 events queued"}
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            # A reload, and then one of a file that is broken.
            daemon.signal(signal.SIGHUP)
            began = await manager.next()
            assert list(began) == ["RELOADING", "MONOTONIC_USEC"]
            assert int(began["MONOTONIC_USEC"]) > 0
            assert (await manager.next())["READY"] == "1"
            daemon.configure("[limits]\nmax_sise = 1")
            daemon.signal(signal.SIGHUP)
            again = await manager.next()
            assert int(again["MONOTONIC_USEC"]) > int(began["MONOTONIC_USEC"])
            back = await manager.next()
            assert back["READY"] == "1"
            assert "1 connections" in back["STATUS"]
            assert "reload failed: limits.max_sise" in back["STATUS"]
            daemon.configure(config + "max_queue = 3")
            daemon.signal(signal.SIGHUP)
            await manager.next()
            assert "not read" not in (await manager.next())["STATUS"]
            # A client that does not go.
            client.transport.pause_reading()
            daemon.signal(signal.SIGTERM)
            stopping = await manager.next()
            assert stopping["STOPPING"] == "1"
            assert int(stopping["EXTEND_TIMEOUT_USEC"]) == 10_000_000
            progress = await manager.next()
            assert progress["STATUS"].startswith("draining: 1 connections")
            assert progress["EXTEND_TIMEOUT_USEC"] == "10000000"
            client.transport.resume_reading()
            assert (await manager.until("STATUS"))["STATUS"] == "stopped"
        assert await daemon.ended() == 0
        assert all("WATCHDOG" not in message for message in manager.said)


async def test_watchdog_is_fed_from_the_loop_only(manager: Manager, tmp_path: Path) -> None:
    told = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000"}
    async with launched("--listen", "127.0.0.1:0", environ=told) as daemon:
        for _ in range(5):
            await manager.until("WATCHDOG")
        daemon.signal(signal.SIGSTOP)
        await until(lambda: " T " in Path(f"/proc/{daemon.process.pid}/stat").read_text())
        manager.waiting()
        await asyncio.sleep(0.3)  # three times what the watchdog allows
        assert manager.waiting() == 0
        daemon.signal(signal.SIGCONT)
        await manager.until("WATCHDOG")
        daemon.signal(signal.SIGTERM)
        await manager.until("STOPPING")
        assert await daemon.ended() == 0


# Signals at odd moments

PLANTED = """
import os, signal, sys
from broker.engines.memory import MemoryEngine
from broker.node import Node

BODY
from broker.cli import main
sys.exit(main(["serve", "--listen", "127.0.0.1:0"]))
"""

SIGNALLED = """
start = MemoryEngine.start

async def signalled(self, *more):
    import asyncio
    for name in ("SIGHUP", "SIGUSR2", "SIGHUP"):
        os.kill(os.getpid(), getattr(signal, name))
    for _ in range(5):
        await asyncio.sleep(0.001)
    await start(self, *more)

MemoryEngine.start = signalled
"""

FAULTY = """
reconfigure = Node.reconfigure

def faulty(self, config, *more):
    if hasattr(self, "metrics"):  # not at the start
        raise LookupError("planted")
    reconfigure(self, config, *more)

Node.reconfigure = faulty
"""


@asynccontextmanager
async def planted(body: str, manager: Manager, **environment: str) -> AsyncIterator[Daemon]:
    """A broker with something in it that does not belong there."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PLANTED.replace("BODY", body)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NOTIFY_SOCKET": manager.address, **environment},
    )
    try:
        yield Daemon(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_signals_during_the_start_are_deferred(manager: Manager) -> None:
    async with planted(SIGNALLED, manager) as daemon:
        assert (await manager.next())["STATUS"].startswith("serving")
        assert "RELOADING" in await manager.next()
        assert (await manager.next())["READY"] == "1"
        assert (await manager.next())["STATUS"].startswith("retiring")
        assert (await manager.next())["STATUS"].startswith("retired")
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert daemon.said.index("ready ") < daemon.said.index("reloaded") < daemon.said.index("retiring")
        assert daemon.said.count("reloaded") == 1


async def test_failing_reload_still_notifies_systemd(manager: Manager) -> None:
    async with planted(FAULTY, manager) as daemon:
        await manager.until("READY")
        daemon.signal(signal.SIGHUP)
        assert "RELOADING" in await manager.next()
        ready = await manager.next()
        assert ready["READY"] == "1"
        assert "reload failed: internal error" in ready["STATUS"]
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "reload failed" in daemon.said
        assert "LookupError: planted" in daemon.said


async def test_reload_is_refused_during_a_shutdown(manager: Manager, tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched(folder=tmp_path, config=config, environ={"NOTIFY_SOCKET": manager.address}) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            client.transport.pause_reading()
            daemon.signal(signal.SIGTERM)
            await daemon.until("draining")
            daemon.configure(config + "[limits]\ndrain_timeout = 0\n")
            daemon.signal(signal.SIGHUP)
            assert "problem='the broker is shutting down'" in await daemon.until("reload failed")
            client.transport.resume_reading()
            assert (await manager.until("STATUS", "STOPPING"))["STOPPING"] == "1"
            while (message := await manager.next()).get("STATUS") != "stopped":
                assert not message.keys() & {"RELOADING", "READY"}
            assert await daemon.ended() == 0


async def test_retiring_is_in_status_and_log(manager: Manager, tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\ndrain_timeout = 1.5\n'
    async with launched(folder=tmp_path, config=config, environ={"NOTIFY_SOCKET": manager.address}) as daemon:
        await daemon.started()
        await manager.until("READY")
        async with connect(daemon.url) as client:
            await client.recv()
            client.transport.pause_reading()
            daemon.signal(signal.SIGUSR2)
            assert (await manager.next())["STATUS"].startswith("retiring: 1 connections")
            assert await manager.next() == {"STATUS": "retiring: 1 connections, 0 subscriptions, 0 events queued"}
            # It does not go, and is cut off.
            assert (await manager.next())["STATUS"].startswith("retired: 0 connections")
            client.transport.abort()
        assert "seconds=1.5" in await daemon.until("retiring")
        assert "connections=1" in await daemon.until("retiring")
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


IMPATIENT = """
import broker.daemon
broker.daemon.PROGRESS_EVERY = 0.05
stop = Node.stop

async def slow(self):
    import time
    time.sleep(1)
    await stop(self)

Node.stop = slow
"""


async def test_drain_feeds_the_watchdog_and_extends_the_timeout_until_the_loop_blocks(
    manager: Manager,
) -> None:
    async with planted(IMPATIENT, manager, WATCHDOG_USEC="100000") as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            client.transport.pause_reading()
            daemon.signal(signal.SIGTERM)
            await manager.until("STOPPING")
            for _ in range(4):
                assert (await manager.until("EXTEND_TIMEOUT_USEC"))["EXTEND_TIMEOUT_USEC"] == "10000000"
                await manager.until("WATCHDOG")
            client.transport.resume_reading()
            loop = asyncio.get_running_loop()
            last = loop.time()
            while (message := await manager.next()).get("STATUS") != "stopped":
                if "WATCHDOG" in message:
                    last = loop.time()
            assert loop.time() - last > 0.5  # 0.05 is what it should be
        assert await daemon.ended() == 0


STUCK = """
import sys, time, threading
from broker.engines.memory import MemoryEngine

publish = MemoryEngine.publish

def stuck(self, event, retention, done):
    if event.topic == "stuck":
        time.sleep(1)
    return publish(self, event, retention, done)

MemoryEngine.publish = stuck
from broker.cli import main
sys.exit(main(["serve", "--listen", sys.argv[1]]))
"""


async def test_blocking_call_starves_the_watchdog(tmp_path: Path) -> None:
    manager, path = Manager(str(tmp_path / "notify")), tmp_path / "ws.sock"
    environ = {**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    command = (sys.executable, "-c", STUCK, f"unix:{path}")
    process = await asyncio.create_subprocess_exec(*command, env=environ, stderr=asyncio.subprocess.DEVNULL)
    try:
        await manager.until("READY")
        loop = asyncio.get_running_loop()
        async with unix_connect(str(path)) as client:
            await client.recv()
            await manager.until("WATCHDOG")
            await client.send('{"op":"publish","id":1,"topic":"stuck","data":1}')
            longest, last = 0.0, loop.time()
            answer = asyncio.create_task(client.recv())
            while not answer.done():
                await manager.until("WATCHDOG")
                longest, last = max(longest, loop.time() - last), loop.time()
            assert longest > 0.5  # 0.1 is what it should be
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), TIMEOUT) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        manager.close()


HANGING = """
import broker.health
broker.health.HANGS_AFTER = 0.3

def hanging(self, event, retention, done):
    import time
    time.sleep(3600)

MemoryEngine.publish = hanging
"""


async def test_hanging_broker_logs_the_place_before_it_is_killed(manager: Manager) -> None:
    async with planted(HANGING, manager) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.send('{"op":"publish","topic":"secret-topic","data":"secret-payload"}')
            assert "where='hanging (<string>:" in await daemon.until("event loop hangs")
            daemon.signal(signal.SIGABRT)  # what systemd's watchdog sends
            assert await daemon.ended() == -signal.SIGABRT
            client.transport.abort()
        assert "in hanging" in daemon.said
        assert "secret" not in daemon.said


# Sockets that are passed


PASS = """
import fcntl, os, sys
numbers, arguments = sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]
passed = []
for number in map(int, numbers):
    passed.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3 + len(numbers)))
    os.close(number)
for number, descriptor in enumerate(passed, 3):
    os.dup2(descriptor, number)
# It must be the process's own, which nobody knows before it is there.
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "broker", "serve", *arguments])
"""


@asynccontextmanager
async def activated(
    sockets: Sequence[socket.socket | IO[str]], *arguments: str, names: str = "", **environment: str
) -> AsyncIterator[Daemon]:
    """A broker that was passed these, as systemd passes them."""

    # By a program between, and not by a function that runs in the child before it: there, whatever number is put to use
    # may be one that the spawning itself needs.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", PASS, *(str(sock.fileno()) for sock in sockets), "--", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=[sock.fileno() for sock in sockets],
        env={
            **os.environ,
            "PYTHONWARNINGS": "error",
            "LISTEN_FDS": str(len(sockets)),
            "LISTEN_FDNAMES": names,
            **environment,
        },
    )
    try:
        yield Daemon(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def bound(address: str | tuple[str, int] = ("127.0.0.1", 0)) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.bind(address)
    sock.listen(100)
    return sock


async def test_broker_serves_on_passed_sockets(tmp_path: Path) -> None:
    path = tmp_path / "ws.sock"
    with bound() as tcp, bound(str(path)) as unix:
        async with activated([tcp, unix], "--listen", "systemd", names="ws:local") as daemon:
            await daemon.started()
            assert daemon.addresses == [f"127.0.0.1:{tcp.getsockname()[1]}", f"unix:{path}"]
            for opened in (connect(daemon.url), unix_connect(str(path))):
                async with opened as client:
                    assert json.loads(await client.recv())["op"] == "welcome"
            daemon.signal(signal.SIGTERM)
            assert await daemon.ended() == 0
            assert "Traceback" not in daemon.said
        assert path.exists()  # it is systemd's


async def test_missing_passed_sockets_are_reported(tmp_path: Path) -> None:
    async with launched("--listen", "systemd") as daemon:
        assert await daemon.ended() == 1
        assert daemon.said == "wsbroker: cannot listen on systemd: it has passed no sockets\n"


async def test_unused_passed_sockets_are_logged() -> None:
    with bound() as tcp:
        async with activated([tcp], "--listen", "127.0.0.1:0") as daemon:
            await daemon.until("does not name systemd")


async def test_unused_passed_admin_socket_is_logged() -> None:
    with bound() as ws, bound() as admin:
        async with activated([ws, admin], "--listen", "systemd", names="ws:admin") as daemon:
            await daemon.until("server.admin is not systemd")


@pytest.mark.parametrize("names", ["", "ws", "ws:two:three:four"])
async def test_socket_names_of_the_wrong_count_are_handled(names: str) -> None:
    with bound() as one, bound() as two:
        async with activated([one, two], "--listen", "systemd", names=names) as daemon:
            await daemon.started()
            assert daemon.addresses == [f"127.0.0.1:{sock.getsockname()[1]}" for sock in (one, two)]


async def test_passed_descriptor_that_is_no_socket_is_refused() -> None:
    source, sink = os.pipe()
    with os.fdopen(source) as fifo, os.fdopen(sink, "w"), bound() as tcp:
        async with activated([tcp, fifo], "--listen", "systemd", names="ws:fifo") as daemon:
            assert await daemon.ended() == 78
            assert daemon.said == "wsbroker: systemd: what it has passed as `fifo` is no socket\n"


async def test_fewer_sockets_than_announced_are_refused() -> None:
    with bound() as tcp:
        async with activated([tcp], "--listen", "systemd", LISTEN_FDS="3") as daemon:
            assert await daemon.ended() == 78
            assert daemon.said == "wsbroker: systemd: has announced 3 sockets, and passed 1\n"


async def test_socket_of_an_unsupported_family_is_refused() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        async with activated([netlink], "--listen", "systemd", WSBROKER_SERVER__ANONYMOUS="true") as daemon:
            assert await daemon.ended() == 1
            assert "AF_NETLINK is not served" in daemon.said
        async with activated([netlink], "--listen", "systemd") as daemon:
            assert await daemon.ended() == 78
            assert "the socket AF_NETLINK:0 of systemd can be reached from other machines" in daemon.said


async def test_abstract_unix_socket_is_logged_with_an_at_sign() -> None:
    name = f"wsbroker-test-{os.getpid()}-ws"
    with bound(f"\0{name}") as abstract:
        async with activated([abstract], "--listen", "systemd") as daemon:
            await daemon.started()
            assert daemon.addresses == [f"unix:@{name}"]
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(f"\0{name}")
            async with connect("ws://localhost/", sock=sock, proxy=None) as client:
                assert json.loads(await client.recv())["op"] == "welcome"


async def test_a_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        async with activated([datagrams], "--listen", "systemd", names="ws") as daemon:
            assert await daemon.ended() == 1
            assert "the socket `ws` of systemd: it is not one that listens" in daemon.said


async def test_public_passed_socket_needs_anonymous_true() -> None:
    with bound(("0.0.0.0", 0)) as anywhere:
        async with activated([anywhere], "--listen", "systemd") as daemon:
            assert await daemon.ended() == 78
            assert "the socket 0.0.0.0:" in daemon.said
        async with activated([anywhere], "--listen", "systemd", WSBROKER_SERVER__ANONYMOUS="true") as daemon:
            await daemon.started()


async def test_restart_refuses_no_connection() -> None:
    with bound() as tcp:
        url = f"ws://127.0.0.1:{tcp.getsockname()[1]}/"
        welcomed = 0

        async def come_and_come_back() -> None:
            nonlocal welcomed
            for _ in range(2):
                # Refused in TCP or in HTTP, this would raise.
                async with connect(url, proxy=None, open_timeout=TIMEOUT) as client:
                    assert json.loads(await client.recv())["op"] == "welcome"
                    welcomed += 1
                    with contextlib.suppress(ConnectionClosed):
                        while True:
                            await client.recv()

        async with activated([tcp], "--listen", "systemd") as first:
            await first.started()
            clients = [asyncio.create_task(come_and_come_back()) for _ in range(50)]
            await until(lambda: welcomed == 50)
            first.signal(signal.SIGTERM)
            assert await first.ended() == 0
        # Nobody is there now: who comes waits.
        clients.append(asyncio.create_task(come_and_come_back()))
        async with activated([tcp], "--listen", "systemd") as second:
            await second.started()
            await until(lambda: welcomed == 101)
            second.signal(signal.SIGTERM)
            assert await second.ended() == 0
        async with activated([tcp], "--listen", "systemd") as third:
            await until(lambda: welcomed == 102)
            third.signal(signal.SIGTERM)
            assert await third.ended() == 0
        await asyncio.wait_for(asyncio.gather(*clients), TIMEOUT)


async def test_pending_connections_survive_a_restart() -> None:
    """Clients that reconnect while a second restart is ordered: its connections are in every state there is."""
    with bound() as tcp:
        url = f"ws://127.0.0.1:{tcp.getsockname()[1]}/"
        welcomed = 0

        async def come() -> None:
            nonlocal welcomed
            # Refused in TCP or in HTTP, or cut off, this would raise.
            async with connect(url, proxy=None, open_timeout=TIMEOUT) as client:
                assert json.loads(await client.recv())["op"] == "welcome"
                welcomed += 1
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await client.recv()

        # Their requests lie in the sockets already, or come a little later.
        raw = [socket.create_connection(tcp.getsockname()) for _ in range(100)]
        for sock in raw[:50]:
            sock.sendall(request(host="x"))
        clients = [asyncio.create_task(come()) for _ in range(100)]
        # The raw ones do not answer a close.
        soon = {"WSBROKER_LIMITS__CLOSE_TIMEOUT": "0.2"}
        async with activated([tcp], "--listen", "systemd", **soon) as first:
            await first.started()
            await until(lambda: welcomed >= 20)
            first.signal(signal.SIGTERM)
            for sock in raw[50:]:
                sock.sendall(request(host="x"))
            assert await first.ended() == 0
        async with activated([tcp], "--listen", "systemd") as second:
            await second.started()
            loop = asyncio.get_running_loop()
            for sock in raw:
                sock.setblocking(False)
                head = b""
                while b"welcome" not in head:
                    more = await asyncio.wait_for(loop.sock_recv(sock, 65536), TIMEOUT)
                    assert more, f"ended after {head!r}"
                    head += more
                assert head.startswith(b"HTTP/1.1 101 ")
                sock.close()
            await until(lambda: welcomed == 100)
            second.signal(signal.SIGTERM)
            assert await second.ended() == 0
        await asyncio.wait_for(asyncio.gather(*clients), TIMEOUT)


async def test_systemd_socket_activate_starts_the_broker_with_two_named_sockets(tmp_path: Path) -> None:
    path = tmp_path / "local.sock"
    with bound() as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *("systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-l", str(path), "--fdname=ws:local"),
        *(sys.executable, "-m", "broker", "serve", "--listen", "systemd", "--log-level", "debug"),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    daemon = Daemon(process)
    try:
        await daemon.until("Listening on")
        await until(path.exists)
        # The first one starts it.
        clients: list[ClientConnection] = []
        async with asyncio.timeout(TIMEOUT):
            while not clients:
                with contextlib.suppress(ConnectionRefusedError):
                    clients.append(await connect(f"ws://127.0.0.1:{port}/", proxy=None))
        clients.append(await unix_connect(str(path)))
        for client in clients:
            assert json.loads(await client.recv())["op"] == "welcome"
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert f"address='127.0.0.1:{port}'" in daemon.said
        assert f"address='unix:{path}'" in daemon.said
        for client in clients:
            await client.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# The shipped service


async def test_shipped_service_takes_nobody_without_a_token(tmp_path: Path) -> None:
    text = (ROOT / "systemd" / "wsbroker.service").read_text()
    environ = dict(re.findall(r"^Environment=(WSBROKER_\w+)=(.*)$", text, re.MULTILINE))
    (tmp_path / "secret").write_text("s3cret" * 10)
    config = (ROOT / "systemd" / "wsbroker.toml").read_text().replace("/etc/wsbroker/secret", f"{tmp_path}/secret")
    path = tmp_path / "ws.sock"
    async with launched(
        "--listen", f"unix:{path}", "--admin", "", config=config, folder=tmp_path, environ=environ
    ) as it:
        await it.started()
        made = await wsbroker("token", "make", "--identity", "me", "--role", "user", "--config", str(it.file))
        for token, expected in ((None, "unauthorized"), (made.out.strip(), "forbidden")):
            more = {} if token is None else {"Authorization": f"Bearer {token}"}
            async with unix_connect(str(path), "ws://localhost/", additional_headers=more, proxy=None) as client:
                assert ("identity" in json.loads(await client.recv())) == (token is not None)
                await client.send('{"op":"publish","id":1,"topic":"public.a","data":1}')
                assert json.loads(await client.recv())["code"] == expected
    # Without its settings it does not start, rather than serve everybody.
    (tmp_path / "empty.toml").write_text("")
    refused = await wsbroker("serve", "--listen", f"unix:{path}", "--config", f"{tmp_path}/empty.toml", environ=environ)
    assert refused.status == 78
    assert "nobody could connect" in refused.err
