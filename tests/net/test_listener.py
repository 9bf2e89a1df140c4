"""Listening sockets of every kind, with real clients."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.config import Config, parse_address
from broker.net.handshake import Handshakes
from broker.net.limiter import ACCEPTS_PER_TURN, Capacity, ConnectionLimiter
from broker.net.listener import BURST_END, CannotListenError, Listener, ServerAcceptor
from tests.net.harness import Harness, Node, harness, request, until


def nowhere(**options: Any) -> Listener:
    """A listener that is not open yet."""
    node, config = Node(), Config()
    limiter = ConnectionLimiter(config.limits, node, Capacity(10, 10))
    return Listener(Handshakes(config, node, limiter, asyncio.get_running_loop()), **options)


def acceptor(opened: Harness) -> ServerAcceptor:
    [only] = opened.listener._acceptors
    assert isinstance(only, ServerAcceptor)
    return only


async def test_listens_on_ipv4() -> None:
    async with harness("127.0.0.1:0") as opened:
        client = await opened.upgrade(request())
        host, port = client.writer.get_extra_info("sockname")
        assert str(opened.node.taken[0].peer) == f"{host}:{port}"
        assert opened.address == "{}:{}".format(*client.writer.get_extra_info("peername"))


async def test_listens_on_ipv6() -> None:
    async with harness("[::1]:0") as opened:
        client = await opened.upgrade(request())
        assert opened.address.startswith("[::1]:")
        assert str(opened.node.taken[0].peer) == f"[::1]:{client.writer.get_extra_info('sockname')[1]}"


async def test_host_name_listens_on_all_its_addresses_with_one_port() -> None:
    async with harness("localhost:0") as opened:
        assert "127.0.0.1:" in " ".join(opened.listener.addresses)
        assert len({address.rpartition(":")[2] for address in opened.listener.addresses}) == 1
        for address in opened.listener.addresses:
            await opened.upgrade(request(), address)
        assert len(opened.node.taken) == len(opened.listener.addresses)


async def test_ipv4_wildcard_leaves_the_port_free_for_ipv6() -> None:
    async with harness("0.0.0.0:0") as opened:
        port = opened.address.rpartition(":")[2]
        await opened.upgrade(request(), f"127.0.0.1:{port}")
        # The port is free for IPv6, which is another address.
        async with harness(f"[::]:{port}") as other:
            await other.upgrade(request(), f"[::1]:{port}")


async def test_listens_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with harness(f"unix:{path}") as opened:
        await opened.upgrade(request())
        assert opened.address == f"unix:{path}"
        assert str(opened.node.taken[0].peer) == "unix:"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
@pytest.mark.parametrize("with_group", [False, True])
async def test_unix_socket_has_the_configured_mode_and_group(tmp_path: Path, mode: int, with_group: bool) -> None:
    path = tmp_path / "broker.sock"
    group = max(os.getgroups() or [os.getgid()])
    listener = nowhere(unix_mode=mode, unix_group=group if with_group else None)
    await listener.open(parse_address(f"unix:{path}"))
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == mode
    assert found.st_gid == (group if with_group else os.getegid())
    listener.close()
    assert not path.exists()


async def test_group_that_cannot_be_given_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", refuse)
    path = tmp_path / "broker.sock"
    with pytest.raises(CannotListenError, match=r"group cannot be 4242 .*: operation not permitted"):
        await nowhere(unix_group=4242).open(parse_address(f"unix:{path}"))
    assert not path.exists()


@pytest.mark.parametrize("step", ["socket", "bind"])
async def test_name_is_listened_on_without_ipv6(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class WithoutIPv6(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **options: Any) -> None:
            if family == socket.AF_INET6 and step == "socket":
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *args, **options)

        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
            super().bind(address)

    async def resolve(*args: object, **options: object) -> list[Any]:
        kind = (socket.SOCK_STREAM, 6, "")
        return [(socket.AF_INET6, *kind, ("::1", 0, 0, 0)), (socket.AF_INET, *kind, ("127.0.0.1", 0))]

    monkeypatch.setattr("broker.net.listener.socket.socket", WithoutIPv6)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    listener = nowhere()
    await listener.open(parse_address("localhost:0"))
    assert [address.partition(":")[0] for address in listener.addresses] == ["127.0.0.1"]
    listener.close()


async def test_unix_socket_mode_does_not_change_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    os.umask(before)
    async with harness(f"unix:{tmp_path}/broker.sock"):
        after = os.umask(before)
        assert after == before


async def test_loopback_origins_are_allowed_on_loopback_only(tmp_path: Path) -> None:
    page = request("GET / HTTP/1.1", "Origin: http://localhost:5173", host="localhost")
    for listen in ("127.0.0.1:0", "127.9.9.9:0", "[::1]:0"):
        async with harness(listen) as opened:
            await opened.upgrade(page)
    async with harness("0.0.0.0:0") as opened:
        client = await opened.connect(f"127.0.0.1:{opened.address.rpartition(':')[2]}")
        client.send(page)
        assert (await client.reply()).status == 403
    # Behind a Unix socket stands a proxy, and before that the world.
    async with harness(f"unix:{tmp_path}/broker.sock") as opened:
        assert (await opened.ask(page)).status == 403


# In the way


async def test_address_in_use_is_reported() -> None:
    async with harness() as opened:
        with pytest.raises(CannotListenError, match=rf"^cannot listen on {opened.address}: the address is in use$"):
            await nowhere().open(parse_address(opened.address))
        await opened.upgrade(request())


async def test_address_of_another_machine_is_reported() -> None:
    with pytest.raises(
        CannotListenError, match=r"^cannot listen on 192\.0\.2\.1:8765: cannot assign requested address$"
    ):
        await nowhere().open(parse_address("192.0.2.1:8765"))


async def test_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    async with harness(f"unix:{path}") as opened:
        await opened.upgrade(request())
    assert not path.exists()


async def test_a_unix_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with harness(f"unix:{path}") as opened:
        second = nowhere()
        with pytest.raises(CannotListenError, match=r"broker\.sock: the address is in use"):
            await second.open(parse_address(f"unix:{path}"))
        second.close()
        await opened.upgrade(request())


async def test_a_unix_socket_whose_owner_is_busy_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        with pytest.raises(CannotListenError, match="the address is in use"):
            await nowhere().open(parse_address(f"unix:{path}"))
        assert path.exists()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(CannotListenError, match="no socket"):
        await nowhere().open(parse_address(f"unix:{path}"))
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(CannotListenError, match="no socket"):
        await nowhere().open(parse_address(f"unix:{link}"))
    assert path.read_text() == "precious"


async def test_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CannotListenError, match=r"nothing/broker\.sock: no such file or directory"):
        await nowhere().open(parse_address(f"unix:{tmp_path}/nothing/broker.sock"))


async def test_unix_socket_of_another_broker_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with harness(f"unix:{path}"):
        path.rename(tmp_path / "moved")
        path.write_text("another's")
    assert path.exists()


# The end


async def test_unix_socket_that_cannot_be_removed_does_not_stop_the_shutdown(tmp_path: Path) -> None:
    path = tmp_path / "own" / "ws.sock"
    path.parent.mkdir()
    user = os.geteuid()
    async with harness(f"unix:{path}") as opened:
        path.parent.chmod(0o555)
        if user == 0:  # root may remove it
            os.seteuid(65_534)
        try:
            with capture_logs() as logs:
                opened.listener.close()
        finally:
            os.seteuid(user)
            path.parent.chmod(0o755)
        assert [entry["event"] for entry in logs] == ["cannot remove Unix socket"]
        assert path.exists()


async def test_closed_listener_accepts_nobody_and_keeps_connections() -> None:
    async with harness() as opened:
        established = await opened.upgrade(request())
        opened.listener.close()
        opened.listener.close()
        with pytest.raises(ConnectionRefusedError):
            await opened.connect()
        established.send(b"still here")
        await asyncio.wait_for(opened.node.heard.wait(), 10)
        assert opened.node.established[0].received == b"still here"


async def test_address_can_be_reused_at_once() -> None:
    async with harness() as opened:
        address = opened.address
        await opened.upgrade(request())
    async with harness(address) as opened:
        await opened.upgrade(request())


# What is set on each socket


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
async def test_accepted_sockets_inherit_notsent_lowat(listen: str) -> None:
    async with harness(listen) as opened:
        await opened.upgrade(request())
        sock = opened.node.established[0].transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(sock.fileno())) as same:
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16_384
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


# Bursts


async def accepted_in_a_turn(opened: Harness, total: int) -> list[int]:
    """How many of `total` pending connections were accepted in each turn of the loop."""
    before = opened.limiter.connections
    there = parse_address(opened.address)
    waiting = []
    for _ in range(total):
        sock = socket.socket(socket.AF_UNIX) if there.path else socket.socket()
        sock.connect(there.path or (there.host, there.port))
        waiting.append(sock)
    counts = [before]
    while counts[-1] < before + total:
        await asyncio.sleep(0)
        counts.append(opened.limiter.connections)
    for sock in waiting:
        sock.close()
    await until(lambda: opened.limiter.connections == before)
    return [after - before for before, after in itertools.pairwise(counts)]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_burst_of_connections_opens_acceptors_and_closes_them_after(kind: str, tmp_path: Path) -> None:
    async with harness("127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/broker.sock") as opened:
        assert len(acceptor(opened)._servers) == 1
        assert max(await accepted_in_a_turn(opened, 100)) == ACCEPTS_PER_TURN
        assert len(acceptor(opened)._servers) == ACCEPTS_PER_TURN
        for _ in range(BURST_END):
            client = await opened.connect()
            await until(lambda: opened.limiter.connections == 1)
            await client.close()
            await until(lambda: opened.limiter.connections == 0)
        assert len(acceptor(opened)._servers) == 1
        await opened.upgrade(request())
        assert max(await accepted_in_a_turn(opened, 100)) == ACCEPTS_PER_TURN


async def test_few_connections_open_no_more_acceptors() -> None:
    async with harness() as opened:
        for _ in range(10):
            await accepted_in_a_turn(opened, 3)
        assert len(acceptor(opened)._servers) == 1


async def test_close_closes_all_acceptors() -> None:
    async with harness() as opened:
        await accepted_in_a_turn(opened, 100)
        opened.listener.close()
        with pytest.raises(ConnectionRefusedError):
            await opened.connect()


async def test_listener_can_be_closed_during_a_burst() -> None:
    async with harness() as opened:
        there = parse_address(opened.address)
        waiting = [socket.create_connection((there.host, there.port)) for _ in range(20)]
        await until(lambda: opened.limiter.connections > 3)
        opened.listener.close()
        for sock in waiting:
            sock.close()
        with pytest.raises(ConnectionRefusedError):
            await opened.connect()


async def test_hundreds_of_connections_at_once_are_accepted() -> None:
    async with harness(capacity=Capacity(300, 100)) as opened:
        clients = await asyncio.gather(*(opened.upgrade(request()) for _ in range(300)))
        assert opened.node.connections == 300
        assert opened.limiter.connections == 300
        for client in clients:
            await client.close()
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.refused == {}
