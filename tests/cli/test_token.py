"""`wsbroker token` and `wsbroker key`, and a broker that takes what they make."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from websockets.asyncio.client import connect

from broker.auth.api_keys import hash_key
from broker.auth.permissions import RIGHTS
from tests.auth.test_key_set import login_service
from tests.auth.test_tokens import PRIVATE, SECRET, pem
from tests.fixtures_command import Result, wsbroker
from tests.fixtures_daemon import serving

ROLES = """
[[roles]]
name = "user"
subscribe = ["prices.>", "user.{identity}.>"]
publish = ["chat.*"]
[[roles]]
name = "default"
"""
SHARED = f'[auth]\nalgorithms = ["HS256"]\nsecret = "{SECRET.decode()}"\nissuer = "me"\naudience = "you"\n{ROLES}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "wsbroker.toml"


def write(path: Path, text: str) -> None:
    path.write_text(text)


def private(tmp_path: Path, algorithm: str) -> Path:
    path = tmp_path / f"{algorithm}.key"
    form, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    path.write_bytes(PRIVATE[algorithm].private_bytes(encoding, form, serialization.NoEncryption()))
    return path


async def make(*arguments: str, status: int = 0) -> str:
    result = await wsbroker("token", "make", *arguments)
    assert result.status == status, result
    return result.err if status else result.out.strip()


async def test_token_of_the_secret_is_accepted(file: Path) -> None:
    write(file, SHARED)
    token = await make("--identity", "alice", "--role", "user", "--ttl", "15m", "--config", str(file))
    claims = jwt.decode(token, SECRET, ["HS256"], audience="you", issuer="me")
    assert claims["exp"] - claims["iat"] == 900
    result = await wsbroker("token", "check", "--config", str(file), stdin=token.encode() + b"\n")
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert lines.pop("expires").endswith(" UTC")
    assert lines == {
        "identity": "alice",
        "roles": "user",
        "publish": "chat.*",
        "subscribe": "prices.> user.alice.>",
        "presence": "nothing",
        "history": "nothing",
        "block": "nothing",
    }
    async with serving("--listen", "127.0.0.1:0", folder=file.parent, config=SHARED) as daemon:
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(daemon.url, additional_headers=headers, proxy=None) as client:
            assert json.loads(await client.recv())["identity"] == "alice"


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256", "PS256"])
async def test_token_of_a_private_key_is_accepted(algorithm: str, file: Path) -> None:
    write(file.parent / "jwt.pub", pem(PRIVATE[algorithm]).decode())
    write(file, f'[auth]\nalgorithms = ["{algorithm}"]\nkey_file = "{file.parent}/jwt.pub"\n{ROLES}')
    key = private(file.parent, algorithm)
    token = await make("--identity", "bob", "--key", str(key), "--config", str(file))
    result = await wsbroker("token", "check", token, "--json", "--config", str(file))
    found = json.loads(result.out)
    assert abs(found.pop("expires") - time.time() - 3600) < 60
    nothing: dict[str, list[str]] = {right: [] for right in RIGHTS}
    assert found == {"identity": "bob", "roles": ["default"], "rights": nothing}


async def test_token_has_the_configured_claims(file: Path) -> None:
    claims = 'identity_claim = "user.name"\nroles_claim = "realm_access.roles"\n[[roles]]'
    write(file, SHARED.replace("[[roles]]", claims, 1))
    token = await make("--identity", "alice", "--role", "user", "--role", "x", "--kid", "k", "--config", str(file))
    made = jwt.decode(token, SECRET, ["HS256"], audience="you")
    assert (made["user"], made["realm_access"]) == ({"name": "alice"}, {"roles": ["user", "x"]})
    assert jwt.get_unverified_header(token)["kid"] == "k"
    result = await wsbroker("token", "check", token, "--json", "--config", str(file))
    assert json.loads(result.out)["roles"] == ["user", "x"]


async def test_keys_are_fetched_for_a_check(file: Path) -> None:
    async with login_service() as service:
        write(file, f'[auth]\njwks_url = "{service.url}"\n{ROLES}')
        token = await make("--identity", "a", "--key", str(private(file.parent, "EdDSA")), "--config", str(file))
        assert (await wsbroker("token", "check", token, "--config", str(file))).status == 0
    result = await wsbroker("token", "check", token, "--config", str(file))
    assert result.status == 77
    assert "the keys of auth.jwks_url cannot be fetched" in result.err


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ("nonsense", "the token is malformed"),
        ("wsb_nonsense", "the API key is not known"),
        ("", "the token is malformed"),
        (jwt.encode({"sub": "a", "exp": 1}, SECRET), "the token is from another issuer"),
    ],
)
async def test_invalid_token_has_a_reason_and_a_status(shown: str, message: str, file: Path) -> None:
    write(file, SHARED.replace('audience = "you"\n', ""))
    result = await wsbroker("token", "check", "--config", str(file), stdin=shown.encode())
    assert result == Result(77, "", f"wsbroker: {message}\n") or "lacks `iss`" in result.err
    assert not shown or shown not in result.err


async def test_wrong_options_are_reported(file: Path) -> None:
    write(file, SHARED)
    use = ("--identity", "a", "--config", str(file))
    for ttl in ("", "1", "h", "0s", "-1h", "1.5h", "1w"):
        assert "--ttl: must be a number with s, m, h or d" in await make(*use, "--ttl", ttl, status=2)
    assert "No such file or directory" in await make(*use, "--key", "/nowhere", status=2)
    assert "is no private key in PEM format" in await make(*use, "--key", str(file), status=2)
    wrong = str(private(file.parent, "EdDSA"))
    assert "the key is for EdDSA, and auth.algorithms has none" in await make(*use, "--key", wrong, status=2)
    write(file, "")
    assert "the configuration has no secret" in await make(*use, status=2)
    write(file, "[auth]\nsecret = 1\n")
    assert "auth.secret" in await make(*use, status=78)
    assert (await wsbroker("token", "check", "x", "--config", str(file))).status == 78


async def test_key_and_its_hash_are_printed_once() -> None:
    text, again = await wsbroker("key", "make"), await wsbroker("key", "make", "--json")
    key, hashed = (line.split()[1] for line in text.out.splitlines())
    assert hash_key(key) == hashed
    found = json.loads(again.out)
    assert hash_key(found["key"]) == found["hash"]
    assert found["key"] != key
