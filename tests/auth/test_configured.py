"""From the configuration to what decides on tokens: key files, credentials, roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jwt
import pytest

from broker.auth.configured import check_access, load_authenticator, requires_identity
from broker.auth.tokens import TokenError
from broker.auth.verification_keys import ALGORITHMS
from broker.config import ApiKey, Auth, Config, Role, Server
from broker.config.keys import KEYS
from broker.errors import ConfigError
from tests.auth.test_tokens import PRIVATE, SECRET, pem

ROLE = Role(name="default", subscribe=(">",))
CLAIMS = {"sub": "alice"}


def configured(**auth: Any) -> Config:
    return Config(auth=Auth(expiry_required=False, **auth), roles=[ROLE])


def mistakes(config: Config, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_authenticator(config, environ or {})
    return [str(problem) for problem in raised.value.problems]


def test_the_algorithms_that_can_be_configured_are_those_that_are_verified() -> None:
    assert KEYS["auth.algorithms"].allowed == "a list, not empty, of " + ", ".join(f'"{name}"' for name in ALGORITHMS)


def test_public_key_may_come_from_a_file_the_environment_or_a_credential(tmp_path: Path) -> None:
    text = pem(PRIVATE["EdDSA"])
    (tmp_path / "jwt.pub").write_bytes(text)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    token = jwt.encode(CLAIMS, PRIVATE["EdDSA"], "EdDSA")
    for given in ({"key_file": str(tmp_path / "jwt.pub")}, {"key_file": "credential:jwt.pub"}, {"key": text.decode()}):
        assert load_authenticator(configured(**given), environ).identify(token).name == "alice"


def test_secret_may_come_from_a_file_the_environment_or_a_credential(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    token = jwt.encode(CLAIMS, SECRET, "HS256")
    for given in (
        {"secret_file": str(tmp_path / "secret")},
        {"secret_file": "credential:secret"},
        {"secret": SECRET.decode()},
    ):
        config = configured(algorithms=["HS256"], **given)
        assert load_authenticator(config, environ).identify(token).name == "alice"


def test_secret_and_public_key_are_not_taken_for_each_other(tmp_path: Path) -> None:
    text = pem(PRIVATE["RS256"])
    config = configured(algorithms=["HS256", "RS256"], secret=SECRET.decode(), key=text.decode())
    authenticator = load_authenticator(config, {})
    for key, algorithm in ((SECRET, "HS256"), (PRIVATE["RS256"], "RS256")):
        assert authenticator.identify(jwt.encode(CLAIMS, key, algorithm)).name == "alice"
    forged = jwt.api_jws.PyJWS().encode(b'{"sub":"alice"}', b"x" * 32, "HS256")
    with pytest.raises(TokenError, match="signature"):
        authenticator.identify(forged)


def test_each_mistake_in_the_keys_is_reported(tmp_path: Path) -> None:
    assert mistakes(configured(algorithms=["HS256"], secret="short", key_file=str(tmp_path / "none"))) == [
        f"auth.key_file: {tmp_path}/none: cannot be read: No such file or directory",
        "auth.secret: the secret has 5 bytes; 32 are needed at least",
    ]
    private = tmp_path / "private"
    private.write_text("-----BEGIN PRIVATE KEY-----\n")
    assert mistakes(configured(key_file=str(private))) == [
        f"auth.key_file: {private}: the file has a private key; the broker needs the public one alone"
    ]
    big = tmp_path / "big"
    big.write_bytes(b"x" * (1 << 20) + b"x")
    assert mistakes(configured(key_file=str(big))) == [f"auth.key_file: {big}: the file has more than 1048576 bytes"]


def test_key_for_none_of_the_algorithms_is_a_mistake() -> None:
    (problem,) = mistakes(configured(key=pem(PRIVATE["ES256"]).decode()))
    assert problem == "auth.key: the keys are for ES256, and auth.algorithms has none of these"


@pytest.mark.parametrize("name", ["", "..", "a/b", "."])
def test_credential_has_a_plain_name(name: str, tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert mistakes(configured(key_file=f"credential:{name}"), environ) == [
        f"auth.key_file: credential:{name}: a credential has a name without a slash"
    ]
    assert "LoadCredential=" in mistakes(configured(key_file=f"credential:{name}"))[0]


def test_identity_is_required_beyond_loopback_unless_said_otherwise() -> None:
    assert [requires_identity(Config(), remote) for remote in (False, True)] == [False, True]
    assert not requires_identity(Config(server=Server(anonymous=True)), remote=True)
    assert requires_identity(Config(server=Server(anonymous=False)))
    assert requires_identity(Config(auth=Auth(required=True)))
    assert not requires_identity(Config(auth=Auth(required=False)), remote=True)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("prices.>", ""),
        ("user.{identity}.>", ""),
        ("{identity}", ""),
        ("user.{identity}x", "{identity} must be a token of its own"),
        ("user.{name}", "there is no other placeholder"),
        ("a..b", "a token is empty"),
        ("a.>.b", "`>` must be the last token"),
        ("", "must not be empty"),
    ],
)
def test_pattern_of_a_role_is_checked(pattern: str, problem: str) -> None:
    found = check_access({}, {2: Role(name="a", publish=(pattern,))})
    if not problem:
        assert found == []
    else:
        assert [each.key for each in found] == ["roles[2].publish"]
        assert problem in found[0].message


def test_names_and_hashes_are_there_once() -> None:
    hashes = [f"sha256:{64 * digit}" for digit in "01"]
    keys = {1: ApiKey("a", hashes[0], ("r",)), 2: ApiKey("b", hashes[0], ("r",)), 3: ApiKey("a", hashes[1], ("r",))}
    found = check_access(keys, {1: Role(name="r"), 4: Role(name="r")})
    assert [str(each) for each in found] == [
        "keys[2].hash: is the same as in keys[1]",
        "keys[3].name: is the same as in keys[1]",
        "roles[4].name: is the same as in roles[1]",
    ]
