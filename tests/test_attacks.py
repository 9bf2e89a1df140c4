"""Attacks on a running broker over its socket, while the events of another client go on.

`docs/security.md` lists the weaknesses; each names its tests.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import Frame, Opcode

from broker.auth.api_keys import hash_key, make_key
from tests.auth.test_tokens import PRIVATE, pem
from tests.fixtures_daemon import Daemon, launched
from tests.net.harness import until

ROOT = Path(__file__).parent.parent
SECRET = "0123456789abcdef0123456789abcdef0123456789abcdef"
CONFIG = f"""
[server]
compression = true
[limits]
open_timeout = 2
auth_timeout = 3
[auth]
required = true
algorithms = ["HS256", "RS256"]
secret = "{SECRET}"
key = '''{pem(PRIVATE["RS256"]).decode()}'''
[[keys]]
name = "shop"
hash = "HASH"
roles = ["default"]
[[roles]]
name = "default"
subscribe = [">"]
publish = [">"]
"""
UPGRADE = "GET /{query} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{more}\r\n"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
API_KEY = make_key()
TIMEOUT = 20.0
GROWTH = 40 * 2**20
"""Bytes by which the memory of the broker may grow in an attack."""


def token(name: str = "alice") -> str:
    return jwt.encode({"sub": name, "exp": int(time.time()) + 600}, SECRET, "HS256")


class Victim:
    """The broker that is attacked, and a client whose events must go on."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.host, _, port = daemon.addresses[0].rpartition(":")
        self.port = int(port)
        self.received = 0
        self.writers: list[asyncio.StreamWriter] = []

    @property
    def memory(self) -> int:
        """Resident bytes of the broker."""
        return int(Path(f"/proc/{self.daemon.process.pid}/statm").read_text().split()[1]) * 4096

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        self.writers.append(writer)
        return reader, writer

    async def ask(self, more: str = "", *, query: str = "", host: str = "") -> int:
        """The status of the answer to a request for a WebSocket with more header lines."""
        reader, writer = await self.open()
        text = UPGRADE.format(query=query, host=host or f"localhost:{self.port}", more=KEY + more)
        writer.write(text.encode("latin-1"))
        head = await asyncio.wait_for(reader.readline(), TIMEOUT)
        writer.close()
        return int(head.split()[1])

    async def upgraded(self, more: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A WebSocket as raw streams."""
        reader, writer = await self.open()
        writer.write(UPGRADE.format(query="", host=f"localhost:{self.port}", more=KEY + more).encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT)
        assert head.startswith(b"HTTP/1.1 101 "), head
        return reader, writer

    async def close_code(self, frames: bytes, more: str = "") -> int:
        """Send frames without an identity; the close code that answers them."""
        reader, writer = await self.upgraded(more)
        writer.write(frames)
        received = b""
        while part := await asyncio.wait_for(reader.read(65_536), TIMEOUT):
            received += part
        writer.close()
        found = re.search(rb"\x88[\x02-\x7d](..)", received, re.DOTALL)
        assert found, received[-200:]
        return int.from_bytes(found[1], "big")

    async def watch(self) -> None:
        """Publish and receive, one event after the other, until cancelled."""
        async with self.client() as client:
            await client.send('{"op":"subscribe","topic":"watched"}')
            while True:
                await client.send(f'{{"op":"publish","topic":"watched","data":{self.received}}}')
                event = json.loads(await asyncio.wait_for(client.recv(), TIMEOUT))
                assert event["data"] == self.received
                self.received += 1
                await asyncio.sleep(0.002)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ClientConnection]:
        """A client that behaves."""
        headers = {"Authorization": f"Bearer {token()}"}
        async with connect(self.daemon.url, additional_headers=headers, proxy=None) as client:
            assert json.loads(await client.recv())["op"] == "welcome"
            yield client


@pytest.fixture
async def victim(tmp_path: Path) -> AsyncIterator[Victim]:
    """Under attack in the test; at its end the other client has had its events, and the memory has not grown."""
    arguments = ("--listen", "127.0.0.1:0", "--admin", "")
    async with launched(*arguments, folder=tmp_path, config=CONFIG.replace("HASH", hash_key(API_KEY))) as daemon:
        await daemon.started()
        log = asyncio.create_task(drain_log(daemon))
        found = Victim(daemon)
        watching = asyncio.create_task(found.watch())
        await until(lambda: found.received > 0)
        before = found.memory
        yield found
        seen = found.received
        await until(lambda: found.received >= seen + 5 or watching.done())
        assert not watching.done(), watching.exception()
        for writer in found.writers:
            writer.transport.abort()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert found.memory < before + GROWTH
        daemon.process.terminate()
        await log
        assert await daemon.process.wait() == 0
        assert "Traceback" not in daemon.said


async def drain_log(daemon: Daemon) -> None:
    while await daemon.line():
        pass


def masked(opcode: int, payload: bytes, *, fin: bool = True, rsv1: bool = False) -> bytes:
    frame = Frame(Opcode(opcode), payload, fin).serialize(mask=True)
    return bytes([frame[0] | 0x40 * rsv1]) + frame[1:]


def signed(header: dict[str, Any], key: bytes, claims: dict[str, Any] | None = None) -> str:
    """A token with this header as it stands, signed by HMAC with SHA-256."""
    payload = {"sub": "mallory", "exp": int(time.time()) + 600} if claims is None else claims
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, payload)]
    signature = hmac.digest(key, b".".join(parts), hashlib.sha256)
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


# Pages of other sites


async def test_cross_site_page_is_refused(victim: Victim) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://evil.example:80"):
        assert await victim.ask(f"Origin: {origin}\r\nAuthorization: Bearer {token()}\r\n") == 403


async def test_page_of_a_rebound_name_is_refused(victim: Victim) -> None:
    host = f"evil.example:{victim.port}"
    assert await victim.ask(f"Origin: http://{host}\r\nAuthorization: Bearer {token()}\r\n", host=host) == 403


# Frames, from clients without an identity


async def test_decompression_bomb_before_authentication_is_closed(victim: Victim) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(b'{"op":"auth","token":"' + b"x" * 200_000_000) + packer.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < 300_000
    offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
    assert await victim.close_code(masked(1, bomb.removesuffix(b"\0\0\xff\xff"), rsv1=True), offer) == 1009
    small = packer_of(b"x" * 1_000_000)
    assert await victim.close_code(masked(1, small, rsv1=True), offer) == 1009


def packer_of(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")


@pytest.mark.parametrize(
    ("length", "code"), [(1 << 63, 1002), ((1 << 64) - 1, 1002), ((1 << 63) - 1, 1009), (1 << 40, 1009)]
)
async def test_length_of_64_bits_is_refused(victim: Victim, length: int, code: int) -> None:
    head = b"\x81\xff" + length.to_bytes(8, "big") + b"\1\2\3\4"
    assert await victim.close_code(head) == code


@pytest.mark.parametrize("size", [0, 1])
async def test_endless_fragments_are_closed(victim: Victim, size: int) -> None:
    frames = masked(1, b"x" * size, fin=False) + masked(0, b"x" * size, fin=False) * 20_000
    assert await victim.close_code(frames) == 1009


async def test_large_message_before_authentication_is_closed(victim: Victim) -> None:
    assert await victim.close_code(masked(1, b"x" * 17_000)) == 1009


async def test_memory_before_authentication_is_bounded(victim: Victim) -> None:
    writers = []
    for _ in range(500):
        _, writer = await victim.upgraded()
        writer.write(masked(1, b"x" * 16_000, fin=False))  # and nothing more
        writers.append(writer)
    assert victim.received
    for writer in writers:
        writer.close()


async def test_slow_frames_are_closed_in_time(victim: Victim) -> None:
    reader, writer = await victim.upgraded()
    ended = asyncio.create_task(reader.read())
    for byte in masked(1, b'{"op":"auth","token":"' + b"x" * 10_000):
        writer.write(bytes([byte]))
        await asyncio.wait([ended], timeout=0.1)
        if ended.done():
            break
    assert (await ended).endswith((4500).to_bytes(2, "big") + b"unauthorized")


async def test_clients_without_identity_are_closed_in_time(victim: Victim) -> None:
    began = time.monotonic()
    assert await victim.close_code(b"") == 4500
    assert time.monotonic() - began < TIMEOUT


# The handshake


async def test_header_flood_is_refused(victim: Victim) -> None:
    for lines in ("X: y\r\n" * 100_000, f"X: {'y' * 10**6}\r\n", "X" * 10**6):
        reader, writer = await victim.open()
        try:
            writer.write(UPGRADE.format(query="", host="localhost", more=lines).encode())
            await writer.drain()
            assert (await asyncio.wait_for(reader.readline(), TIMEOUT)).split()[1] == b"431"
        except ConnectionResetError:
            pass  # it sent on after the answer
        writer.close()


async def test_slow_handshakes_are_closed_in_time(victim: Victim) -> None:
    streams = [await victim.open() for _ in range(200)]
    ended = asyncio.gather(*(read_end(reader) for reader, _ in streams))
    while not ended.done():
        for _, writer in streams:
            writer.write(b"G" if not writer.is_closing() else b"")
        await asyncio.sleep(0.2)
    assert set(await ended) == {b""}


async def read_end(reader: asyncio.StreamReader) -> bytes:
    """Read all until the end. A byte that was under way when the broker closed makes the end a reset."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(
    "header",
    [
        "," * 8000,
        "bearer.",
        "bearer." + "x" * 9000,
        ", ".join(["wsbroker.v1"] * 500),
        '"wsbroker.v1"',
        "wsbroker.v1;q=1",
        "wsbroker.v1, \\",
        "é",
        "wsbroker.v1\0",
        " \t ".join("bearer.a,b"),
    ],
    ids=lambda header: header[:20].encode("unicode_escape").decode(),
)
async def test_subprotocol_header_is_parsed_without_harm(victim: Victim, header: str) -> None:
    assert await victim.ask(f"Sec-WebSocket-Protocol: {header}\r\n") in (101, 400, 401)


# Tokens


async def refused(victim: Victim, *tokens: str) -> None:
    for each in tokens:
        assert await victim.ask(f"Authorization: Bearer {each}\r\n") == 401, each
        assert await victim.ask(f"Sec-WebSocket-Protocol: wsbroker.v1, bearer.{each}\r\n") == 401, each


async def test_url_in_a_token_is_never_asked(victim: Victim) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks"
    mine = rsa.generate_private_key(65537, 2048)
    claims = {"sub": "mallory", "exp": int(time.time()) + 600, "iss": url}
    jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(mine.public_key()))
    headers: list[dict[str, Any]] = [{"jku": url}, {"x5u": url}, {"jwk": jwk}, {"x5c": ["AAAA"]}, {"kid": url}]
    await refused(victim, *(jwt.encode(claims, mine, "RS256", header) for header in headers))
    server.close()
    await server.wait_closed()
    assert asked == []


async def test_algorithm_is_never_taken_from_the_token(victim: Victim) -> None:
    none = signed({"alg": "none", "typ": "JWT"}, b"").rpartition(".")[0] + "."
    public = pem(PRIVATE["RS256"])
    wrong = ("None", "nOnE", "HS384", "", "RS256")
    tokens = [none, none + "AAAA", *(signed({"alg": name}, SECRET.encode()) for name in wrong)]
    tokens.append(jwt.encode({"sub": "mallory", "exp": 2e9}, PRIVATE["ES256"], "ES256"))
    # The public key, which everybody knows, as a secret for HMAC.
    tokens += [signed({"alg": "HS256"}, key) for key in (public, public.strip(), b"", b"\0" * 32)]
    await refused(victim, *tokens)


async def test_critical_extensions_are_refused(victim: Victim) -> None:
    for crit in (["exp"], ["b64"], [], "exp", None, ["unknown"]):
        await refused(victim, signed({"alg": "HS256", "crit": crit, "b64": True, "exp": 1}, SECRET.encode()))


@pytest.mark.parametrize("kid", ["../../../../dev/null", "' OR 1=1 --", "x" * 3000, 1, ["a"], {"a": 1}, True, "\0"])
async def test_kid_selects_among_configured_keys_only(victim: Victim, kid: Any) -> None:
    await refused(victim, signed({"alg": "HS256", "kid": kid}, b""), signed({"alg": "RS256", "kid": kid}, b""))


async def test_guesses_of_an_api_key_are_refused_alike(victim: Victim) -> None:
    # Which characters of a guess are right must not show. How long it takes is for tests/auth/test_api_keys.py.
    guesses = [API_KEY[:size] + "x" * (len(API_KEY) - size) for size in range(4, len(API_KEY), 4)]
    guesses += ["wsb_", API_KEY[:-1], API_KEY + "x", hash_key(API_KEY).removeprefix("sha256:"), API_KEY.lower()]
    answers = set()
    for guess in guesses:
        reader, writer = await victim.open()
        more = f"{KEY}Authorization: Bearer {guess}\r\n"
        writer.write(UPGRADE.format(query="", host=f"localhost:{victim.port}", more=more).encode())
        answer = await asyncio.wait_for(reader.read(), TIMEOUT)
        answers.add(re.sub(rb"Date: .*?\r\n", b"", answer) if guess.startswith("wsb_") else answer[:12])
        writer.close()
    assert {answer[:12] for answer in answers} == {b"HTTP/1.1 401"}
    assert len(answers) == 2, "one answer for all guesses, and that to what is no API key"
    assert await victim.ask(f"Authorization: Bearer {API_KEY}\r\n") == 101


async def test_malformed_tokens_are_refused(victim: Victim) -> None:
    key = SECRET.encode()
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    claims: list[Any] = [
        {},
        {"sub": "a"},
        {"sub": "", "exp": 2e9},
        {"sub": ["a"], "exp": 2e9},
        {"sub": "a", "exp": "2e9"},
        {"sub": "a", "exp": 1e308 * 10},
        {"sub": "a", "exp": -1},
        {"sub": "a\nb", "exp": 2e9},
        {"sub": "a", "exp": 2e9, "roles": 1},
        {"sub": "a", "exp": 2e9, "roles": [1]},
        {"sub": "a", "exp": True},
        [],
        deep,
    ]
    await refused(victim, *(signed({"alg": "HS256"}, key, claim) for claim in claims))
    await refused(victim, ".", "..", "...", "a.b.c", "a" * 8000, signed({"alg": "HS256"}, b"other"), token()[:-2])


async def test_token_in_the_query_string_identifies_nobody(victim: Victim) -> None:
    for query in (f"?token={token()}", f"?access_token={token()}", f"?authorization=Bearer%20{token()}"):
        reader, writer = await victim.open()
        writer.write(UPGRADE.format(query=query, host=f"localhost:{victim.port}", more=KEY).encode())
        welcome = await asyncio.wait_for(reader.readuntil(b"}"), TIMEOUT)
        assert b"identity" not in welcome
        writer.close()
    assert token().rpartition(".")[2] not in victim.daemon.said


# Events


POISON = [
    b'{"op":"publish","topic":"watched.x","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"op":"publish","topic":"p","data":1e999999999}',
    b'{"op":"publish","topic":"p","data":' + b"9" * 100_000 + b"}",
    b'{"op":"publish","topic":"p","data":{"__proto__":{"a":1},"constructor":1}}',
    b'{"op":"publish","topic":"p","data":"\\ud800"}',
    b'{"op":"publish","topic":"p","data":"\\u0000"}',
    b'{"op":"publish","topic":"p","data":NaN}',
    b'{"op":"publish","topic":"' + b"a." * 100_000 + b'","data":1}',
    b'{"op":"subscribe","topic":"' + b"*." * 126 + b'>"}',
    b'{"op":"credit","topic":"p","add":99999999999999999999}',
    b'{"op":"ping","id":' + b"1" * 5000 + b"}",
    b'{"op":"publish","topic":"p","key":"' + b"k" * 100_000 + b'","data":1}',
]


async def test_poison_events_harm_nobody(victim: Victim) -> None:
    async with victim.client() as subscriber, victim.client() as attacker:
        await subscriber.send('{"op":"subscribe","topic":"p","id":"s"}')
        while '"id":"s"' not in str(await asyncio.wait_for(subscriber.recv(), TIMEOUT)):
            pass
        for number, poison in enumerate(POISON):
            await attacker.send(poison.decode())
            await attacker.send(f'{{"op":"publish","topic":"p","data":"after {number}","id":{number}}}')
            while f"after {number}" not in str(await asyncio.wait_for(subscriber.recv(), TIMEOUT)):
                pass


async def test_subscriber_that_does_not_read_holds_up_nobody(victim: Victim) -> None:
    reader, writer = await victim.upgraded(f"Authorization: Bearer {token('slow')}\r\n")
    writer.write(masked(1, b'{"op":"subscribe","topic":"p","max_queue":1000}'))
    async with victim.client() as publisher:
        for _ in range(3000):
            await publisher.send(f'{{"op":"publish","topic":"p","data":"{"x" * 10_000}"}}')
        await publisher.send('{"op":"ping","id":1}')
        assert "pong" in str(await asyncio.wait_for(publisher.recv(), TIMEOUT))
    assert not reader.at_eof()
    writer.close()


# The list


def test_each_weakness_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    named = {name for *_, tests in rows for name in re.findall(r"`(test_\w+)`", tests)}
    assert len(named) > 25
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in sources} == set()
    own = set(re.findall(r"^async def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    assert own <= named, "an attack that the list does not have"
