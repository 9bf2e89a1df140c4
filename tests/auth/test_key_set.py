"""Key sets behind a URL, fetched from a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from aiohttp import web
from structlog.testing import capture_logs
from websockets.exceptions import InvalidStatus

from broker.auth import key_set
from broker.auth.authenticator import Authenticator
from broker.auth.configured import load_authenticator
from broker.auth.key_set import KeySet, KeySetError, fetch
from broker.auth.tokens import TokenPolicy, TokenVerifier
from broker.auth.verification_keys import UnusableKeyError, read_key_set
from broker.config import Auth, Config, Role
from tests.auth.test_tokens import PRIVATE
from tests.config.reading import problems
from tests.fixtures_node import Harness, serving
from tests.net.harness import until

ROLES = (Role(name="default", subscribe=(">",)),)


def entry(kid: str, algorithm: str = "EdDSA") -> dict[str, Any]:
    """The public key of an algorithm, as a key set has it."""
    key = PRIVATE[algorithm].public_key()
    algorithms: Any = {"EdDSA": jwt.algorithms.OKPAlgorithm, "ES256": jwt.algorithms.ECAlgorithm}
    return {**json.loads(algorithms[algorithm].to_jwk(key)), "kid": kid, "use": "sig"}


class LoginService:
    """An HTTP server with a key set."""

    def __init__(self) -> None:
        self.keys = [entry("one")]
        self.asked = 0
        self.url = ""
        self.answer: web.Response | None = None
        """What it answers instead of the key set."""
        self.hold: asyncio.Event | None = None
        """What it waits for before it answers."""

    async def handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        assert "Cookie" not in request.headers
        if self.hold is not None:
            await self.hold.wait()
        return self.answer or web.json_response({"keys": self.keys})


@asynccontextmanager
async def login_service() -> AsyncIterator[LoginService]:
    service = LoginService()
    app = web.Application()
    app.router.add_get("/jwks", service.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    service.url = f"http://127.0.0.1:{port}/jwks"
    try:
        yield service
    finally:
        await runner.cleanup()


def authenticator(url: str) -> Authenticator:
    keys = KeySet(url)
    policy = TokenPolicy(algorithms=("EdDSA", "ES256"))
    return Authenticator(required=True, verifier=TokenVerifier(policy, keys), key_set=keys, roles=ROLES)


def token(kid: str | None = "one", algorithm: str = "EdDSA") -> str:
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode({"sub": "alice", "exp": time.time() + 60}, PRIVATE[algorithm], algorithm, headers)


async def status(there: Harness, shown: str) -> int:
    try:
        await there.connect(shown)
    except InvalidStatus as refused:
        return refused.response.status_code
    return 101


async def test_token_is_verified_with_a_fetched_key() -> None:
    async with login_service() as service, serving(authenticator=authenticator(service.url)) as there:
        assert (await there.connect(token())).welcome["identity"] == "alice"
        assert [await status(there, token(kid)) for kid in ("one", None)] == [101, 101]
        assert service.asked == 1


async def test_first_clients_wait_for_the_first_fetch() -> None:
    async with login_service() as service:
        service.hold = asyncio.Event()
        async with serving(authenticator=authenticator(service.url)) as there:
            waiting = [asyncio.create_task(there.connect(token())) for _ in range(10)]
            await until(lambda: service.asked == 1)
            assert not any(task.done() for task in waiting)
            service.hold.set()
            assert {(await task).welcome["identity"] for task in waiting} == {"alice"}
            assert service.asked == 1


async def test_new_key_is_fetched_when_a_token_names_it_but_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async with login_service() as service, serving(authenticator=authenticator(service.url)) as there:
        assert await status(there, token()) == 101
        service.keys.append(entry("two", "ES256"))
        assert await status(there, token("two", "ES256")) == 401, "the last fetch was a moment ago"
        assert service.asked == 1
        monkeypatch.setattr(key_set, "MIN_INTERVAL", 0.0)
        assert await status(there, token("two", "ES256")) == 101
        assert service.asked == 2
        monkeypatch.setattr(key_set, "MIN_INTERVAL", 30.0)
        assert [await status(there, token(f"{number}", "ES256")) for number in range(20)] == [401] * 20
        assert service.asked == 2


async def test_auth_waits_for_a_new_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with login_service() as service, serving(authenticator=authenticator(service.url)) as there:
        client = await there.connect()
        assert await status(there, token()) == 101
        service.keys.append(entry("two", "ES256"))
        monkeypatch.setattr(key_set, "MIN_INTERVAL", 0.0)
        assert (await client.ask("auth", token=token("two", "ES256")))["identity"] == "alice"


async def test_old_keys_serve_while_the_service_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async with login_service() as service, serving(authenticator=authenticator(service.url)) as there:
        assert await status(there, token()) == 101
        monkeypatch.setattr(key_set, "MIN_INTERVAL", 0.0)
        service.answer = web.Response(status=500)
        with capture_logs() as logs:
            assert await status(there, token("two")) == 401
        assert [entry["reason"] for entry in logs if entry["event"] == "key set not fetched"] == ["the status is 500"]
        assert await status(there, token()) == 101


async def test_before_the_first_fetch_nobody_can_tell() -> None:
    async with login_service() as service, serving(authenticator=authenticator(service.url + "x")) as there:
        assert await status(there, token()) == 503
        client = await there.connect()
        answer = await client.ask("auth", token=token())
        assert (answer["code"], answer["retry"]) == ("unavailable", True)


async def test_withdrawn_key_ends_with_the_next_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_set, "MAX_INTERVAL", 0.05)
    async with login_service() as service, serving(authenticator=authenticator(service.url)) as there:
        assert await status(there, token()) == 101
        service.keys = [entry("two", "ES256")]
        asked = service.asked
        await until(lambda: service.asked >= asked + 2)
        assert await status(there, token()) == 401


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (web.Response(status=404), "the status is 404"),
        (web.Response(status=302, headers={"Location": "/jwks"}), "the status is 302"),
        (web.Response(body=b"x" * (key_set.MAX_BYTES + 1)), "the answer has more than 262144 bytes"),
        (web.Response(body=b"{"), "the answer is no JSON"),
        (web.Response(body=b"[" * 100_000), "the answer is no JSON"),
        (web.Response(body=b"\xff"), "the answer is no JSON"),
        (web.Response(body=b"{}"), "the document is no JSON Web Key Set: it has no list `keys`"),
        (web.Response(body=b'{"keys":[]}'), "the JSON Web Key Set has no key for signatures that is supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_answer_that_is_no_key_set_is_refused(answer: web.Response, reason: str) -> None:
    async with login_service() as service:
        service.answer = answer
        with pytest.raises(KeySetError) as raised:
            await fetch(service.url)
        assert str(raised.value) == reason


async def test_compressed_answer_is_bounded_too() -> None:
    async with login_service() as service:
        service.answer = web.Response(body=b"[" + b" " * 10_000_000 + b"]")
        service.answer.enable_compression(web.ContentCoding.gzip)
        with pytest.raises(KeySetError, match="more than 262144 bytes"):
            await fetch(service.url)


async def test_service_that_does_not_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_set, "TIMEOUT", 0.1)
    async with login_service() as service:
        service.hold = asyncio.Event()
        with pytest.raises(KeySetError, match=r"no answer within 0\.1 seconds"):
            await fetch(service.url)
        service.hold.set()
    with pytest.raises(KeySetError, match="ClientConnectorError"):
        await fetch(service.url)


async def test_reload_keeps_the_keys_of_the_same_url() -> None:
    config = Config(auth=Auth(jwks_url="http://127.0.0.1:1/"), roles=list(ROLES))
    before = load_authenticator(config, {})
    assert before.key_set is not None
    assert load_authenticator(config, {}, before).key_set is before.key_set
    other = Config(auth=Auth(jwks_url="http://127.0.0.1:2/"), roles=list(ROLES))
    assert load_authenticator(other, {}, before).key_set is not before.key_set


async def test_reload_changes_the_url() -> None:
    async with login_service() as one, login_service() as two, serving(authenticator=authenticator(one.url)) as there:
        assert await status(there, token()) == 101
        two.keys = [entry("two", "ES256")]
        there.node.reconfigure(Config(), authenticator(two.url))
        assert [await status(there, shown) for shown in (token("two", "ES256"), token())] == [101, 401]


def test_secret_of_a_key_set_is_never_used() -> None:
    secret = base64.urlsafe_b64encode(b"x" * 32).decode()
    with pytest.raises(UnusableKeyError):
        read_key_set({"keys": [{"kty": "oct", "k": secret, "kid": "one"}]})


@pytest.mark.parametrize("url", ["https://a.example/jwks", "https://a:8443/", "http://127.0.0.1:1/x", "http://[::1]/"])
def test_url_is_https_or_on_loopback(url: str) -> None:
    (only,) = problems(flags={"auth.jwks_url": url})
    assert "allows nothing without [[roles]]" in only


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://a.example/",
        "ftp://a/",
        "https://",
        "https://a:0/",
        "https://a:99999/",
        "https://u:p@a/",
        "https://a/#x",
        "https://a b/",
        "https://é/",
        "http://10.0.0.1/",
        "file:///etc/passwd",
        "https://a/\n",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    found = problems(flags={"auth.jwks_url": url})
    assert any(problem.startswith("auth.jwks_url (--auth-jwks-url): ") for problem in found)
