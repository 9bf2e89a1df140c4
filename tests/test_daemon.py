"""The whole process: how it starts, what it says, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin, Subprotocol

from tests.admin.test_server import get
from tests.fixtures_certificates import make_pair, trusting
from tests.fixtures_command import start, wsbroker
from tests.fixtures_daemon import OWN_NETWORK, TIMEOUT, Daemon, has_networks, launched, mute, serving
from tests.net.harness import until

pytestmark = pytest.mark.needs("openssl")


async def ask(client: ClientConnection, op: str, **fields: Any) -> dict[str, Any]:
    """The next message after a command."""
    await client.send(json.dumps({"op": op, "id": 1, **fields}))
    answer: dict[str, Any] = json.loads(await asyncio.wait_for(client.recv(), TIMEOUT))
    return answer


async def read_bye(client: ClientConnection) -> dict[str, Any]:
    """The last message before the broker closes with 1001."""
    last: dict[str, Any] = {"op": "bye", "retry_after_ms": 0}
    try:
        while True:
            last = json.loads(await asyncio.wait_for(client.recv(), TIMEOUT))
    except ConnectionClosed as closed:
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1001
    return last


async def health(address: str) -> int:
    """The status of /healthz."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return int(line.split()[1])


@asynccontextmanager
async def mute_at(daemon: Daemon) -> AsyncIterator[None]:
    await daemon.started()
    async with mute(daemon.addresses[0]):
        yield


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that another one listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"127.0.0.1:{sock.getsockname()[1]}"


# The start


async def test_listening_addresses_are_logged(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with serving("--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--listen", f"unix:{path}") as daemon:
        v4, v6, unix = daemon.addresses
        assert unix == f"unix:{path}"
        for opened in (connect(f"ws://{v4}/"), connect(f"ws://{v6}/"), unix_connect(str(path))):
            async with opened as client:
                assert json.loads(await client.recv())["op"] == "welcome"
        assert f"url='ws://{v4}/'" in daemon.log[0]
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert not path.exists()


DEFAULTS = """
ip link set lo up
"$0" -m broker serve & broker=$!
until "$0" -m broker pub a 1; do sleep 0.05; done 2>/dev/null
"$0" -c "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8766/readyz').read().decode())"
kill -TERM $broker
wait $broker
"""


@pytest.mark.skipif(not has_networks(), reason="this system allows no network namespaces")
async def test_default_addresses_are_those_of_the_docs() -> None:
    process = await asyncio.create_subprocess_exec(
        *(*OWN_NETWORK, DEFAULTS, sys.executable),
        env={name: value for name, value in os.environ.items() if not name.startswith("WSBROKER_")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    answer, log = (found.decode() for found in await asyncio.wait_for(process.communicate(), TIMEOUT))
    assert process.returncode == 0, log
    assert json.loads(answer) == {"status": "ready"}
    assert "address='127.0.0.1:8765' url='ws://127.0.0.1:8765/'" in log
    assert re.search(r"admin listener +address='127\.0\.0\.1:8766'", log)


async def test_logged_url_has_the_path(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\npath = "/ws"'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        assert f"url='ws://{daemon.addresses[0]}/ws'" in daemon.log[0]
        async with connect(f"ws://{daemon.addresses[0]}/ws"):
            pass


async def test_json_log_has_one_object_per_line() -> None:
    async with launched("--listen", "127.0.0.1:0", "--log-format", "json") as daemon:
        line = json.loads(await daemon.until("listening"))
        assert line["level"] == "info"
        assert line["url"].startswith("ws://127.0.0.1:")
        assert list(line)[:3] == ["timestamp", "level", "event"]
        ready = json.loads(await daemon.until("ready"))
        assert ready["engine"] == "memory"
        daemon.signal(signal.SIGINT)
        assert await daemon.ended() == 0
        assert [json.loads(line)["event"] for line in daemon.log if line][-1] == "stopped"


async def test_entries_below_the_level_are_not_logged(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with launched("--listen", f"unix:{path}", "--log-level", "error") as daemon:
        await until(path.exists)
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert daemon.said == ""


async def test_debug_logs_refusals_without_payloads(tmp_path: Path) -> None:
    async with serving("--listen", "127.0.0.1:0", "--log-level", "debug") as daemon:
        with pytest.raises(InvalidStatus):
            await connect(daemon.url, origin=Origin("http://evil.example")).__aenter__()
        assert "status=403" in await daemon.until("status=")
        offered = [Subprotocol("wsbroker.v1"), Subprotocol("bearer.secret-token")]
        with pytest.raises(InvalidStatus):
            await connect(daemon.url, subprotocols=offered).__aenter__()
        assert "status=401" in await daemon.until("status=401")
        async with connect(daemon.url, subprotocols=offered[:1]) as client:
            await client.send('{"op":"publish","id":1,"topic":"a","data":"secret-payload"}')
            await client.recv()
            await client.recv()
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "secret" not in daemon.said


async def test_address_in_use_is_one_line_and_status_1(taken: str, tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with launched("--listen", f"unix:{path}", "--listen", taken) as daemon:
        assert await daemon.ended() == 1
        assert daemon.said == f"wsbroker: cannot listen on {taken}: the address is in use\n"
        assert not path.exists()


async def test_address_in_use_is_reported_in_json(taken: str) -> None:
    async with launched("--listen", taken, "--log-format", "json") as daemon:
        assert await daemon.ended() == 1
        line = json.loads(daemon.said)
        assert line["level"] == "error"
        assert line["event"] == "cannot start"
        assert line["problem"] == f"cannot listen on {taken}: the address is in use"


async def test_each_of_many_mistakes_is_reported_in_json(tmp_path: Path) -> None:
    config = "[limits]\n" + "".join(f"wrong{number} = 1\n" for number in range(50))
    async with launched("--log-format", "json", folder=tmp_path, config=config) as daemon:
        assert await daemon.ended() == 78
        said = [json.loads(line) for line in daemon.said.splitlines()]
    assert [entry["event"] for entry in said] == ["cannot start"] * 50
    assert all(f"wrong{number} " in entry["problem"] for number, entry in enumerate(said))


async def test_a_mistake_in_the_configuration_is_status_78(tmp_path: Path) -> None:
    async with launched(folder=tmp_path, config="[limits]\nmax_sizes = 5") as daemon:
        assert await daemon.ended() == 78
        assert "limits.max_sizes" in daemon.said
        assert "Traceback" not in daemon.said


async def test_more_connections_than_there_are_descriptors_for_is_a_mistake(tmp_path: Path) -> None:
    config = "[limits]\nmax_connections = 5000000"
    async with launched("--listen", "127.0.0.1:0", folder=tmp_path, config=config) as daemon:
        assert await daemon.ended() == 78
        assert daemon.said.startswith(
            f"wsbroker: limits.max_connections ({daemon.file}:2): 5000000 do not fit into the limit of "
        )
        assert daemon.said.count("\n") == 1


async def test_descriptor_limit_is_raised_to_the_hard_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def few_for_now() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

    async with launched("--listen", "127.0.0.1:0", before=few_for_now) as daemon:
        await daemon.started()
        assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (min(hard, 1 << 20), hard)


# TLS


async def test_certificate_enables_tls_on_tcp_and_not_on_unix_sockets(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    path = tmp_path / "broker.sock"
    listen = f'listen = ["127.0.0.1:0", "[::1]:0", "unix:{path}"]'
    config = f'[server]\n{listen}\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        v4, v6, _ = daemon.addresses
        assert f"url='wss://{v4}/'" in daemon.log[0]
        for address in (v4, v6):
            async with connect(f"wss://{address}/", ssl=trusting(pair), server_hostname="localhost") as client:
                assert json.loads(await client.recv())["op"] == "welcome"
        async with unix_connect(str(path)) as client:
            assert json.loads(await client.recv())["op"] == "welcome"
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


async def test_pub_and_sub_trust_the_given_ca(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    config = f'[server]\nlisten = ["127.0.0.1:0"]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        there = ("--url", f"wss://{daemon.addresses[0]}")
        ca = {"WSBROKER_CA": str(pair.certificate)}
        async with start("sub", "a.*", *there, environ=ca) as printing:
            assert printing.stdout is not None
            # Until it has subscribed, nobody gets what is published.
            while (await wsbroker("pub", "a.b", "1", *there, "--ca", str(pair.certificate))).status == 0:
                try:
                    line = await asyncio.wait_for(printing.stdout.readline(), 0.2)
                except TimeoutError:
                    continue
                break
            assert json.loads(line) == {"op": "event", "topic": "a.b", "data": 1}
        refused = await wsbroker("pub", "a.b", "1", *there)
        assert refused.status == 69
        assert "its certificate is not trusted" in refused.err


async def test_unusable_certificate_is_a_configuration_mistake(tmp_path: Path) -> None:
    config = f'[server]\ncertificate = "{tmp_path}/a"\nkey = "{tmp_path}/b"\n[limits]\nmax_connections = 5000000'
    async with launched(folder=tmp_path, config=config) as daemon:
        assert await daemon.ended() == 78
        said = daemon.said.splitlines()
        assert said[0].startswith(f"wsbroker: limits.max_connections ({daemon.file}:5): ")
        assert (
            said[1]
            == f"wsbroker: server.certificate ({daemon.file}:2): {tmp_path}/a cannot be read: No such file or directory"
        )
        assert (
            said[2] == f"wsbroker: server.key ({daemon.file}:3): {tmp_path}/b cannot be read: No such file or directory"
        )
        assert len(said) == 3


# Signals


async def test_reload_changes_limits_for_connected_clients(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\nmax_subscriptions = 1\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            welcome = json.loads(await client.recv())
            assert (await ask(client, "subscribe", topic="a"))["op"] == "ok"
            assert (await ask(client, "subscribe", topic="b"))["code"] == "limit"
            more = "max_subscriptions = 2\nmax_depth = 3\nmax_queue = 5\nmax_size = 100"
            daemon.configure(config.replace("max_subscriptions = 1", more))
            daemon.signal(signal.SIGHUP)
            line = await daemon.until("reloaded")
            for name in ("max_subscriptions", "max_depth", "max_queue", "max_size"):
                assert f"limits.{name}" in line
            assert (await ask(client, "subscribe", topic="b"))["op"] == "ok"
            assert (await ask(client, "subscribe", topic="c"))["code"] == "limit"
            await client.send('{"op":"publish","topic":"a","data":[[[1]]]}')
            assert json.loads(await client.recv())["code"] == "bad_json"
            # The largest message is what the client was told when it came.
            assert welcome["max_size"] == 1048576
            assert (await ask(client, "publish", topic="x", data="x" * 200))["op"] == "ok"
        async with connect(daemon.url) as client:
            welcome = json.loads(await client.recv())
            assert (welcome["max_size"], welcome["max_queue"]) == (100, 5)
            await client.send("x" * 200)
            with pytest.raises(ConnectionClosed) as closed:
                await client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009


async def test_a_reload_changes_the_rules_for_topics(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[[topics]]\nmatch = "a.*"\nmax_queue_limit = 5\nmax_queue = 5\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        async with connect(daemon.url) as client:
            await client.recv()
            assert (await ask(client, "subscribe", topic="a.b", max_queue=6))["code"] == "limit"
            daemon.configure(config.replace("= 5", "= 7") + 'overflows = ["latest"]\n')
            daemon.signal(signal.SIGHUP)
            assert "changed=['topics']" in await daemon.until("reloaded")
            assert (await ask(client, "subscribe", topic="a.b", max_queue=6))["op"] == "ok"
            assert (await ask(client, "subscribe", topic="a.c", max_queue=8))["code"] == "limit"
            assert (await ask(client, "subscribe", topic="a.d", overflow="close"))["code"] == "forbidden"
            # A rule that is wrong, and then none.
            daemon.configure(config + 'overflow = "latest"\noverflows = ["close"]\n')
            daemon.signal(signal.SIGHUP)
            assert "problem='topics[" in await daemon.until("reload failed")
            assert (await ask(client, "subscribe", topic="a.d", overflow="close"))["code"] == "forbidden"
            daemon.configure('[server]\nlisten = ["127.0.0.1:0"]\n')
            daemon.signal(signal.SIGHUP)
            await daemon.until("reloaded")
            assert (await ask(client, "subscribe", topic="a.d", max_queue=8, overflow="close"))["op"] == "ok"


async def test_reload_changes_connection_limits_and_permissions(tmp_path: Path) -> None:
    server = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched(folder=tmp_path, config=server) as daemon:
        await daemon.started()

        async def reload(config: str) -> None:
            daemon.configure(config)
            daemon.signal(signal.SIGHUP)
            await daemon.until("reloaded")

        async with connect(daemon.url) as first:
            assert first.response is not None
            assert "Sec-WebSocket-Extensions" not in first.response.headers
            await first.recv()
            assert (await ask(first, "subscribe", topic="a", overflow="block"))["op"] == "ok"
            limits = "[limits]\nmax_connections = 2\npublish_rate = 0.01\npublish_burst = 1\ndrain_timeout = 0.3\n"
            await reload(server + 'compression = true\nblock = "none"\n' + limits)
            assert (await ask(first, "subscribe", topic="b", overflow="block"))["code"] == "forbidden"
            async with connect(daemon.url) as second:
                assert second.response is not None
                assert "permessage-deflate" in second.response.headers["Sec-WebSocket-Extensions"]
                await second.recv()
                assert (await ask(second, "publish", topic="c", data=1))["op"] == "ok"
                assert (await ask(second, "publish", topic="c", data=1))["code"] == "rate_limited"
                with pytest.raises(InvalidStatus):
                    await connect(daemon.url).__aenter__()
                # Fewer than there are connections: none is closed.
                await reload(server + limits.replace("max_connections = 2", "max_connections = 1"))
                assert (await ask(first, "ping"))["op"] == "pong"
                # The time for the end is the new one: they do not read, and are cut off.
                first.transport.pause_reading()
                second.transport.pause_reading()
                daemon.signal(signal.SIGTERM)
                await daemon.until("drain timed out")
                first.transport.abort()
                second.transport.abort()
        assert await daemon.ended() == 0


async def test_a_reload_changes_the_level_of_the_log_and_the_origins(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        foreign = Origin("https://other.example")
        with pytest.raises(InvalidStatus):
            await connect(daemon.url, origin=foreign).__aenter__()
        daemon.configure(config + 'origins = ["https://other.example"]\n[log]\nlevel = "debug"\n')
        daemon.signal(signal.SIGHUP)
        await daemon.until("reloaded")
        async with connect(daemon.url, origin=foreign) as client:
            await client.recv()
            await daemon.until("session opened")
            daemon.configure(config + '[log]\nlevel = "error"\n')
            daemon.signal(signal.SIGHUP)
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "shutting down" not in daemon.said


async def test_settings_that_need_a_restart_are_logged_and_kept(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        daemon.configure('[server]\nlisten = ["127.0.0.1:1"]\npath = "/new"\n[limits]\nmax_queue = 7')
        daemon.signal(signal.SIGHUP)
        assert "changed=['limits.max_queue']" in await daemon.until("reloaded")
        assert "settings=['server.listen', 'server.path']" in await daemon.until("need a restart")
        async with connect(daemon.url) as client:
            assert json.loads(await client.recv())["max_queue"] == 7
        # Said again as long as it is so, and no longer.
        daemon.signal(signal.SIGHUP)
        assert "changed=[]" in await daemon.until("reloaded")
        await daemon.until("need a restart")
        daemon.configure(config)
        daemon.signal(signal.SIGHUP)
        assert "changed=['limits.max_queue']" in await daemon.until("reloaded")
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert daemon.said.count("need a restart") == 2


@pytest.mark.parametrize(
    "broken",
    [
        "[limits]\nmax_sise = 5",
        "[limits",
        "[limits]\nmax_connections = 9999999",
        '[server]\ncertificate = "/none"',
        "[limits]\nmax_queue = " + "[" * 5000,
        "[limits]\nmax_queue = " + "[" * 400 + "]" * 400,
        None,
    ],
    ids=str.split("key section descriptors certificate nested brackets missing"),
)
async def test_reload_of_an_invalid_file_changes_nothing(tmp_path: Path, broken: str | None) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\nmax_queue = 9\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        if broken is None:
            (tmp_path / "wsbroker.toml").unlink()
        else:
            daemon.configure(broken)
        daemon.signal(signal.SIGHUP)
        line = await daemon.until("reload failed")
        assert "error" in line
        assert "problem=" in line
        async with connect(daemon.url) as client:
            assert json.loads(await client.recv())["max_queue"] == 9
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


async def test_reload_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    async with serving(folder=tmp_path) as daemon, connect(daemon.url) as client:
        assert daemon.file is not None
        daemon.file.unlink()
        os.mkfifo(daemon.file)
        await client.recv()
        daemon.signal(signal.SIGHUP)
        assert "it is a pipe or a terminal, and not a file" in await daemon.until("reload failed")
        assert (await ask(client, "ping"))["op"] == "pong"


async def test_reload_applies_a_new_certificate_and_closes_no_connection(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path), make_pair(tmp_path, "other")
    config = f'[server]\nlisten = ["127.0.0.1:0"]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        url = f"wss://{daemon.addresses[0]}/"
        async with connect(url, ssl=trusting(pair)) as first:
            await first.recv()
            # As a program does that renews certificates: the same names, with something else in them.
            other.certificate.replace(pair.certificate)
            daemon.signal(signal.SIGHUP)
            assert "of another certificate" in await daemon.until("reload failed")
            async with connect(url, ssl=first.transport.get_extra_info("sslcontext")) as second:
                await second.recv()
            other.key.replace(pair.key)
            daemon.signal(signal.SIGHUP)
            await daemon.until("reloaded")
            async with connect(url, ssl=trusting(pair)) as second:
                await second.recv()
                shown = [client.transport.get_extra_info("ssl_object").getpeercert(True) for client in (first, second)]
                assert shown[0] != shown[1]
                assert (await ask(first, "ping"))["op"] == "pong"


async def test_replaced_certificate_is_loaded_without_a_signal(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path), make_pair(tmp_path, "other")
    config = f'[server]\nlisten = ["127.0.0.1:0"]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        other.certificate.replace(pair.certificate)
        other.key.replace(pair.key)
        await daemon.until("certificate reloaded")
        async with connect(f"wss://{daemon.addresses[0]}/", ssl=trusting(pair)) as client:
            await client.recv()


async def test_replaced_certificate_with_a_mistake_is_reported_and_the_old_one_stays(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path), make_pair(tmp_path, "other")
    config = f'[server]\nlisten = ["127.0.0.1:0"]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        old = trusting(pair)
        other.certificate.replace(pair.certificate)
        line = await daemon.until("certificate not reloaded")
        assert "[error" in line
        assert f"{pair.key} is a private key, but of another certificate than {pair.certificate}" in line
        async with connect(f"wss://{daemon.addresses[0]}/", ssl=old) as client:
            await client.recv()
        other.key.replace(pair.key)
        assert "certificate reloaded" in await daemon.until("certificate ")
        async with connect(f"wss://{daemon.addresses[0]}/", ssl=trusting(pair)) as client:
            await client.recv()


async def test_reload_does_not_enable_or_disable_tls(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    config = '[server]\nlisten = ["127.0.0.1:0"]\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        daemon.configure(f'{config}certificate = "{pair.certificate}"\nkey = "{pair.key}"')
        daemon.signal(signal.SIGHUP)
        assert "['server.certificate', 'server.key']" in await daemon.until("need a restart")
        async with connect(daemon.url) as client:
            await client.recv()


async def test_usr2_closes_all_clients_and_the_broker_stays(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\ndrain_timeout = 1\nreconnect_spread = 2\n'
    async with launched(folder=tmp_path, config=config) as daemon, mute_at(daemon):
        clients = [await connect(daemon.url) for _ in range(20)]
        for client in clients:
            assert json.loads(await client.recv())["op"] == "welcome"
        daemon.signal(signal.SIGUSR2)
        assert "connections=21" in await daemon.until("retiring")
        # Nobody new, and a load balancer is told; the last one is served until it goes.
        with pytest.raises(InvalidStatus) as refused:
            await connect(daemon.url).__aenter__()
        assert refused.value.response.status_code == 503
        assert await health(daemon.addresses[0]) == 503
        byes = await asyncio.gather(*(read_bye(client) for client in clients))
        assert all(0 <= bye["retry_after_ms"] <= 2000 for bye in byes)
        assert len({bye["retry_after_ms"] for bye in byes}) > 10
        await daemon.until("retired")  # also whoever did not go by itself
        daemon.signal(signal.SIGUSR2)
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert len(re.findall(r"retiring .*seconds=1", daemon.said)) == 1
        assert "connections=0 signal='SIGTERM'" in daemon.said


async def test_usr1_is_ignored() -> None:
    async with serving("--listen", "127.0.0.1:0") as daemon, connect(daemon.url) as client:
        await client.recv()
        daemon.signal(signal.SIGUSR1)
        await client.send('{"op":"ping","id":1}')
        assert json.loads(await client.recv()) == {"op": "pong", "id": 1}
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


async def test_client_is_served_until_its_bye(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\n[limits]\ndrain_timeout = 3600\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        clients = [await connect(daemon.url) for _ in range(3)]
        for client in clients:
            await client.recv()
        daemon.signal(signal.SIGUSR2)
        await daemon.until("retiring")
        # One of them goes first, at once; the next one would in a quarter of an hour.
        byes = [asyncio.create_task(read_bye(client)) for client in clients]
        await asyncio.wait(byes, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        served = [client for client, goodbye in zip(clients, byes, strict=True) if not goodbye.done()]
        assert len(served) == 2
        for goodbye in byes:
            goodbye.cancel()
        await asyncio.gather(*byes, return_exceptions=True)
        for client in served:
            assert (await ask(client, "subscribe", topic="a"))["op"] == "ok"
        daemon.signal(signal.SIGTERM)
        assert {(await read_bye(client))["op"] for client in served} == {"bye"}
        assert await daemon.ended() == 0


# Addresses


async def peer_of(daemon: Daemon, forwarded: str) -> str:
    """The address that the broker has of a client for which a proxy says this."""
    async with connect(daemon.url, additional_headers={"X-Forwarded-For": forwarded}):
        line = await daemon.until("session opened")
    return line.split("peer=")[1].split()[0].strip("'")


async def test_trusted_proxies_apply_and_can_be_reloaded(tmp_path: Path) -> None:
    config = '[server]\nlisten = ["127.0.0.1:0"]\ntrusted_proxies = ["192.0.2.0/24", "127.0.0.0/8"]\n'
    config += '[log]\nlevel = "debug"\n'
    async with launched(folder=tmp_path, config=config) as daemon:
        await daemon.started()
        assert await peer_of(daemon, "198.51.100.1, 203.0.113.7, 192.0.2.5") == "203.0.113.7"
        daemon.configure(config.replace("127.0.0.0/8", "127.9.0.0/16"))
        daemon.signal(signal.SIGHUP)
        assert "changed=['server.trusted_proxies']" in await daemon.until("reloaded")
        assert (await peer_of(daemon, "203.0.113.7")).startswith("127.0.0.1:")
        daemon.configure(config.replace("127.0.0.0/8", "127.0.0.1/8"))
        daemon.signal(signal.SIGHUP)
        assert "`127.0.0.1/8` is no network" in await daemon.until("reload failed")


async def test_connections_per_address_are_bounded(tmp_path: Path) -> None:
    server = '[server]\nlisten = ["127.0.0.1:0"]\ntrusted_proxies = ["127.0.0.1"]\n'
    limit = server + "[limits]\nmax_connections_per_address = 2\n"

    def come(forwarded: str) -> connect:
        return connect(daemon.url, additional_headers={"X-Forwarded-For": forwarded}, proxy=None)

    async def refused(forwarded: str) -> bool:
        with pytest.raises(InvalidStatus) as refusal:
            await come(forwarded).__aenter__()
        response = refusal.value.response
        assert int(response.headers["Retry-After"]) >= 1
        return response.status_code == 429

    async with launched("--admin", "127.0.0.1:0", folder=tmp_path, config=limit) as daemon:
        await daemon.started()
        first, second = await come("203.0.113.7"), await come("203.0.113.7")
        assert await refused("203.0.113.7")
        assert await refused("198.51.100.1, 203.0.113.7")  # what it says of itself does not help
        others = [await come(f"2001:db8::{n}") for n in (1, 2)]
        assert await refused("2001:db8::ffff:3")
        others.append(await come("203.0.113.8"))
        metrics = await get(daemon.admin, "/metrics")
        assert 'wsbroker_connections_refused_total{reason="address_limit"} 3.0' in metrics.body
        # A place that becomes free is taken.
        await first.close()
        async with asyncio.timeout(TIMEOUT):
            while True:
                with contextlib.suppress(InvalidStatus):
                    first = await come("203.0.113.7")
                    break
        assert await refused("203.0.113.7")
        # Without a limit there is none; set again, it counts who is there already.
        for config, changed in ((server, 1), (limit, 2)):
            daemon.configure(config)
            daemon.signal(signal.SIGHUP)
            await daemon.until("reloaded")
            if changed == 1:
                others.append(await come("203.0.113.7"))
        assert await refused("203.0.113.7")
        await second.close()
        await first.close()
        async with asyncio.timeout(TIMEOUT):
            while True:
                with contextlib.suppress(InvalidStatus):
                    others.append(await come("203.0.113.7"))
                    break
        assert await refused("203.0.113.7")
        for client in others:
            await client.close()


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_broker_with_status_0(number: signal.Signals) -> None:
    async with serving() as daemon:
        daemon.signal(number)
        assert await daemon.ended() == 0
        assert f"signal='{number.name}'" in daemon.said
        assert "Traceback" not in daemon.said
        assert "error" not in daemon.said


async def test_clients_get_bye_and_a_close() -> None:
    async with serving() as daemon, connect(daemon.url) as client:
        await client.recv()
        await client.send('{"op":"subscribe","id":1,"topic":"a"}')
        await client.recv()
        daemon.signal(signal.SIGTERM)
        bye = json.loads(await client.recv())
        assert bye["op"] == "bye"
        assert 0 <= bye["retry_after_ms"] <= 5000
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert await daemon.ended() == 0


async def test_drain_timeout_bounds_the_wait_for_clients(tmp_path: Path) -> None:
    config = "[limits]\ndrain_timeout = 0.2\nclose_timeout = 3600"
    async with serving("--listen", "127.0.0.1:0", folder=tmp_path, config=config) as daemon, mute(daemon.addresses[0]):
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.said


async def test_second_signal_ends_the_broker_at_once(tmp_path: Path) -> None:
    config = "[limits]\ndrain_timeout = 3600\nclose_timeout = 3600"
    async with serving("--listen", "127.0.0.1:0", folder=tmp_path, config=config) as daemon, mute(daemon.addresses[0]):
        daemon.signal(signal.SIGTERM)
        await daemon.until("draining")
        daemon.signal(signal.SIGINT)
        assert await daemon.ended() == 128 + signal.SIGINT
        assert re.search(r"warning .*second signal: exiting at once +signal='SIGINT'", daemon.said)
        assert "Traceback" not in daemon.said


async def test_shutdown_refuses_connections_and_frees_the_address() -> None:
    async with serving() as daemon, connect(daemon.url) as client:
        await client.recv()
        daemon.signal(signal.SIGTERM)
        await daemon.until("draining")
        with pytest.raises(ConnectionRefusedError):
            await connect(daemon.url).__aenter__()
        assert await daemon.ended() == 0
        async with serving("--listen", daemon.addresses[0]) as next_one:
            assert next_one.addresses == daemon.addresses


# The limits of a process


async def test_more_clients_than_descriptors_are_refused_safely() -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))

    async with launched("--listen", "127.0.0.1:0", before=few) as daemon:
        await daemon.started()
        capacity = int(daemon.log[-1].split("max_connections=")[1].split()[0])
        outcomes = await asyncio.gather(*(connect(daemon.url) for _ in range(capacity)))
        for _ in range(50):
            with pytest.raises(InvalidStatus) as refused:
                await connect(daemon.url, proxy=None).__aenter__()
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["Retry-After"]
        # Silent ones take up what is left; beyond them connections are closed, and the broker goes on.
        host, _, port = daemon.addresses[0].rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(100)]
        await until(lambda: sum(reader.at_eof() or reader.exception() is not None for reader, _ in silent) > 50)
        assert len(os.listdir(f"/proc/{daemon.process.pid}/fd")) < 160  # noqa: PTH208 -- one line
        for _, writer in silent:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in silent), return_exceptions=True)
        for client in outcomes:
            await client.close()
        async with asyncio.timeout(TIMEOUT):
            while True:
                try:
                    client = await connect(daemon.url)
                except (InvalidStatus, ConnectionError):
                    continue
                break
        await client.close()
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert "connection limit reached" in daemon.said
        assert "Traceback" not in daemon.said
