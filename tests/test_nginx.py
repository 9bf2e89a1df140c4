"""The real nginx with the site of `nginx/` in front of the real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.fixtures_certificates import Pair, make_pair, trusting
from tests.fixtures_daemon import OWN_NETWORK, TIMEOUT, Daemon, has_networks, launched
from tests.net.harness import until
from tests.test_systemd import activated, bound

pytestmark = pytest.mark.needs("nginx", "openssl")

ROOT = Path(__file__).parent.parent
SITE = ROOT / "nginx" / "wsbroker.conf"

MAIN = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
worker_processes 1;
worker_rlimit_nofile 8192;
worker_shutdown_timeout 1h;
{user}
events {{ worker_connections 8000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


class Nginx:
    """A running nginx: TLS on a port of loopback, in front of the socket `ws.sock` in its folder."""

    def __init__(self, folder: Path, pair: Pair, port: int, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.port = port
        self.process = process
        self.context = trusting(pair)
        self.said = ""

    @property
    def socket(self) -> str:
        return str(self.folder / "ws.sock")

    async def connect(self, path: str = "/ws", **options: Any) -> ClientConnection:
        """A client."""
        url = f"wss://localhost:{self.port}{path}"
        options = {"ssl": self.context, "proxy": None, "compression": None, "max_size": None, **options}
        return await connect(url, host="127.0.0.1", open_timeout=TIMEOUT, **options)

    async def get(self, path: str, host: str = "localhost") -> bytes:
        """The status line of an answer, b"" if the connection was closed without one."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context, server_hostname=host)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        line = await asyncio.wait_for(reader.readline(), TIMEOUT)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        return line


@asynccontextmanager
async def nginx(
    folder: Path, *, limits: bool = False, replaced: Mapping[str, str] | None = None
) -> AsyncIterator[Nginx]:
    """nginx with the site as it is, but for names, ports and certificates; the limits only if they are wanted."""
    pair = make_pair(folder)
    with bound() as free:
        port = free.getsockname()[1]
    site = SITE.read_text()
    changes = {
        r"listen 80;\n": "",
        r"listen \[::\]:(80|443 ssl( default_server)?);\n": "",
        r"server \{\n\s*server_name broker.example;\n\n    # Renewals.*?\n\}\n": "",
        r"443 ssl": f"127.0.0.1:{port} ssl",
        r"broker\.example;": "localhost;",
        r"/etc/letsencrypt/live/broker\.example/fullchain\.pem": str(pair.certificate),
        r"/etc/letsencrypt/live/broker\.example/privkey\.pem": str(pair.key),
        r"/run/wsbroker/ws\.sock": f"{folder}/ws.sock",
        **({} if limits else {r"\blimit_(conn|req|conn_status|req_status) [^;]*;": ""}),
        **(replaced or {}),
    }
    for pattern, text in changes.items():
        site, count = re.subn(pattern, text, site, flags=re.DOTALL)
        assert count, pattern
    (folder / "site.conf").write_text(site)
    # Its workers would be somebody else's, who may not look into the folder of the test.
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user))
    process = await asyncio.create_subprocess_exec(
        *("nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")), stderr=asyncio.subprocess.PIPE
    )
    running = Nginx(folder, pair, port, process)
    try:
        async with asyncio.timeout(TIMEOUT):
            while True:
                assert process.returncode is None, await process.communicate()
                try:
                    await running.get("/")
                except (ConnectionRefusedError, ssl.SSLError):
                    await asyncio.sleep(0.02)
                    continue
                break
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        _, said = await process.communicate()
        running.said = said.decode()


@asynccontextmanager
async def both(folder: Path, *, limits: bool = False, **environ: str) -> AsyncIterator[tuple[Nginx, Daemon]]:
    async with nginx(folder, limits=limits) as front:
        listen = ("--listen", f"unix:{front.socket}", "--log-level", "debug")
        async with launched(*listen, environ=environ) as daemon:
            await daemon.started()
            yield front, daemon


async def welcomed(client: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), TIMEOUT))
    assert message["op"] == "welcome"
    return message


async def ask(client: ClientConnection, op: str, **fields: Any) -> dict[str, Any]:
    await client.send(json.dumps({"op": op, "id": 1, **fields}))
    answer: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), TIMEOUT))
    return answer


@pytest.mark.skipif(not has_networks(), reason="this system allows no network namespaces")
def test_nginx_accepts_the_site_configuration(tmp_path: Path) -> None:
    """Ports, names, IPv6 and all; only the certificate is elsewhere."""
    pair = make_pair(tmp_path)
    site = SITE.read_text()
    for name, file in (("fullchain", pair.certificate), ("privkey", pair.key)):
        site = site.replace(f"/etc/letsencrypt/live/broker.example/{name}.pem", str(file))
    (tmp_path / "site.conf").write_text(site)
    user = "user root;" if os.getuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(MAIN.format(folder=tmp_path, user=user))
    command = f"ip link set lo up; exec nginx -t -q -p {tmp_path} -c {tmp_path}/nginx.conf"
    done = subprocess.run([*OWN_NETWORK, command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


DEBIAN = """
user root;
worker_processes auto;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
include {folder}/modules-enabled/*.conf;

events {{
	worker_connections 768;
	# multi_accept on;
}}

http {{
	client_body_temp_path {folder}/body;
	proxy_temp_path {folder}/proxy;
	fastcgi_temp_path {folder}/fastcgi;
	uwsgi_temp_path {folder}/uwsgi;
	scgi_temp_path {folder}/scgi;
	sendfile on;
	ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
	ssl_prefer_server_ciphers on;
	access_log {folder}/access.log;
	gzip on;
	include {folder}/conf.d/*.conf;
	include {folder}/sites-enabled/*;
}}
"""
"""What matters of the nginx.conf of Debian 12."""

DEFAULT_SITE = """
server {{
	listen 80 default_server;
	listen [::]:80 default_server;
	root {folder}/html;
	server_name _;
	location / {{
		try_files $uri $uri/ =404;
	}}
}}
"""


def debian(folder: Path) -> None:
    """Lay out /etc/nginx as Debian does, with a module, as far as this system has one."""
    for name in ("modules-enabled", "conf.d", "sites-enabled", "html/.well-known/acme-challenge"):
        (folder / name).mkdir(parents=True)
    (folder / "nginx.conf").write_text(DEBIAN.format(folder=folder))
    (folder / "sites-enabled" / "default").write_text(DEFAULT_SITE.format(folder=folder))
    (folder / "html/.well-known/acme-challenge/token").write_text("answer")
    for module in sorted(Path("/usr/lib/nginx/modules").glob("*.so"))[:1]:
        (folder / "modules-enabled" / "50-mod.conf").write_text(f"load_module {module};\n")


def in_own_network(command: str) -> tuple[int, str]:
    """Run a command where all ports are free; gives its status and all it says."""
    done = subprocess.run([*OWN_NETWORK, f"ip link set lo up; {command}"], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not has_networks(), reason="this system allows no network namespaces")
def test_commands_of_the_docs_fit_the_configuration_of_debian(tmp_path: Path) -> None:
    folder, live = tmp_path / "nginx", tmp_path / "live"
    debian(folder)
    # One process: workers would change their user, which this network of its own does not allow.
    serve = f"nginx -p {folder} -c {folder}/nginx.conf -g 'master_process off;'"
    stop = f"kill -QUIT $(cat {folder}/nginx.pid); while [ -e {folder}/nginx.pid ]; do sleep 0.01; done"
    # The first certificate: the default site answers the challenge.
    challenge = "curl -sS -H 'Host: localhost' http://127.0.0.1/.well-known/acme-challenge/token"
    assert in_own_network(f"{serve}; {challenge}; {stop}") == (0, "answer")

    live.mkdir()
    pair = make_pair(live)
    pair.certificate.rename(live / "fullchain.pem")
    pair.key.rename(live / "privkey.pem")
    text = (ROOT / "docs" / "deploy-nginx.md").read_text()
    (commands,) = (block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "nginx -t" in block)
    replaced = {
        "nginx -t\n": f"{serve} -t -q\n",
        "cp nginx/": f"cp {ROOT}/nginx/",
        "/etc/nginx": str(folder),
        "www.broker.example": "localhost",
    }
    for old, new in replaced.items():
        assert old in commands
        commands = commands.replace(old, new)
    site = folder / "conf.d" / "wsbroker.conf"
    elsewhere = f"sed -i 's|/etc/letsencrypt/live/localhost|{live}|; s|/var/www/html|{folder}/html|' {site}\n"
    commands = commands.replace(f"{serve} -t", f"{elsewhere}{serve} -t")
    # Renewals of the certificate come the same way; everything else goes to TLS.
    other = "curl -sS -o /dev/null -w '%{http_code} %{redirect_url}' -H 'Host: localhost' http://127.0.0.1/a"
    status, said = in_own_network(f"{commands}\n{serve}; {challenge}; {other}; {stop}")
    assert (status, said) == (0, "answer301 https://localhost/a")
    whole = (folder / "nginx.conf").read_text()
    assert whole.count("worker_connections 65536;") == whole.count("worker_rlimit_nofile 131072;") == 1


async def test_clients_connect_through_nginx_with_their_address(tmp_path: Path) -> None:
    async with both(tmp_path) as (front, daemon):
        # What a client says of its own address is not passed on.
        forged = {"X-Forwarded-For": "203.0.113.7"}
        async with await front.connect(additional_headers=forged, origin=f"https://localhost:{front.port}") as client:
            await welcomed(client)
            line = await daemon.until("session opened")
            assert "peer=127.0.0.1 " in line.replace("'", "")
            assert (await ask(client, "subscribe", topic="a"))["op"] == "ok"
            await client.send('{"op":"publish","topic":"a","data":[1]}')
            assert json.loads(await client.recv())["data"] == [1]
            for size in (100_000, 1_000_000):
                await client.send(json.dumps({"op": "publish", "topic": "a", "data": "x" * size}))
                assert len(json.loads(await client.recv())["data"]) == size
        with pytest.raises(InvalidStatus) as refused:
            await front.connect(origin="https://evil.example")
        assert refused.value.response.status_code == 403


async def test_only_the_websocket_and_healthz_are_reachable(tmp_path: Path) -> None:
    async with both(tmp_path) as (front, _):
        assert b" 200 " in await front.get("/healthz")
        assert b" 426 " in await front.get("/ws")
        for path in ("/", "/metrics", "/readyz", "/livez", "/ws/", "/ws/metrics"):
            assert b" 404 " in await front.get(path)
        assert await front.get("/healthz", host="127.0.0.1") == b""  # not one of its names


async def test_pings_keep_an_idle_connection_alive(tmp_path: Path) -> None:
    pings = {"WSBROKER_LIMITS__PING_INTERVAL": "0.2"}
    async with (
        nginx(tmp_path, replaced={"proxy_read_timeout 75s": "proxy_read_timeout 1500ms"}) as front,
        launched("--listen", f"unix:{front.socket}", environ=pings) as daemon,
    ):
        await daemon.started()
        async with await front.connect(ping_interval=None) as client:
            await welcomed(client)
            await asyncio.sleep(4)  # more than twice what nginx allows
            assert (await ask(client, "ping"))["op"] == "pong"


async def test_connections_over_the_address_limit_get_429(tmp_path: Path) -> None:
    async with both(tmp_path, limits=True) as (front, _):
        clients: list[ClientConnection] = []
        statuses: list[int] = []
        for _ in range(130):
            try:
                clients.append(await front.connect())
            except InvalidStatus as refused:
                statuses.append(refused.response.status_code)
        assert set(statuses) == {429}
        assert len(clients) == 100  # limit_conn; the rate allows 100 at once and 20 a second
        await asyncio.gather(*(client.close() for client in clients))
    slow = {"burst=100": "burst=5", "rate=20r/s": "rate=1r/m"}
    async with (
        nginx(tmp_path, limits=True, replaced=slow) as front,
        launched("--listen", f"unix:{front.socket}") as daemon,
    ):
        await daemon.started()
        for _ in range(6):
            await (await front.connect()).close()
        with pytest.raises(InvalidStatus) as limited:
            await front.connect()
        assert limited.value.response.status_code == 429


async def test_nginx_reload_closes_no_connection(tmp_path: Path) -> None:
    async with both(tmp_path) as (front, _), await front.connect() as old:
        await welcomed(old)
        workers = children(front.process.pid)
        front.process.send_signal(signal.SIGHUP)
        await until(lambda: len(children(front.process.pid)) == 2 and workers != children(front.process.pid))
        async with await front.connect() as new:
            await welcomed(new)
            assert (await ask(old, "subscribe", topic="a"))["op"] == "ok"
            assert (await ask(new, "publish", topic="a", data=1))["receivers"] == 1
            assert json.loads(await old.recv())["data"] == 1


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


async def test_missing_broker_gives_502_until_it_is_back(tmp_path: Path) -> None:
    async with nginx(tmp_path) as front:
        with pytest.raises(InvalidStatus) as refused:
            await front.connect()
        assert refused.value.response.status_code == 502
        for _ in range(2):
            async with launched("--listen", f"unix:{front.socket}") as daemon:
                await daemon.started()
                async with await front.connect() as client:
                    await welcomed(client)
                    daemon.signal(signal.SIGTERM)
                    assert json.loads(await client.recv())["op"] == "bye"
                    with pytest.raises(ConnectionClosed) as closed:
                        await client.recv()
                    assert closed.value.rcvd is not None
                    assert closed.value.rcvd.code == 1001
                assert await daemon.ended() == 0


async def test_restart_behind_nginx_refuses_no_connection(tmp_path: Path) -> None:
    async with nginx(tmp_path) as front:
        with bound(front.socket) as ws:
            async with activated([ws], "--listen", "systemd") as first:
                await first.started()
                clients = [await front.connect() for _ in range(20)]
                first.signal(signal.SIGTERM)
                for client in clients:
                    await client.wait_closed()
                # They come back at once, which is before the next one is there.
                back = [asyncio.create_task(front.connect()) for _ in range(20)]
                assert await first.ended() == 0
            async with activated([ws], "--listen", "systemd") as second:
                await second.started()
                for client in await asyncio.gather(*back):
                    await welcomed(client)
                    await client.close()


class Reader(asyncio.Protocol):
    """A subscriber that is as cheap as can be: it only looks for what interests in the bytes that come."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.bye: int | None = None
        self.code: int | None = None
        self.subscribed = False
        self.lost = asyncio.get_running_loop().create_future()
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        # A frame with the mask 0.
        command = b'{"op":"subscribe","id":1,"topic":"a"}'
        self.transport.write(b"\x81" + bytes([0x80 | len(command)]) + b"\0\0\0\0" + command)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        for found in MESSAGE.finditer(data):
            at = found.end()
            if found["event"] is not None:
                self.events.append(int(found["event"]))
            elif found["bye"] is not None:
                self.bye = int(found["bye"])
            elif found["close"] is not None:
                self.code = int.from_bytes(found["close"][2:4], "big")
                self.transport.write(b"\x88\x82\0\0\0\0\x03\xe9")
            else:
                self.subscribed = True
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


MESSAGE = re.compile(
    rb'"data":(?P<event>\d+)\}|"retry_after_ms":(?P<bye>\d+)\}|(?P<close>\x88.\x03\xe9going_away)|"op":"ok","id":1,',
    re.DOTALL,
)

MANY = 2000
IN_FLIGHT = 50
"""Publishes that wait for their answer."""
LONG = 120.0
"""Seconds for a step of all clients, on a busy machine."""


async def test_drain_of_two_thousand_clients_under_load(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    roomy = {
        "WSBROKER_LIMITS__MAX_QUEUE": "65536",
        "WSBROKER_LIMITS__MAX_OUTBOX": "100000000",
        "WSBROKER_LIMITS__RECONNECT_SPREAD": "4",
        "WSBROKER_LOG__LEVEL": "info",
        # All clients are in this process. On a busy machine it is slower than one client may be: a broker would close
        # them, rightly, because they do not answer a ping or a close frame in time.
        "WSBROKER_LIMITS__PING_INTERVAL": "0",
        "WSBROKER_LIMITS__CLOSE_TIMEOUT": str(LONG),
        "WSBROKER_LIMITS__DRAIN_TIMEOUT": str(LONG),
    }
    loop = asyncio.get_running_loop()
    try:
        async with (
            nginx(tmp_path) as front,
            launched("--listen", f"unix:{front.socket}", environ=roomy) as daemon,
        ):
            await daemon.started()
            readers: list[Reader] = []
            context, port = front.context, front.port
            while len(readers) < MANY:
                opening = [
                    loop.create_connection(Reader, "127.0.0.1", port, ssl=context, server_hostname="localhost")
                    for _ in range(100)
                ]
                readers += [reader for _, reader in await asyncio.gather(*opening)]
            await until(lambda: all(reader.subscribed for reader in readers), LONG)
            async with await front.connect(max_queue=None, ping_interval=None) as publisher:
                await welcomed(publisher)
                answers: dict[int, str] = {}
                answering = asyncio.create_task(read_answers(publisher, answers))
                n = 0
                # With more publishes in flight, the events to deliver in the drain would depend on the machine.
                while not answering.done():
                    await until(lambda: n - len(answers) < IN_FLIGHT or answering.done(), LONG)  # noqa: B023
                    with contextlib.suppress(ConnectionClosed):
                        await publisher.send(json.dumps({"op": "publish", "id": n, "topic": "a", "data": n}))
                    n += 1
                    if n == 200 + IN_FLIGHT:
                        daemon.signal(signal.SIGTERM)
                await answering
            await asyncio.wait_for(asyncio.gather(*(reader.lost for reader in readers)), LONG)
            assert await daemon.ended() == 0
            done = [n for n, told in sorted(answers.items()) if told == "ok"]
            assert len(done) >= 200
            assert set(answers.values()) <= {"ok", "draining"}
            for reader in readers:
                assert reader.events[: len(done)] == done
                assert reader.code == 1001
            byes = [reader.bye for reader in readers]
            assert all(bye is not None and 0 <= bye <= 4000 for bye in byes)
            # Evenly: each quarter of the time has a quarter of them, give or take.
            for quarter in range(4):
                part = sum(quarter * 1000 <= bye < (quarter + 1) * 1000 for bye in byes if bye is not None)
                assert 400 < part < 600
            assert "Traceback" not in daemon.said
            assert "drain timed out" not in daemon.said
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def read_answers(publisher: ClientConnection, answers: dict[int, str]) -> None:
    try:
        while True:
            message = json.loads(await publisher.recv())
            if message["op"] != "bye":
                answers[message["id"]] = message.get("code", message["op"])
    except ConnectionClosed:
        return
