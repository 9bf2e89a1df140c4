"""The WebSocket underneath the client: opening it, reading and writing in batches, and every way in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from broker.errors import CloseCode
from tests.client.fake import Behaviour, FakeBroker, closing, refusing, running, saying
from tests.fixtures_certificates import make_pair
from tests.fixtures_node import serving
from wsbroker_client.errors import ClientError, Closed, NotABroker, Refused, Unreachable
from wsbroker_client.stream import Stream, check_url, open_stream

pytestmark = pytest.mark.needs("openssl")


class Kept:
    """A receiver that keeps all, each call by itself."""

    def __init__(self) -> None:
        self.calls: list[list[bytes]] = []
        self.failures: list[ClientError] = []
        self._changed = asyncio.Event()

    @property
    def messages(self) -> list[bytes]:
        return [message for call in self.calls for message in call]

    def on_messages(self, messages: list[bytes]) -> None:
        self.calls.append(messages)
        self._changed.set()

    def on_closed(self, failure: ClientError) -> None:
        self.failures.append(failure)
        self._changed.set()

    async def until(self, count: int) -> list[bytes]:
        while len(self.messages) < count:
            await self._change()
        return self.messages

    async def end(self) -> ClientError:
        while not self.failures:
            await self._change()
        (failure,) = self.failures
        return failure

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@contextlib.asynccontextmanager
async def connected(behaviour: Behaviour, **options: Any) -> AsyncIterator[tuple[FakeBroker, Stream, Kept]]:
    async with running(behaviour, **options) as fake:
        stream = await open_stream(fake.url)
        kept = Kept()
        stream.attach(kept)
        try:
            yield fake, stream, kept
        finally:
            await stream.shut_down()


@contextlib.asynccontextmanager
async def answering(answer: bytes | None) -> AsyncIterator[str]:
    """Run a server that reads a request, writes these bytes and closes; with None it does nothing at all."""

    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is not None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await ended.wait()


# Messages


async def test_messages_written_together_arrive_in_order_as_text() -> None:
    async def collect(fake: FakeBroker, connection: ServerConnection) -> None:
        for _ in range(3):
            message = await connection.recv()
            assert isinstance(message, str)
            fake.received.append({"text": message})
        fake.subscribed.set()

    async with connected(collect) as (fake, stream, _):
        await stream.write([b"one", "zwö".encode(), b"x" * 70_000])
        await fake.subscribed.wait()
        assert [command["text"] for command in fake.received] == ["one", "zwö", "x" * 70_000]


async def test_messages_of_one_read_are_delivered_in_one_call() -> None:
    many = [b"%d" % number for number in range(100)]

    async def corked(fake: FakeBroker, connection: ServerConnection) -> None:
        for message in many:
            connection.protocol.send_text(message)
        connection.send_data()

    async with connected(corked) as (_, _, kept):
        assert await kept.until(100) == many
        # The frames of `corked` are written one by one, so a read may still fall between two of them.
        assert len(kept.calls) < 50


async def test_messages_received_before_attach_are_kept() -> None:
    async with running(saying(b"early")) as fake:
        stream = await open_stream(fake.url)
        await (await stream.ping())  # what was sent before the pong is here when the pong is
        kept = Kept()
        stream.attach(kept)
        assert kept.messages == [b"early"]
        await stream.shut_down()


async def test_fragments_with_pings_between_them_are_joined() -> None:
    async def fragments(fake: FakeBroker, connection: ServerConnection) -> None:
        connection.protocol.send_text(b"a", fin=False)
        connection.protocol.send_ping(b"alive?")
        connection.protocol.send_continuation(b"", fin=False)
        connection.protocol.send_continuation(b"bc", fin=True)
        connection.protocol.send_binary(b"d", fin=True)
        connection.send_data()
        await connection.wait_closed()

    async with connected(fragments) as (_, _, kept):
        assert await kept.until(2) == [b"abc", b"d"]


async def test_reading_stops_while_paused() -> None:
    more = asyncio.Event()

    async def flood(fake: FakeBroker, connection: ServerConnection) -> None:
        await connection.send(b"first", text=True)
        await more.wait()
        await connection.send(b"second", text=True)
        await connection.recv()

    async with connected(flood) as (_, stream, kept):
        await kept.until(1)
        stream.pause()
        stream.pause()
        more.set()
        await stream.write([b"a message goes out all the same"])
        assert kept.messages == [b"first"]
        stream.resume()
        assert await kept.until(2) == [b"first", b"second"]


# The handshake


async def test_the_request_offers_the_protocol_and_carries_the_token() -> None:
    async with running(saying()) as fake:
        stream = await open_stream(fake.url + "/ws?x=1", token="secret")
        await stream.shut_down()
        (request,) = fake.requests
        assert request.path == "/ws?x=1"
        assert request.headers["Sec-WebSocket-Protocol"] == "wsbroker.v1"
        assert request.headers["Authorization"] == "Bearer secret"
        assert "Sec-WebSocket-Extensions" not in request.headers
        assert "Origin" not in request.headers


async def test_a_unix_socket_is_reached_by_its_path(tmp_path: Path) -> None:
    async with running(saying(b"hello"), unix=str(tmp_path / "s")) as fake:
        stream = await open_stream(fake.url)
        kept = Kept()
        stream.attach(kept)
        assert await kept.until(1) == [b"hello"]
        await stream.shut_down()


async def test_environment_proxy_is_not_used_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ws_proxy", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with running(saying()) as fake:
        await (await open_stream(fake.url)).shut_down()
        await (await open_stream(fake.url.replace("127.0.0.1", "localhost"))).shut_down()
    with pytest.raises(Unreachable, match=r"through the proxy|Connection refused"):
        await open_stream("ws://192.0.2.1")


@pytest.mark.parametrize(
    "url",
    [
        "ws://localhost",
        "ws://[::1]:8765/ws",
        "wss://example.org/?a=b",
        "ws://me:secret@host",
        "unix:/run/wsbroker.sock",
    ],
)
def test_url_is_parsed(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    "url", ["", "localhost:8765", "http://localhost", "unix:relative", "unix:", "ws://", "ws://h#f"]
)
async def test_invalid_url_is_refused_before_connecting(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_url(url)
    with pytest.raises(ValueError, match=r"."):
        await open_stream(url)


async def test_connect_to_a_closed_port_fails() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(Unreachable) as caught:
            await open_stream(f"ws://me:secret@127.0.0.1:{port}")
    assert str(caught.value) == f"cannot connect to ws://127.0.0.1:{port}: Connection refused"


async def test_connect_to_a_host_with_several_closed_addresses_fails() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match=r": Connection refused$"):
            await open_stream(f"ws://localhost:{bound.getsockname()[1]}")


async def test_connect_to_a_missing_unix_socket_fails(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=r"/s: No such file or directory$"):
        await open_stream(f"unix:{tmp_path}/s")


async def test_connect_to_an_unknown_host_fails() -> None:
    with pytest.raises(Unreachable, match=r"cannot connect to ws://nobody\.invalid: (?!\[)"):
        await open_stream("ws://nobody.invalid")


async def test_connect_times_out_without_an_answer() -> None:
    async with answering(None) as url:
        with pytest.raises(Unreachable, match=r"did not answer within 0\.1 seconds"):
            await open_stream(url, open_timeout=0.1)


async def test_connect_fails_when_the_server_closes_without_an_answer() -> None:
    async with answering(b"") as url:
        with pytest.raises(Unreachable, match=r"closed the connection before it answered"):
            await open_stream(url)


@pytest.mark.parametrize("reply", [b"220 mail ESMTP\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n"])
async def test_connect_to_a_server_of_another_protocol_fails(reply: bytes) -> None:
    async with answering(reply) as url:
        with pytest.raises(NotABroker, match=r"is not a wsbroker: "):
            await open_stream(url)


async def test_refusal_has_the_text_of_the_broker() -> None:
    refuse = refusing(HTTPStatus.FORBIDDEN, "origin https://a.example is not allowed\n")
    async with running(process_request=refuse) as fake:
        with pytest.raises(Refused) as caught:
            await open_stream(fake.url)
    message = f"{fake.url} refused the connection: HTTP 403: origin https://a.example is not allowed"
    assert (str(caught.value), caught.value.status, caught.value.retry) == (message, 403, False)


@pytest.mark.parametrize("body", ["", "<html>…", "two\nlines", "\x1b[31mred"])
async def test_refusal_without_text_is_explained_from_the_table(body: str) -> None:
    async with running(process_request=refusing(HTTPStatus.NOT_FOUND, body)) as fake:
        with pytest.raises(Refused, match=r"HTTP 404: there is nothing at this path$"):
            await open_stream(fake.url)


async def test_unknown_refusal_status_has_its_http_name() -> None:
    async with running(process_request=refusing(HTTPStatus.BAD_GATEWAY, "")) as fake:
        with pytest.raises(Refused, match=r"HTTP 502: Bad Gateway$"):
            await open_stream(fake.url)


@pytest.mark.parametrize(("after", "seconds"), [("7", 7), ("Fri, 31 Dec 1999 23:59:59 GMT", None)])
async def test_refusal_of_a_full_broker_has_retry_after(after: str, seconds: int | None) -> None:
    refuse = refusing(HTTPStatus.SERVICE_UNAVAILABLE, "full", Retry_After=after)
    async with running(process_request=refuse) as fake:
        with pytest.raises(Refused) as caught:
            await open_stream(fake.url)
    assert (caught.value.retry, caught.value.retry_after) == (True, seconds)


async def test_a_certificate_must_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)  # noqa: ASYNC221
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with running(saying(), ssl=context) as fake:
        url = fake.url.replace("ws://127.0.0.1", "wss://localhost")
        with pytest.raises(Unreachable, match=r"its certificate is not trusted: self-signed certificate"):
            await open_stream(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        await (await open_stream(url)).shut_down()
        with pytest.raises(Unreachable, match=r"its certificate is not trusted: IP address mismatch"):
            await open_stream(fake.url.replace("ws://", "wss://"))


# The end


@pytest.mark.parametrize("code", [code for code in CloseCode if code is not CloseCode.PROTOCOL_ERROR])
async def test_a_close_of_the_broker_is_explained(code: CloseCode) -> None:
    async with connected(closing(code, code.reason)) as (_, stream, kept):
        await stream.write([b"{}"])
        failure = await kept.end()
        assert isinstance(failure, Closed)
        assert (failure.close_code, failure.retry) == (code, code.reconnect)
        assert str(failure) == f"the broker closed the connection: {code:d} {code.reason} ({code.meaning})"
        assert stream.failure is failure
        with pytest.raises(Closed):
            await stream.write([b"{}"])


@pytest.mark.parametrize(("code", "retry"), [(3000, False), (4242, True), (4777, False)])
async def test_unknown_close_code_is_retried_by_its_range(code: int, retry: bool) -> None:
    async with connected(closing(code, "new")) as (_, stream, kept):
        await stream.write([b"{}"])
        failure = await kept.end()
        assert isinstance(failure, Closed)
        assert (failure.close_code, failure.retry) == (code, retry)
        assert str(failure) == f"the broker closed the connection: {code} new"


async def test_lost_connection_is_reported() -> None:
    async def cut(fake: FakeBroker, connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.abort()

    async with connected(cut) as (_, stream, kept):
        await stream.write([b"{}"])
        failure = await kept.end()
        assert isinstance(failure, Closed)
        assert (failure.close_code, failure.retry) == (1006, True)
        assert str(failure).startswith("the connection to the broker was lost")
        with pytest.raises(Closed):
            await stream.raise_when_closed()


async def test_attach_after_the_close_reports_the_close() -> None:
    async with running(closing(1011)) as fake:
        stream = await open_stream(fake.url)
        await stream.write([b"{}"])
        with pytest.raises(Closed):
            await stream.raise_when_closed()
        kept = Kept()
        stream.attach(kept)
        assert len(kept.calls) == len(kept.failures) == 1
        await stream.shut_down()


async def test_invalid_frames_close_the_connection() -> None:
    async def garbage(fake: FakeBroker, connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.write(b"\xff\xff\xff\xff")
        await connection.wait_closed()

    async with connected(garbage) as (fake, stream, kept):
        await stream.write([b"{}"])
        failure = await kept.end()
        assert isinstance(failure, NotABroker)
        assert "not a valid WebSocket stream" in str(failure)
        assert (await fake.closed.get())[0] == 1002


async def test_silent_broker_is_disconnected() -> None:
    async with connected(saying(b"hello")) as (_, stream, kept):
        await kept.until(1)
        stream.watch_silence(0.05)
        failure = await kept.end()
        assert isinstance(failure, Closed)
        assert (str(failure), failure.retry) == ("nothing was heard from the broker for 0.05 seconds", True)


async def test_silence_timeout_does_not_run_while_paused() -> None:
    stayed = asyncio.Event()

    async with connected(saying(b"hello")) as (_, stream, kept):
        await kept.until(1)
        stream.pause()
        stream.watch_silence(0.01)
        asyncio.get_running_loop().call_later(0.05, stayed.set)
        await stayed.wait()
        assert stream.failure is None
        stream.resume()
        assert isinstance(await kept.end(), Closed)


async def test_close_sends_1000_and_delivers_nothing_more() -> None:
    async with connected(saying(b"hello")) as (fake, stream, kept):
        await kept.until(1)
        stream.pause()
        await stream.shut_down()
        assert await fake.closed.get() == (1000, "")
        assert kept.messages == [b"hello"]
        assert [str(failure) for failure in kept.failures] == ["this client has closed the connection"]
        await stream.shut_down()


async def test_close_does_not_wait_for_a_broker_that_does_not_answer() -> None:
    async def deaf(fake: FakeBroker, connection: ServerConnection) -> None:
        connection.transport.pause_reading()
        await connection.send(b"hello", text=True)
        await fake.subscribed.wait()
        connection.transport.abort()

    async with connected(deaf) as (fake, stream, kept):
        await kept.until(1)
        await stream.shut_down(timeout=0.05)
        fake.subscribed.set()
        assert isinstance(stream.failure, Closed)


async def test_close_does_not_wait_for_the_tcp_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsbroker_client.stream.CLOSE_TIMEOUT", 0.05)

    async def lingering(fake: FakeBroker, connection: ServerConnection) -> None:
        connection.transport.write(b"\x88\x02\x03\xe8")  # a close frame with 1000, behind the back of `websockets`
        connection.transport.pause_reading()
        await fake.subscribed.wait()
        connection.transport.abort()

    async with connected(lingering) as (fake, _, kept):
        failure = await kept.end()
        fake.subscribed.set()
        assert isinstance(failure, Closed)
        assert failure.close_code == 1000


async def test_url_for_tls_on_a_port_without_it_says_so() -> None:
    async with serving() as harness:
        with pytest.raises(ClientError, match="it does not speak TLS; the URL must begin with ws:// instead of wss://"):
            await open_stream(harness.url.replace("ws://", "wss://"))


async def test_url_without_tls_on_a_port_with_it_says_so(tmp_path: Path) -> None:
    async with serving(pair=make_pair(tmp_path)) as harness:
        with pytest.raises(ClientError, match="the URL must begin with wss:// instead of ws://"):
            await open_stream(harness.url.replace("wss://", "ws://"))
