"""TLS on the client listener: what the certificate may be, and real clients that come by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from websockets.frames import Close
from websockets.sync.client import connect as connect_sync

from broker.config import Server, parse_address
from broker.errors import ConfigError
from broker.net.certificate import read_validity
from broker.net.limiter import Capacity
from broker.net.tls import Tls, load
from tests.fixtures_certificates import Pair, encrypt_key, loaded, make_pair, trusting
from tests.fixtures_node import PATIENCE, masked, serving
from tests.net.harness import TIMEOUT, Harness, harness, request, until

pytestmark = pytest.mark.needs("openssl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("certificates"))


# The certificate


def mistakes(certificate: Path, key: Path) -> list[str]:
    with pytest.raises(ConfigError) as wrong:
        load(Server(certificate=str(certificate), key=str(key)))
    return [str(problem) for problem in wrong.value.problems]


def test_no_certificate_means_no_tls() -> None:
    assert load(Server()) is None


def test_both_missing_files_are_reported(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "a", tmp_path / "b") == [
        f"server.certificate: {tmp_path}/a cannot be read: No such file or directory",
        f"server.key: {tmp_path}/b cannot be read: No such file or directory",
    ]


def test_directory_as_key_is_refused(pair: Pair, tmp_path: Path) -> None:
    assert mistakes(pair.certificate, tmp_path) == [f"server.key: {tmp_path} cannot be read: Is a directory"]


def test_swapped_certificate_and_key_are_reported(pair: Pair) -> None:
    assert mistakes(pair.key, pair.certificate) == [
        f"server.certificate: {pair.key} is a private key, not a certificate",
        f"server.key: {pair.certificate} is a certificate, not a private key",
    ]


def test_kinds_of_wrong_files_are_named(pair: Pair, tmp_path: Path) -> None:
    def made(name: str, *command: str) -> str:
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True)
        return name

    def written(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return name

    certificate, key = str(pair.certificate), str(pair.key)
    ssh_key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    not_a_certificate = {
        made("csr", "openssl", "req", "-new", "-key", key, "-subj", "/CN=x", "-out"): "is a certificate request",
        written("ssh", ssh_key): "is a key for SSH",
        made("public", "openssl", "pkey", "-in", key, "-pubout", "-out"): "is a public key",
        made("pkcs7", "openssl", "crl2pkcs7", "-nocrl", "-certfile", certificate, "-out"): "is PKCS #7",
        made("trusted", "openssl", "x509", "-in", certificate, "-trustout", "-out"): (
            "is a certificate in a format of OpenSSL alone"
        ),
    }
    for name, said in not_a_certificate.items():
        file = tmp_path / name
        assert mistakes(file, pair.key) == [f"server.certificate: {file} {said}, not a certificate"]
    for name in ("csr", "ssh", "public"):
        file = tmp_path / name
        assert mistakes(pair.certificate, file) == [f"server.key: {file} {not_a_certificate[name]}, not a private key"]
    der = "is in the binary format DER or PKCS #12; convert it to PEM with openssl"
    bundle = ("openssl", "pkcs12", "-export", "-in", certificate, "-inkey", key, "-passout", "pass:", "-out")
    other = {
        made("cert.der", "openssl", "x509", "-in", certificate, "-outform", "DER", "-out"): der,
        made("key.der", "openssl", "pkey", "-in", key, "-outform", "DER", "-out"): der,
        made("both.p12", *bundle): der,
        written("bom", b"\xef\xbb\xbf" + pair.certificate.read_bytes() + pair.key.read_bytes()): (
            "begins with a byte order mark; save it without"
        ),
    }
    for name, said in other.items():
        file = tmp_path / name
        assert mistakes(file, file) == [f"server.certificate: {file} {said}", f"server.key: {file} {said}"]
    for name, data, said in (("empty", b" \n", "is empty, not %s"), ("text", b"hello", "holds no %s in PEM format")):
        file = tmp_path / written(name, data)
        article = "a " if name == "empty" else ""
        assert mistakes(file, file) == [
            f"server.certificate: {file} {said % f'{article}certificate'}",
            f"server.key: {file} {said % f'{article}private key'}",
        ]


def test_certificate_in_place_of_the_key_is_named(pair: Pair) -> None:
    assert mistakes(pair.certificate, pair.certificate) == [
        f"server.key: {pair.certificate} is a certificate, not a private key"
    ]


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_key_of_another_certificate_is_refused(pair: Pair, tmp_path: Path, kind: str) -> None:
    other = make_pair(tmp_path, "other", kind)
    assert mistakes(pair.certificate, other.key) == [
        f"server.key: {other.key} is a private key, but of another certificate than {pair.certificate}"
    ]


def test_encrypted_key_is_refused_without_a_prompt(tmp_path: Path) -> None:
    encrypted = encrypt_key(make_pair(tmp_path))
    assert mistakes(*encrypted) == [
        f"server.key: {encrypted.key} is encrypted; the broker has no passphrase for it; "
        f"decrypt it: openssl pkey -in {encrypted.key} -out plain.pem"
    ]


@pytest.mark.parametrize("part", ["start", "all but nine bytes", "other first letter"])
def test_damaged_certificate_or_key_is_named(pair: Pair, tmp_path: Path, part: str) -> None:
    damaged = tmp_path / "damaged.pem"

    def damage(text: str) -> None:
        half = len(text) // 2
        parts = {"start": text[:half], "all but nine bytes": text[:half] + text[half + 9 :]}
        damaged.write_text(parts.get(part) or text.replace("M", "N", 1))

    damage(pair.certificate.read_text())
    assert mistakes(damaged, pair.key) == [
        f"server.certificate: {damaged} holds a certificate that cannot be decoded; is the file complete?"
    ]
    damage(pair.key.read_text())
    assert mistakes(pair.certificate, damaged) == [
        f"server.key: {damaged} holds a private key that cannot be decoded; is the file complete?"
    ]


def test_pipe_or_endless_file_as_certificate_or_key_is_refused(pair: Pair, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused = f"{pipe} cannot be read: it is a pipe or a terminal, and not a file"
    assert mistakes(pipe, pipe) == [f"server.certificate: {refused}", f"server.key: {refused}"]
    endless = Path("/dev/zero")
    assert mistakes(pair.certificate, endless) == [f"server.key: {endless} cannot be read: it is larger than 4 MiB"]
    assert read_validity(str(pipe)) is None


def test_key_and_certificate_may_share_a_file(pair: Pair, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())
    assert load(Server(certificate=str(both), key=str(both))) is not None


# The handshake


async def test_tls_below_1_2_is_refused(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        old = trusting(pair)
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await open_tls(opened, old)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = trusting(pair)
            context.minimum_version = context.maximum_version = version
            _, writer = await open_tls(opened, context)
            assert writer.get_extra_info("ssl_object").version() == version.name.replace("v1_", "v1.")
            await close(writer)
        await until(lambda: opened.limiter.connections == 0)


async def test_refusal_over_tls_is_an_http_answer(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        reader, writer = await open_tls(opened, trusting(pair))
        writer.write(request("GET /elsewhere HTTP/1.1"))
        assert (await asyncio.wait_for(reader.read(), TIMEOUT)).startswith(b"HTTP/1.1 404 ")
        await close(writer)
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.refused == {404: 1}


async def test_refused_tls_client_that_does_not_close_is_aborted(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.net.handshake.REFUSED_TIMEOUT", 0.1)
    async with harness(tls=Tls(loaded(pair))) as opened:
        silent = await asyncio.to_thread(raw_tls, opened, pair)
        silent.sendall(request("GET /elsewhere HTTP/1.1"))
        await until(lambda: opened.limiter.refused == {404: 1})
        await until(lambda: opened.limiter.connections == 0)
        silent.close()


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00"])
async def test_open_timeout_covers_the_tls_handshake(pair: Pair, sent: bytes) -> None:
    async with harness(tls=Tls(loaded(pair)), open_timeout=0.1) as opened:
        client = await opened.connect()
        client.send(sent)
        assert await client.rest() == b""
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.refused == {0: 1}


async def test_client_without_tls_is_told_so(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        reply = await opened.ask(request())
        assert reply.status == 400
        assert reply.body == "this port takes TLS only: the URL must begin with wss:// instead of ws://\n"
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.refused == {400: 1}
        assert opened.limiter.reasons == {"tls": 1}


async def test_bytes_on_a_tls_port_that_are_neither_tls_nor_http_are_counted(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        client = await opened.connect()
        client.send(b"\0" * 100)
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP/" not in await client.rest()
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.reasons == {"tls": 1}


async def test_plain_client_on_a_tls_port_that_sends_no_request_is_bounded(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair)), open_timeout=0.1) as opened:
        client = await opened.connect()
        client.send(b"GET / HTTP/1.1\r\n")
        assert await client.rest() == b""
        await until(lambda: opened.limiter.connections == 0)
        assert opened.limiter.reasons == {"timeout": 1}


async def test_disconnect_during_the_tls_handshake_is_cleaned_up(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        for way in ("close", "reset"):
            client = await opened.connect()
            client.send(b"\x16\x03\x01")
            await until(lambda: opened.limiter.connections == 1)
            await (client.close() if way == "close" else client.reset())
            await until(lambda: opened.limiter.connections == 0)


async def test_tls_socket_counts_towards_the_limit_from_accept(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair)), capacity=Capacity(2, 2)) as opened:
        silent = [await opened.connect() for _ in range(4)]
        await until(lambda: opened.limiter.connections == 4)
        assert await (await opened.connect()).rest() == b""
        assert opened.limiter.refused == {0: 1}
        for client in silent[2:]:
            await client.close()
        await until(lambda: opened.limiter.connections == 2)
        # There is no place, but enough beside them to be told so.
        reader, writer = await open_tls(opened, trusting(pair))
        writer.write(request())
        assert (await asyncio.wait_for(reader.read(), TIMEOUT)).startswith(b"HTTP/1.1 503 ")
        await close(writer)


async def test_shutdown_aborts_pending_tls_handshakes(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        in_tls = await opened.connect()
        reader, writer = await open_tls(opened, trusting(pair))
        await until(lambda: opened.limiter.connections == 2)
        opened.handshakes.close()
        assert await in_tls.rest() == b""
        assert (await asyncio.wait_for(reader.read(), TIMEOUT)).startswith(b"HTTP/1.1 503 ")
        await close(writer)
        await until(lambda: opened.limiter.connections == 0)


async def test_many_tls_clients_connect_at_once(pair: Pair) -> None:
    async with harness(tls=Tls(loaded(pair))) as opened:
        context = trusting(pair)
        clients = await asyncio.gather(*(open_tls(opened, context) for _ in range(100)))
        for _, writer in clients:
            writer.write(request())
        for reader, _ in clients:
            assert (await asyncio.wait_for(reader.readline(), TIMEOUT)).startswith(b"HTTP/1.1 101 ")
        assert opened.node.connections == 100
        for _, writer in clients:
            await close(writer)


async def test_tls_listener_pauses_without_descriptors(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("broker.net.listener.ACCEPT_RETRY_DELAY", 0.05)
    async with harness(tls=Tls(loaded(pair))) as opened:
        there = parse_address(opened.address)
        waiting = socket.create_connection((there.host, there.port))
        with no_descriptors_left():
            await asyncio.sleep(0.12)  # some pauses
        assert 1 <= capfd.readouterr().out.count("cannot accept") <= 4
        await until(lambda: opened.limiter.connections == 1)
        waiting.close()


async def test_new_certificate_applies_to_new_connections(pair: Pair, tmp_path: Path) -> None:
    tls = Tls(loaded(pair))
    other = make_pair(tmp_path, "other")
    async with harness(tls=tls) as opened:
        _, first = await open_tls(opened, trusting(pair))
        tls.context = loaded(other)
        _, second = await open_tls(opened, trusting(other))
        for writer, shown in ((first, pair), (second, other)):
            assert writer.get_extra_info("ssl_object").getpeercert(True) == shown.number
        first.write(request())
        await until(lambda: opened.node.connections == 1)
        await close(first)
        await close(second)


# What is said over it


async def test_commands_events_and_close_work_over_tls(pair: Pair) -> None:
    async with serving(pair=pair) as harness:
        subscriber, publisher = await harness.subscriber("a"), await harness.connect()
        for n in range(300):
            await publisher.tell("publish", topic="a", data=n)
        assert await subscriber.data(300) == list(range(300))
        assert harness.node.context.fast_publishes > 0
        assert str(harness.session(subscriber).peer).startswith("127.0.0.1:")
        await subscriber.close()
        await until(lambda: harness.node.connections == 1)


async def test_blocking_client_works_over_tls(pair: Pair) -> None:
    async with serving(pair=pair) as harness:

        def talk() -> Any:
            with connect_sync(harness.url, ssl=harness.context, proxy=None) as client:
                client.recv()
                client.send('{"op":"ping","id":1}')
                return json.loads(client.recv())

        assert await asyncio.to_thread(talk) == {"op": "pong", "id": 1}


async def test_large_messages_pass_over_tls_both_ways(pair: Pair) -> None:
    async with serving(pair=pair, max_size=2**24, max_outbox=2**25) as harness:
        subscriber, publisher = await harness.subscriber("a"), await harness.connect()
        for size in (16_384, 65_536, 1_000_000, 8_000_000):
            await publisher.tell("publish", topic="a", data="x" * size)
            [data] = await subscriber.data(1)
            assert len(data) == size
        await publisher.nothing()


async def test_pipelined_large_messages_arrive_in_order_over_tls(pair: Pair) -> None:
    async with serving(pair=pair, max_queue=10_000, max_outbox=2**27) as harness:
        subscribers = [await harness.subscriber("a") for _ in range(3)]
        publisher = await harness.connect()
        for n in range(200):
            await publisher.tell("publish", topic="a", data=[n, "x" * 100_000])
        for subscriber in subscribers:
            assert [n for n, _ in await subscriber.data(200)] == list(range(200))


async def test_slow_tls_reader_gets_gaps(pair: Pair) -> None:
    async with serving(pair=pair, max_queue=8, ping_interval=0) as harness:
        slow = await harness.subscriber("a")
        other = await harness.subscriber("a", max_queue=10_000)
        publisher = await harness.connect()
        slow.socket.transport.pause_reading()
        session = harness.session(slow)
        count = 0
        while not session.connection.blocked or not session.subscriptions["a"].dropped:  # type: ignore[index]
            answer = await publisher.ask("publish", topic="a", data=[count, "x" * 50_000])
            assert answer["receivers"] == 2
            count += 1
        assert harness.node.context.queued <= 8
        assert [n for n, _ in await other.data(count)] == list(range(count))
        slow.socket.transport.resume_reading()
        seen = missed = 0
        last = -1
        while seen + missed < count:
            message = await slow.next()
            if message["op"] == "gap":
                missed += message["missed"]
            else:
                seen += 1
                assert message["data"][0] > last
                last = message["data"][0]
        assert missed > 0
        assert last == count - 1
        await until(lambda: not session.connection.blocked)
        # It keeps up again: nothing is left behind in a transport that was paused.
        await publisher.ask("publish", topic="a", data="last")
        assert await slow.data(1) == ["last"]


async def test_paused_tls_client_is_read_again(pair: Pair) -> None:
    async with serving(pair=pair) as harness:
        client = await harness.connect()
        connection = harness.session(client).connection
        connection.pause()
        await client.tell("ping", id=1)
        await client.tell("publish", topic="a", id=2, data="x" * 600_000)
        await client.tell("ping", id=3)
        connection.resume()
        assert await client.answer(1) == {"op": "pong"}
        assert (await client.answer(2))["op"] == "ok"
        assert await client.answer(3) == {"op": "pong"}


async def test_invalid_frame_over_tls_is_closed_with_1002(pair: Pair) -> None:
    async with serving(pair=pair, close_timeout=0.2) as harness:
        client = await harness.connect()
        client.socket.transport.write(b"\xff\xff\xff\xff")
        closed = await client.closed()
        assert closed is not None
        assert closed.code == 1002
        await until(lambda: not harness.node.connections)


async def test_tls_client_that_does_not_close_is_aborted(pair: Pair) -> None:
    async with serving(pair=pair, close_timeout=0.1) as harness:
        host, _, port = harness.address.rpartition(":")
        silent = await asyncio.to_thread(raw_tls_at, host, int(port), pair)
        silent.sendall(request(host=harness.address))
        await until(lambda: len(harness.node.sessions) == 1)
        silent.sendall(masked(b"\x03\xe8", opcode=8))  # type: ignore[arg-type]  # its close, and then nothing more
        await until(lambda: not harness.node.connections)
        silent.close()


async def test_drain_sends_bye_to_all_tls_clients(pair: Pair) -> None:
    async with serving(pair=pair, max_queue=1000) as harness:
        clients = [await harness.subscriber("a") for _ in range(20)]
        publisher = await harness.connect()
        for n in range(100):
            await publisher.tell("publish", topic="a", data=[n, "x" * 10_000], id=n)
        assert (await publisher.answer(99))["op"] == "ok"
        await harness.node.drain(PATIENCE)
        assert harness.node.connections == 0
        answers = await publisher.remaining_messages()
        assert [message["op"] for message in answers] == ["ok"] * 99 + ["bye"]
        for client in clients:
            assert await client.closed() == Close(1001, "going_away")
            assert [message["op"] for message in await client.remaining_messages()] == ["event"] * 100 + ["bye"]


async def open_tls(opened: Harness, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    there = parse_address(opened.address)
    return await asyncio.wait_for(asyncio.open_connection(there.host, there.port, ssl=context), TIMEOUT)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await asyncio.gather(asyncio.wait_for(writer.wait_closed(), TIMEOUT), return_exceptions=True)


def raw_tls(opened: Harness, pair: Pair) -> ssl.SSLSocket:
    """A client that does nothing by itself, the answer to the end of TLS included."""
    there = parse_address(opened.address)
    return raw_tls_at(there.host, there.port, pair)


def raw_tls_at(host: str, port: int, pair: Pair) -> ssl.SSLSocket:
    return trusting(pair).wrap_socket(socket.create_connection((host, port)), server_hostname="localhost")


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Take away the right to open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
