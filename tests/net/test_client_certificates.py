"""Clients that show a certificate in the TLS handshake: who they are by it, how long, and what a reload ends."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Close

from broker.auth.authenticator import Authenticator
from broker.auth.certificates import ClientCertificates
from broker.auth.tokens import ExpiredTokenError, TokenError, TokenPolicy, TokenVerifier
from broker.auth.verification_keys import Secret
from broker.config import Config, Limits, Role, Server
from broker.errors import CloseCode, ConfigError
from broker.identity import ClientCertificate, NameKind
from broker.net.tls import load
from tests.auth.test_tokens import SECRET
from tests.fixtures_certificates import Authority, Pair, make_pair, showing, trusting
from tests.fixtures_command import wsbroker
from tests.fixtures_daemon import launched
from tests.fixtures_node import Client, Harness, serving
from tests.net.harness import TIMEOUT
from tests.test_identities import error, token

pytestmark = pytest.mark.needs("openssl")

ROLES = (
    Role(
        name="device",
        publish=("device.{identity}.>",),
        subscribe=("orders.>", "device.{identity}.>"),
        max_connections=2,
    ),
    Role(name="user", subscribe=("prices.>",)),
    Role(name="anonymous"),
)
NAMES: dict[NameKind, tuple[list[str], list[x509.GeneralName]]] = {
    "cn": (["alice"], [x509.DNSName("other.example")]),
    "dns": (["other"], [x509.DNSName("alice")]),
    "email": (["other"], [x509.RFC822Name("alice"), x509.DNSName("other.example")]),
    "uri": ([], [x509.UniformResourceIdentifier("alice"), x509.DNSName("other.example")]),
}
REFUSED = (ssl.SSLError, OSError, EOFError, InvalidHandshake)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("broker"))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def authenticator(
    kind: NameKind = "cn", roles: tuple[str, ...] = ("device",), *, certificates: bool = True
) -> Authenticator:
    return Authenticator(
        required=True,
        verifier=TokenVerifier(TokenPolicy(algorithms=("HS256",)), Secret(SECRET, ("HS256",))),
        certificates=ClientCertificates(kind, roles) if certificates else None,
        roles=ROLES,
    )


def server(authority: Authority, **options: Any) -> Server:
    return Server(listen=["127.0.0.1:0"], client_ca=str(authority.certificate), **options)


async def refusal(there: Harness, context: ssl.SSLContext) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as raised:
        await there.connect(ssl=context)
    response = raised.value.response
    assert response.body is not None
    return response.status_code, bytes(response.body).decode().strip()


@contextmanager
def fails_in_tls() -> Iterator[None]:
    """Of TLS 1.3 a client learns after its own part of the handshake that it was refused."""
    with pytest.raises(REFUSED) as raised:
        yield
    assert not isinstance(raised.value, InvalidStatus), raised.value


async def published(publisher: Client, watcher: Client, data: int) -> None:
    """An event of one client still reaches the other one."""
    assert (await publisher.ask("publish", topic="device.watched.x", data=data))["op"] == "ok"
    assert await watcher.data(1) == [data]


# Who a client is


@pytest.mark.parametrize("kind", NAMES)
async def test_name_of_the_configured_kind_is_the_identity(pair: Pair, authority: Authority, kind: NameKind) -> None:
    client = authority.issue(*NAMES[kind])
    async with serving(pair=pair, server=server(authority), authenticator=authenticator(kind)) as there:
        opened = await there.connect(ssl=showing(client, pair))
        assert opened.welcome["identity"] == "alice"
        assert 3500 < opened.welcome["expires_in"] <= 3600
        assert (await opened.ask("publish", topic="device.alice.x", data=1))["op"] == "ok"
        assert error(await opened.ask("publish", topic="device.bob.x", data=1))[0] == "forbidden"


async def test_client_without_a_certificate_needs_a_token(pair: Pair, authority: Authority) -> None:
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        client = await there.connect()
        assert "identity" not in client.welcome
        assert error(await client.ask("subscribe", topic="prices.a"))[0] == "unauthorized"
        assert (await client.ask("auth", token=token()))["identity"] == "alice"
        assert (await client.ask("subscribe", topic="prices.a"))["op"] == "ok"


async def test_token_goes_before_the_certificate(pair: Pair, authority: Authority) -> None:
    context = showing(authority.issue(["device1"]), pair)
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        client = await there.connect(token(), ssl=context)
        assert client.welcome["identity"] == "alice"
        other = await there.connect(ssl=context)
        assert error(await other.ask("auth", token=token()))[0] == "forbidden", "another identity"
        assert (await other.ask("auth", token=token("device1")))["identity"] == "device1"


async def test_certificate_without_exactly_one_name_is_refused(pair: Pair, authority: Authority) -> None:
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        for names, count in (((), "no"), (("a", "b"), "more than one")):
            context = showing(authority.issue(names, [x509.DNSName("other.example")]), pair)
            expected = f"the client certificate has {count} common name (CN) in its subject"
            assert await refusal(there, context) == (401, expected)
        context = showing(authority.issue(["a\nb"]), pair)
        assert (await refusal(there, context))[0] == 401


async def test_limits_of_the_role_count_for_certificates(pair: Pair, authority: Authority) -> None:
    context = showing(authority.issue(["alice"]), pair)
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        for _ in range(2):
            await there.connect(ssl=context)
        assert await refusal(there, context) == (429, "this identity may have 2 connections")


# Certificates that identify nobody, while the events of another client go on


async def test_certificate_of_another_authority_is_refused(pair: Pair, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    namesake = Authority(tmp_path, "authority2")
    namesake._name = authority._name  # the same name, and another key
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        watcher, publisher = await watching(there, authority, pair)
        for number, foreign in enumerate((other, namesake)):
            with fails_in_tls():
                await there.connect(ssl=showing(foreign.issue(["watched"]), pair))
            await published(publisher, watcher, number)
        with fails_in_tls():
            await there.connect(ssl=showing(authority.issue(["watched"], life=timedelta(hours=-1)), pair))
        with fails_in_tls():
            await there.connect(ssl=showing(make_pair(tmp_path, "self"), pair))
        await published(publisher, watcher, 3)
        assert there.handshakes.limiter.reasons["tls"] == 4


async def watching(there: Harness, authority: Authority, pair: Pair) -> tuple[Client, Client]:
    """A client that is subscribed, and one that publishes to it."""
    context = showing(authority.issue(["watched"]), pair)
    watcher, publisher = await there.connect(ssl=context), await there.connect(ssl=context)
    assert (await watcher.ask("subscribe", topic="device.watched.x"))["op"] == "ok"
    return watcher, publisher


async def test_revoked_certificate_is_refused(pair: Pair, authority: Authority) -> None:
    good, bad = authority.issue(["good"]), authority.issue(["bad"])
    authority.revoke(bad)
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        with fails_in_tls():
            await there.connect(ssl=showing(bad, pair))
        assert (await there.connect(ssl=showing(good, pair))).welcome["identity"] == "good"


async def test_connection_is_closed_when_its_certificate_ends(pair: Pair, authority: Authority) -> None:
    short = authority.issue(["short"], life=timedelta(seconds=3))
    made = Authenticator(required=True, certificates=ClientCertificates("cn", ["device"]), roles=ROLES)  # no leeway
    async with serving(pair=pair, server=server(authority), authenticator=made) as there:
        watcher, publisher = await watching(there, authority, pair)
        client = await there.connect(ssl=showing(short, pair))
        assert client.welcome["expires_in"] <= 3
        assert await client.closed() == Close(CloseCode.EXPIRED, "expired")
        await published(publisher, watcher, 1)


async def test_certificate_of_a_proxy_identifies_none_of_its_clients(pair: Pair, authority: Authority) -> None:
    context = showing(authority.issue(["watched"]), pair)
    trusted = server(authority, trusted_proxies=["127.0.0.0/8"])
    async with serving(pair=pair, server=trusted, authenticator=authenticator()) as there:
        watcher, publisher = await watching(there, authority, pair)
        client = await there.connect(ssl=context, additional_headers={"X-Forwarded-For": "192.0.2.1"})
        assert "identity" not in client.welcome
        assert error(await client.ask("subscribe", topic="device.watched.x"))[0] == "unauthorized"
        await published(publisher, watcher, 1)


async def test_header_of_a_proxy_that_is_not_trusted_changes_nothing(pair: Pair, authority: Authority) -> None:
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        context = showing(authority.issue(["alice"]), pair)
        client = await there.connect(ssl=context, additional_headers={"X-Forwarded-For": "192.0.2.1"})
        assert client.welcome["identity"] == "alice"


def test_certificate_that_has_ended_is_refused_also_where_tls_was_resumed() -> None:
    certificates = ClientCertificates("cn", ["device"], now=lambda: 1000.0)
    assert certificates.identify(ClientCertificate((("cn", "alice"),), 1001.0)).expires == 1001.0
    with pytest.raises(ExpiredTokenError):
        certificates.identify(ClientCertificate((("cn", "alice"),), 1000.0))
    for name in ("", "x" * 256, "a\0b", "a\u202eb"):
        with pytest.raises(TokenError, match="empty, too long or not printable"):
            certificates.identify(ClientCertificate((("cn", name),), 1001.0))


# What a reload does


async def test_reload_changes_the_roles_of_certificates_at_once(pair: Pair, authority: Authority) -> None:
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        client = await there.connect(ssl=showing(authority.issue(["alice"]), pair))
        assert (await client.ask("subscribe", topic="orders.a"))["op"] == "ok"
        there.node.reconfigure(Config(limits=Limits()), authenticator(roles=("user",)))
        ended = await client.next()
        assert (ended["op"], ended["code"], ended["topic"]) == ("error", "forbidden", "orders.a")
        assert error(await client.ask("publish", topic="device.alice.x", data=1))[0] == "forbidden"
        assert (await client.ask("subscribe", topic="prices.a"))["op"] == "ok"


@pytest.mark.parametrize("changed", [{"certificates": False}, {"kind": "dns"}], ids=["removed", "kind"])
async def test_reload_without_certificates_or_with_another_kind_disconnects(
    pair: Pair, authority: Authority, changed: dict[str, Any]
) -> None:
    async with serving(pair=pair, server=server(authority), authenticator=authenticator()) as there:
        client = await there.connect(ssl=showing(authority.issue(["alice"]), pair))
        other = await there.connect(token())
        there.node.reconfigure(Config(), authenticator(**changed))
        assert await client.closed() == Close(CloseCode.UNAUTHORIZED, "unauthorized")
        assert await other.ask("ping") == {"op": "pong"}


CONFIG = """
[server]
listen = ["127.0.0.1:0"]
certificate = "{pair.certificate}"
key = "{pair.key}"
client_ca = "{ca}"
[auth]
required = true
certificate_identity = "dns"
certificate_roles = ["device"]
[[roles]]
name = "device"
publish = ["device.{{identity}}.>"]
"""


async def test_broker_with_certificates_alone_reads_its_authorities_again(
    pair: Pair, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    old, new = (each.issue(others=[x509.DNSName("machine1")]) for each in (authority, other))
    config = CONFIG.format(pair=pair, ca=authority.certificate)
    async with launched("--admin", "", folder=tmp_path, config=config) as daemon:
        await daemon.started()
        url = f"wss://{daemon.addresses[0]}/"
        async with connect(url, ssl=showing(old, pair), proxy=None) as first:
            assert json.loads(await first.recv())["identity"] == "machine1"
            with fails_in_tls():
                await connect(url, ssl=showing(new, pair), proxy=None)
            other.certificate.replace(authority.certificate)
            daemon.signal(signal.SIGHUP)
            await daemon.until("reloaded")
            with fails_in_tls():
                await connect(url, ssl=showing(old, pair), proxy=None)
            async with connect(url, ssl=showing(new, pair), proxy=None) as second:
                assert json.loads(await second.recv())["identity"] == "machine1"
            await first.send('{"op":"publish","id":1,"topic":"device.machine1.x","data":1}')
            assert json.loads(await asyncio.wait_for(first.recv(), TIMEOUT))["op"] == "ok"
        async with connect(url, ssl=trusting(pair), proxy=None) as client:
            await client.recv()
            await client.send('{"op":"publish","id":1,"topic":"device.machine1.x","data":1}')
            assert json.loads(await asyncio.wait_for(client.recv(), TIMEOUT))["code"] == "unauthorized"


# The configuration


def test_mistakes_in_the_file_of_authorities_are_reported(pair: Pair, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for file, said in (
        (tmp_path / "none", "cannot be read: No such file or directory"),
        (pair.key, "is a private key, not a certificate"),
        (damaged, "cannot be used: "),
    ):
        with pytest.raises(ConfigError) as wrong:
            load(Server(certificate=str(pair.certificate), key=str(pair.key), client_ca=str(file)))
        [problem] = map(str, wrong.value.problems)
        assert problem.startswith(f"server.client_ca: {file} {said}")


async def test_client_certificates_need_tls(tmp_path: Path, authority: Authority) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[server]\nclient_ca = "{authority.certificate}"\n[[roles]]\nname = "default"\n')
    result = await wsbroker("check", "--config", str(file))
    assert result.status == 78
    assert "server.client_ca" in result.err + result.out
    assert "needs server.certificate beside it" in result.err + result.out
