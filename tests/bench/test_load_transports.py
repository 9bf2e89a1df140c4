"""The load program over Unix sockets and TLS, with compression, and over byte streams that nobody framed for it."""

import asyncio
import json
import re
import ssl
import subprocess
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory

from bench.peers import Talk, event
from tests.bench.loading import RELAY, load, relay

pytestmark = pytest.mark.needs("openssl")

SHORT = {"subscribers": 6, "topics": 3, "window": 5, "warmup": 0.02, "duration": 0.1}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A server's context with a certificate that nobody trusts."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def publishes(output: bytes) -> int:
    """How many events were published; every one of them was delivered to the two subscribers of its topic."""
    result = json.loads(output)
    assert result["total_deliveries"] == 2 * result["total_publishes"] > 0
    return int(result["total_publishes"])


async def test_load_over_a_unix_socket(tmp_path: Path) -> None:
    async with relay(path=tmp_path / "relay") as server:
        status, output, complaint = await load("publish", f"unix:{tmp_path / 'relay'}", **SHORT)
    assert (status, complaint) == (0, "")
    assert publishes(output) == server.published


async def test_load_over_tls_without_verification(certificate: ssl.SSLContext) -> None:
    names: list[str | None] = []
    certificate.sni_callback = lambda _, name, __: names.append(name)
    async with relay(tls=certificate) as server:
        status, output, complaint = await load("publish", server.port, tls=1, host="events.example", **SHORT)
    assert (status, complaint) == (0, "")
    assert publishes(output) == server.published
    assert set(names) == {"events.example"}


async def test_gives_up_where_tls_is_expected_and_there_is_none() -> None:
    async with relay() as server:
        status, _, complaint = await load("publish", server.port, tls=1, **SHORT)
    assert status == 1
    assert re.fullmatch(r"load: connection \d: the TLS handshake failed\n", complaint)


async def test_load_over_ipv6() -> None:
    async with serve(lambda connection: connection.wait_closed(), "::1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        plain: dict[str, float | str] = {"subscribe": "", "subscriber_greetings": 0}
        status, _, complaint = await load("open", f"[::1]:{port}", connections=5, base=1, settle=0, **plain)
    assert (status, complaint) == (0, "")


async def test_handshake_sends_the_expected_headers() -> None:
    async with relay() as server:
        status, _, complaint = await load(
            "publish", server.port, host="a.example", path="/s/t%t", publisher_path="/p", **{**SHORT, "topics": 1}
        )
    assert (status, complaint) == (0, "")
    assert sorted(set(server.heads)) == ["/p a.example", "/s/t00000 a.example"]


async def test_handshake_sends_extra_headers() -> None:
    def refuse(connection: ServerConnection, request: object) -> object:
        return connection.respond(401, connection.request.headers["Authorization"])  # type: ignore[union-attr]

    async with serve(lambda _: asyncio.sleep(0), "127.0.0.1", 0, process_request=refuse) as server:  # type: ignore[arg-type]
        port = next(iter(server.sockets)).getsockname()[1]
        status, _, complaint = await load("open", port, connections=2, base=0, header="Authorization: Bearer x")
    assert (status, complaint) == (1, "load: the server refused the handshake: HTTP/1.1 401 Unauthorized\n")


async def test_compressed_events_are_recognized() -> None:
    deflate = ServerPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)
    async with relay(deflate=deflate) as server:
        status, output, complaint = await load("publish", server.port, deflate=1, **SHORT)
    assert (status, complaint) == (0, "")
    assert publishes(output) == server.published
    learned = bytes.fromhex(json.loads(output)["learned"])
    text = zlib.decompressobj(wbits=-15).decompress(learned + b"\x00\x00\xff\xff")
    assert text.decode() == str(RELAY["event"]).replace("%t", "00000")
    assert json.loads(output)["event_bytes"] == len(learned) + 4


async def test_gives_up_where_nothing_is_compressed() -> None:
    async with relay() as server:
        status, output, complaint = await load("publish", server.port, deflate=1, **SHORT)
    assert (status, output) == (1, b"")
    assert complaint == "load: the server does not take permessage-deflate without context takeover\n"


# A server that takes its time, and pings meanwhile.


class Slow:
    """Reads frame by frame, pings a publisher for each, and passes events on. What is no frame at its place ends it."""

    def __init__(self, frame: bytes, event: bytes) -> None:
        self.frame = frame
        self.event = event
        self.subscribers: list[asyncio.StreamWriter] = []
        self.published = 0
        self.pings = 0
        self.pongs = 0
        self.complaints: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        accept = b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n%b\r\n\r\n" % accept)
        try:
            while self.take(head := await reader.readexactly(6), await reader.readexactly(_rest(head)), writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    def take(self, head: bytes, rest: bytes, writer: asyncio.StreamWriter) -> bool:
        """One frame, in two pieces."""
        if head + rest == self.frame:
            self.published += 1
            self.pings += 1
            writer.write(b"\x89\x05%05d" % self.pings)
            for subscriber in self.subscribers:
                subscriber.write(self.event)
        elif head[:2] == b"\x8a\x85":
            self.pongs += 1
            if bytes(byte ^ head[2 + i % 4] for i, byte in enumerate(rest)) != b"%05d" % self.pongs:
                self.complaints.append(head + rest)
        elif self.published == 0 and head[0] == 0x81 and len(rest) < 20:
            self.subscribers.append(writer)
            writer.write(b"\x81\x02ok")
        else:
            self.complaints.append(head + rest)
        return not self.complaints


def _rest(head: bytes) -> int:
    """How many bytes follow the first six of a masked frame, of up to 64 kB."""
    length = head[1] & 0x7F
    return length if length < 126 else int.from_bytes(head[2:4], "big") + 2


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("pace", [{"rate": 1_000_000}, {"window": 100}])
async def test_pong_is_not_written_inside_a_publish(
    certificate: ssl.SSLContext, tls: bool, pace: dict[str, float]
) -> None:
    text = event(Talk(30_000)).replace("%t", "00000").encode()
    length, mask = len(text).to_bytes(2, "big"), b"\x9d\x3b\x51\xe6"
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))
    slow = Slow(b"\x81\xfe" + length + mask + masked, b"\x81\x7e" + length + text)
    # Little is read ahead, so that the publisher's socket is full all the time.
    listening = asyncio.start_server(slow.serve, "127.0.0.1", 0, limit=4096, ssl=certificate if tls else None)
    async with await listening as server:
        big = event(Talk(30_000))
        status, output, complaint = await load(
            "publish",
            server.sockets[0].getsockname()[1],
            subscribers=1,
            tls=int(tls),
            warmup=0,
            duration=0.3,
            publish=big,
            event=big,
            **pace,
        )
    assert slow.complaints == []
    assert (status, complaint) == (0, "")
    assert json.loads(output)["total_publishes"] == slow.published
    # The last one may still be on its way when the load ends.
    assert slow.pings - 1 <= slow.pongs <= slow.pings > 50


# Byte streams: a little of what NATS and Redis speak. Each answer is cut at every third byte.

STREAM = {
    "subscribe": "SUB t%t\r\nPING\r\n",
    "answer": "PONG\r\n",
    "hello": "PING\r\n",
    "publisher_answer": "PONG\r\n",
    "publish": "PUB t%t\r\n",
    "event": "MSG t%t\r\n",
    "ping": "PING\r\n",
    "pong": "PONG\r\n",
}


class Stream:
    """A server of lines. It pings each subscriber after every seventh event."""

    def __init__(self) -> None:
        self.published = 0
        self.pings = 0
        self.pongs = 0
        self.subscribers: defaultdict[bytes, list[asyncio.Queue[bytes]]] = defaultdict(list)

    def take(self, line: bytes, answers: "asyncio.Queue[bytes]") -> None:
        """Does what a line of a client says."""
        verb, _, topic = line.partition(b" ")
        if verb == b"PING":
            answers.put_nowait(b"PONG\r\n")
        elif verb == b"PONG":
            self.pongs += 1
        elif verb == b"SUB":
            self.subscribers[topic].append(answers)
        elif verb == b"PUB":
            self.published += 1
            for queue in self.subscribers[topic]:
                queue.put_nowait(b"MSG %b\r\n" % topic)
                if self.published % 7 == 0:
                    self.pings += 1
                    queue.put_nowait(b"PING\r\n")

    async def serve_socket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        sending = asyncio.create_task(self._write(answers, writer))
        async for line in reader:
            self.take(line.rstrip(), answers)
        sending.cancel()
        writer.close()

    async def _write(self, answers: "asyncio.Queue[bytes]", writer: asyncio.StreamWriter) -> None:
        while True:
            for piece in pieces(await answers.get()):
                writer.write(piece)
                await writer.drain()

    async def serve_websocket(self, connection: ServerConnection) -> None:
        answers: asyncio.Queue[bytes] = asyncio.Queue()

        async def write() -> None:
            while True:
                for piece in pieces(await answers.get()):
                    await connection.send(piece)

        sending = asyncio.create_task(write())
        async for message in connection:
            assert isinstance(message, bytes)
            for line in message.splitlines():
                self.take(line, answers)
        sending.cancel()


def pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 3):
        yield data[start : start + 3]


@asynccontextmanager
async def stream(framing: str) -> AsyncIterator[tuple[Stream, int]]:
    started = Stream()
    if framing == "raw":
        async with await asyncio.start_server(started.serve_socket, "127.0.0.1", 0) as server:
            yield started, server.sockets[0].getsockname()[1]
    else:
        async with serve(started.serve_websocket, "127.0.0.1", 0, compression=None, close_timeout=0.1) as server:
            yield started, next(iter(server.sockets)).getsockname()[1]


@pytest.mark.parametrize("framing", ["raw", "stream"])
async def test_load_over_a_raw_byte_stream(framing: str) -> None:
    async with stream(framing) as (server, port):
        status, output, complaint = await load("publish", port, framing=framing, **STREAM, **SHORT)
    assert (status, complaint) == (0, "")
    assert publishes(output) == server.published
    assert server.pongs > 0


@pytest.mark.parametrize("framing", ["raw", "stream"])
async def test_gives_up_on_unexpected_stream_bytes(framing: str) -> None:
    async with stream(framing) as (_, port):
        status, output, complaint = await load(
            "publish", port, framing=framing, **{**STREAM, "event": "MSG x%t\r\n"}, **SHORT
        )
    assert (status, output) == (1, b"")
    assert "got something that is not an event: MSG" in complaint
