"""The admin listener of a real broker: it answers, whatever state the broker is in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from broker.admin import server
from broker.admin.server import SPARE_FDS
from broker.auth.api_keys import hash_key, make_key
from broker.config import Config, parse_address
from broker.engines.memory import MemoryEngine
from broker.node import Node
from tests.fixtures_daemon import TIMEOUT, launched
from tests.net.harness import until
from tests.test_systemd import activated, bound

LOOPBACK = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


class Reply(NamedTuple):
    """An answer of the admin listener."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def get(address: str, path: str, method: str = "GET", **headers: str) -> Reply:
    """Ask once, on a connection of its own."""
    there = parse_address(address)
    if there.path:
        reader, writer = await asyncio.open_unix_connection(there.path)
    else:
        reader, writer = await asyncio.open_connection(there.host, there.port)
    headers = {"Host": "localhost", "Connection": "close", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head, _, body = (await asyncio.wait_for(reader.read(), TIMEOUT)).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    status, *found = head.split("\r\n")
    return Reply(int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in found)}, body)


async def test_health_and_metrics_are_served() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        live = await get(daemon.admin, "/livez")
        assert (live.status, live.json) == (200, {"status": "alive"})
        ready = await get(daemon.admin, "/readyz")
        assert (ready.status, ready.json) == (200, {"status": "ready"})
        assert ready.headers["cache-control"] == "no-store"
        assert ready.headers["server"] == "wsbroker"
        metrics = await get(daemon.admin, "/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "\nwsbroker_connections 0.0\n" in metrics.body
        modern = await get(daemon.admin, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert modern.headers["content-type"].startswith("application/openmetrics-text")
        assert modern.body.endswith("# EOF\n")
        assert (await get(daemon.admin, "/")).status == 404
        assert (await get(daemon.admin, "/readyz", "POST")).status == 405
        assert (await get(daemon.admin, "/livez", "HEAD")).body == ""
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


@pytest.mark.parametrize("name", ["localhost:8766", "127.0.0.1", "[::1]:8766", "broker.localhost"])
async def test_sessions_are_served_under_loopback_names(name: str) -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        assert (await get(daemon.admin, "/v1/sessions", Host=name)).status == 200


@pytest.mark.parametrize("name", ["evil.example:8766", "10.0.0.1", "[2001:db8::1]", ""])
async def test_sessions_are_refused_under_other_names(name: str) -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        assert (await get(daemon.admin, "/v1/sessions", Host=name)).status in (400, 421)
        assert (await get(daemon.admin, "/v1/sessions/x", Host=name)).status in (400, 421)
        assert (await get(daemon.admin, "/readyz", Host=name or "x")).status == 200


MALFORMED = {
    "space before the colon": b"GET /livez HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer SECRET\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nSECRET",
    "TLS": b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3SECRET",
    "long header": b"GET /livez HTTP/1.1\r\nHost: x\r\nCookie: SECRET" + b"a" * 9000 + b"\r\n\r\n",
    "long target": b"GET /livez?SECRET" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many headers": b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"A: SECRET\r\n" * 200 + b"\r\n",
    "second request": b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nSECRET\r\n\r\n",
    "chunk": b"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nSECRET\r\n\r\n",
    "length": b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: SECRET\r\n\r\n",
    "gzip": b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 6\r\n\r\nSECRET",
    "target": b"GET http://[SECRET/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT SECRET:99999 HTTP/1.1\r\nHost: x\r\n\r\n",
    "version": b"GET / HTTP/9.9SECRET\r\nHost: x\r\n\r\n",
    "line feeds": b"GET / HTTP/1.1\nHost: x\nSECRET\n\n",
    "folded": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n SECRET\r\n\r\n",
    "expectation": b"GET /livez HTTP/1.1\r\nHost: x\r\nExpect: SECRET\r\n\r\n",
    "host": b"GET /v1/sessions HTTP/1.1\r\nHost: [SECRET:\r\n\r\n",
    "query": b"GET /v1/sessions?limit=%ff%zzSECRET HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "format of metrics": b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
    b"Accept: application/openmetrics-text;version=SECRET;escaping=\xe9\r\n\r\n",
    "version of metrics": b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
    b"Accept: application/openmetrics-text;version=1.1.SECRET\xe9\r\n\r\n",
    "no version of metrics": b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
    b"Accept: application/openmetrics-text;version=SECRET\r\n\r\n",
}


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_malformed_request_is_no_error_and_its_text_is_not_logged(level: str) -> None:
    async with launched(*LOOPBACK, "--log-level", level) as daemon:
        await daemon.started()
        there = parse_address(daemon.admin)
        for data in MALFORMED.values():
            reader, writer = await asyncio.open_connection(there.host, there.port)
            writer.write(data)
            answer = await asyncio.wait_for(reader.readline(), TIMEOUT)
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
            assert answer.startswith(b"HTTP/1."), data[:60]
            assert b" 500 " not in answer, data[:60]
        assert (await get(daemon.admin, "/livez")).status == 200
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "SECRET" not in daemon.said
        assert "Traceback" not in daemon.said
        assert "[error" not in daemon.said
        assert ("client error" in daemon.said) == (level == "debug")


async def test_admin_endpoints_are_not_on_the_client_listener() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        for path in ("/metrics", "/readyz", "/livez"):
            assert (await get(daemon.addresses[0], path)).status == 404


async def test_admin_listener_on_a_unix_socket_or_disabled(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with launched("--listen", "127.0.0.1:0", "--admin", f"unix:{path}") as daemon:
        await daemon.started()
        assert (await get(f"unix:{path}", "/livez")).status == 200
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert not path.exists()
    async with launched("--listen", "127.0.0.1:0", "--admin", "") as daemon:
        await daemon.started()
        assert daemon.admin == ""


async def test_address_in_use_is_reported_with_its_setting() -> None:
    with bound() as taken:
        port = taken.getsockname()[1]
        async with launched("--listen", "127.0.0.1:0", "--admin", f"127.0.0.1:{port}") as daemon:
            assert await daemon.ended() == 1
            assert daemon.said == f"wsbroker: cannot listen on 127.0.0.1:{port}: the address is in use (server.admin)\n"


async def test_admin_listener_uses_the_passed_socket_of_its_name() -> None:
    with bound() as ws, bound() as admin:
        arguments = ("--listen", "systemd", "--admin", "systemd")
        async with activated([ws, admin], *arguments, names="ws:admin") as daemon:
            await daemon.started()
            assert daemon.addresses == [f"127.0.0.1:{ws.getsockname()[1]}"]
            assert daemon.admin == f"127.0.0.1:{admin.getsockname()[1]}"
            assert (await get(daemon.admin, "/readyz")).status == 200
        async with activated([ws], *arguments, names="ws") as daemon:
            assert await daemon.ended() == 1
            assert "no socket named admin" in daemon.said


async def test_full_broker_is_not_ready() -> None:
    few = {"WSBROKER_LIMITS__MAX_CONNECTIONS": "1"}
    async with launched(*LOOPBACK, environ=few) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            full = await get(daemon.admin, "/readyz")
            assert (full.status, full.json) == (503, {"status": "not ready", "reason": "full"})
            assert (await get(daemon.admin, "/livez")).status == 200
        async with asyncio.timeout(TIMEOUT):
            while (await get(daemon.admin, "/readyz")).status != 200:
                pass


async def test_draining_broker_is_alive_and_not_ready() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            client.transport.pause_reading()
            daemon.signal(signal.SIGTERM)
            await daemon.until("draining")
            assert (await get(daemon.admin, "/readyz")).json == {"status": "not ready", "reason": "draining"}
            assert (await get(daemon.admin, "/livez")).status == 200
            assert "\nwsbroker_draining 1.0\n" in (await get(daemon.admin, "/metrics")).body
            client.transport.resume_reading()
            try:
                while True:
                    await client.recv()
            except ConnectionClosed:
                pass
        assert await daemon.ended() == 0


async def test_retired_broker_is_alive_and_not_ready() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            client.transport.pause_reading()
            daemon.signal(signal.SIGUSR2)
            await daemon.until("retiring")
            assert (await get(daemon.admin, "/readyz")).json["reason"] == "retiring"
            assert "\nwsbroker_draining 1.0\n" in (await get(daemon.admin, "/metrics")).body
            client.transport.resume_reading()
            while await goes_on(client):
                pass
        await daemon.until("retired")
        assert (await get(daemon.admin, "/readyz")).json["reason"] == "retired"
        assert "\nwsbroker_draining 0.0\n" in (await get(daemon.admin, "/metrics")).body


async def goes_on(client: ClientConnection) -> bool:
    """Take a message; False at the end."""
    try:
        await asyncio.wait_for(client.recv(), TIMEOUT)
    except ConnectionClosed:
        return False
    return True


async def test_admin_listener_answers_without_free_descriptors() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        pid, there = daemon.process.pid, parse_address(daemon.admin)
        # From now on the process may open nothing more: the lowest number that is free is over the limit.
        before = descriptors(pid)
        most = min(set(range(len(before) + 1)) - before)
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
        idle = [socket.create_connection((there.host, there.port)) for _ in range(2)]
        for _ in range(3):
            assert (await get(daemon.admin, "/livez")).status == 200
        metrics = await get(daemon.admin, "/metrics")
        assert f"\nwsbroker_max_fds {most}.0\n" in metrics.body
        assert (await get(daemon.admin, "/readyz")).status == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        # The spare ones are filled up again.
        for sock in idle:
            sock.close()
        await until(lambda: len(descriptors(pid)) == len(before))
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


def descriptors(pid: int) -> set[int]:
    return {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.mark.parametrize("sent", [b"", b"GET /liv", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50])
async def test_admin_connection_over_the_bound_takes_the_place_of_the_oldest(sent: bytes) -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        there = parse_address(daemon.admin)
        before = len(descriptors(daemon.process.pid))
        with contextlib.ExitStack() as stuck:
            for _ in range(70):
                sock = stuck.enter_context(socket.create_connection((there.host, there.port)))
                sock.sendall(sent)
            # No more than the bound are open, and one more is answered.
            await until(lambda: len(descriptors(daemon.process.pid)) == before + 64)
            assert (await get(daemon.admin, "/livez")).status == 200
            assert len(descriptors(daemon.process.pid)) <= before + 64


async def test_admin_listener_answers_once_descriptors_are_free() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        pid, there = daemon.process.pid, parse_address(daemon.admin)
        before = descriptors(pid)
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        most = min(set(range(len(before) + 1)) - before)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
        idle = [socket.create_connection((there.host, there.port)) for _ in range(SPARE_FDS + 1)]
        await daemon.until("cannot accept")
        asked = asyncio.create_task(get(daemon.admin, "/livez"))
        for sock in idle:
            sock.close()
        assert (await asked).status == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


async def test_admin_connection_lifetime_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE", 3600)
    monkeypatch.setattr(server, "LIFETIME", 0.2)
    node = Node(Config(), MemoryEngine(), asyncio.get_running_loop())
    admin = server.Admin(CollectorRegistry(), lambda: None, node, max_connections=1)
    await admin.start()
    port = server.AdminListener(admin)
    await port.open(parse_address("127.0.0.1:0"))
    there = parse_address(port.addresses[0])
    with socket.create_connection((there.host, there.port)) as half:
        half.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTT")
        async with asyncio.timeout(TIMEOUT):
            while True:
                with contextlib.suppress(ConnectionError, ValueError, IndexError):
                    assert (await get(port.addresses[0], "/livez")).status == 200
                    break
                await asyncio.sleep(0.01)
    port.close()
    await admin.stop()


async def test_stuck_admin_client_does_not_delay_the_shutdown() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        there = parse_address(daemon.admin)
        with socket.create_connection((there.host, there.port)) as half:
            half.sendall(b"GET /metrics HTT")
            daemon.signal(signal.SIGTERM)
            assert await daemon.ended() == 0


async def test_sessions_need_an_api_key_as_soon_as_one_is_configured(tmp_path: Path) -> None:
    keys = {role: make_key() for role in ("admin", "publisher")}
    config = "".join(
        f"[[keys]]\nname = '{role}'\nhash = '{hash_key(key)}'\nroles = ['{role}']\n[[roles]]\nname = '{role}'\n"
        for role, key in keys.items()
    )
    async with launched(*LOOPBACK, folder=tmp_path, config=config) as daemon:
        await daemon.started()
        for path in ("/v1/sessions", "/v1/sessions/x", "/v1/nothing"):
            refused = await get(daemon.admin, path)
            assert (refused.status, refused.json["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == 'Bearer realm="wsbroker"'
            for wrong in ("Bearer wsb_wrong", f"Basic {keys['admin']}", keys["admin"]):
                assert (await get(daemon.admin, path, Authorization=wrong)).status == 401
            less = await get(daemon.admin, path, Authorization=f"Bearer {keys['publisher']}")
            assert (less.status, less.json["code"]) == (403, "forbidden")
        good = await get(daemon.admin, "/v1/sessions", Authorization=f"Bearer {keys['admin']}")
        assert (good.status, good.json["sessions"]) == (200, [])
        assert [(await get(daemon.admin, path)).status for path in ("/livez", "/readyz", "/metrics")] == [200] * 3


async def test_sessions_are_not_for_pages_of_another_origin() -> None:
    async with launched(*LOOPBACK) as daemon:
        await daemon.started()
        for origin in ("http://evil.example", "null", "https://localhost:8443", "http://localhost:8000", "nonsense"):
            refused = await get(daemon.admin, "/v1/sessions", Origin=origin)
            assert refused.status == 403, origin
            assert "access-control-allow-origin" not in refused.headers
            assert (await get(daemon.admin, "/livez", Origin=origin)).status == 200
        assert (await get(daemon.admin, "/v1/sessions", Origin="http://localhost")).status == 200, "its own page"


async def test_sessions_need_an_api_key_beyond_loopback() -> None:
    environ = {"WSBROKER_SERVER__ANONYMOUS": "true"}
    async with launched("--listen", "127.0.0.1:0", "--admin", "0.0.0.0:0", environ=environ) as daemon:
        await daemon.started()
        assert (await get(daemon.admin, "/v1/sessions")).status == 401
        assert (await get(daemon.admin, "/metrics")).status == 200
