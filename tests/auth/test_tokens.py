"""Which tokens are accepted, whom they name, and what is said of the others."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from broker.auth.tokens import MAX_TOKEN, ExpiredTokenError, TokenError, TokenPolicy, TokenVerifier, UnknownKeyError
from broker.auth.verification_keys import (
    ALGORITHMS,
    PublicKeys,
    Secret,
    UnusableKeyError,
    read_key_set,
    read_public_keys,
)
from broker.identity import Identity

NOW = 1_800_000_000.0
SECRET = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
RSA = rsa.generate_private_key(65537, 2048)
EC = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
PRIVATE: dict[str, Any] = {
    **dict.fromkeys(("HS256", "HS384", "HS512"), SECRET),
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), RSA),
    **{name: ec.generate_private_key(curve) for name, curve in EC.items()},
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
LONG_RSA = (
    rsa.RSAPublicNumbers(65537, 2**8192 + 1)
    .public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
)
CLAIMS = {"sub": "alice", "exp": NOW + 60, "roles": ["user"]}


def pem(private: Any) -> bytes:
    found: bytes = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return found


def verifier(*algorithms: str, **policy: Any) -> TokenVerifier:
    """A verifier with the keys of these algorithms, at the time NOW."""
    names = algorithms or ("EdDSA",)
    keys: Any
    if names[0].startswith("HS"):
        keys = Secret(SECRET, names)
    else:
        keys = PublicKeys([(None, PRIVATE[name].public_key()) for name in names])
    return TokenVerifier(TokenPolicy(algorithms=names, **policy), keys, lambda: NOW)


def token(claims: Mapping[str, Any] | None = None, algorithm: str = "EdDSA", **headers: Any) -> str:
    return jwt.encode(dict(CLAIMS if claims is None else claims), PRIVATE[algorithm], algorithm, headers or None)


def raw_token(header: bytes, payload: bytes, signature: bytes = b"x" * 64) -> str:
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (header, payload, signature))


def with_raw_payload(payload: bytes) -> str:
    """A token with this payload and a right signature."""
    return jwt.api_jws.PyJWS().encode(payload, PRIVATE["EdDSA"], "EdDSA")


def refusal(verify: TokenVerifier, text: str) -> str:
    with pytest.raises(TokenError) as raised:
        verify.verify(text)
    return str(raised.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_token_of_each_algorithm_is_accepted(algorithm: str) -> None:
    found = verifier(algorithm).verify(token(algorithm=algorithm))
    assert found == Identity("alice", ("user",), NOW + 60)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_token_with_another_signature_is_refused(algorithm: str) -> None:
    head, _, signature = token(algorithm=algorithm).split(".")
    other = jwt.encode({**CLAIMS, "sub": "mallory"}, PRIVATE[algorithm], algorithm).split(".")[1]
    assert refusal(verifier(algorithm), f"{head}.{other}.{signature}") == "the signature of the token is wrong"


class TestAlgorithms:
    @pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", "HS256", "RS256", ""])
    def test_algorithm_that_is_not_configured_is_refused(self, algorithm: str) -> None:
        header = json.dumps({"alg": algorithm, "typ": "JWT"}).encode()
        text = raw_token(header, json.dumps(CLAIMS).encode(), b"")
        assert refusal(verifier(), text) == "the token is signed with an algorithm that is not accepted"

    @pytest.mark.parametrize("algorithm", [None, 1, ["EdDSA"], {"EdDSA": 1}])
    def test_algorithm_of_a_wrong_type_is_refused(self, algorithm: object) -> None:
        text = raw_token(json.dumps({"alg": algorithm}).encode(), json.dumps(CLAIMS).encode())
        assert "algorithm" in refusal(verifier(), text) or "malformed" in refusal(verifier(), text)

    @pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
    def test_public_key_is_not_taken_for_a_secret(self, algorithm: str) -> None:
        # Both are accepted, and the attacker signs by HMAC with the public key, which everybody has.
        keys = PublicKeys([(None, PRIVATE[algorithm].public_key())])
        both = TokenVerifier(TokenPolicy(algorithms=("HS256", algorithm)), keys, lambda: NOW)
        head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=")
        body = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).rstrip(b"=")
        hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
        signature = base64.urlsafe_b64encode(hmac.sign(head + b"." + body, pem(PRIVATE[algorithm]))).rstrip(b"=")
        assert refusal(both, b".".join((head, body, signature)).decode()) == "the token is signed with an unknown key"

    def test_secret_that_is_a_public_key_is_refused(self) -> None:
        with pytest.raises(UnusableKeyError, match="must not be used as a secret"):
            Secret(pem(RSA), ("HS256",))

    def test_key_of_another_curve_is_not_used(self) -> None:
        keys = PublicKeys([(None, PRIVATE["ES384"].public_key())])
        small = TokenVerifier(TokenPolicy(algorithms=("ES256",)), keys, lambda: NOW)
        assert "unknown key" in refusal(small, token(algorithm="ES256"))

    @pytest.mark.parametrize("headers", [{"crit": ["exp"]}, {"crit": []}, {"crit": "b64"}])
    def test_critical_extensions_are_refused(self, headers: dict[str, Any]) -> None:
        header = json.dumps({"alg": "EdDSA", **headers}).encode()
        text = raw_token(header, json.dumps(CLAIMS).encode())
        assert refusal(verifier(), text) in (
            "the token has critical extensions, which are not supported",
            "the token is malformed",
        )

    def test_keys_inside_a_token_are_ignored(self) -> None:
        mallory = ed25519.Ed25519PrivateKey.generate()
        inside = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(mallory.public_key()))
        text = jwt.encode(CLAIMS, mallory, "EdDSA", {"jwk": inside, "jku": "https://evil.example/keys", "x5u": "x"})
        assert refusal(verifier(), text) == "the signature of the token is wrong"


class TestKid:
    KEYS = PublicKeys([("old", RSA.public_key()), ("new", PRIVATE["EdDSA"].public_key())])

    def verify(self, text: str) -> Identity:
        return TokenVerifier(TokenPolicy(algorithms=("EdDSA", "RS256")), self.KEYS, lambda: NOW).verify(text)

    def test_kid_selects_a_key(self) -> None:
        assert self.verify(token(kid="new")).name == "alice"
        assert self.verify(token(algorithm="RS256", kid="old")).name == "alice"

    def test_token_without_a_kid_is_verified_with_each_key_of_its_algorithm(self) -> None:
        assert self.verify(token()).name == "alice"

    @pytest.mark.parametrize("kid", ["newer", "", "../../dev/null", "' OR 1=1 --", "\0", "x" * 1000])
    def test_kid_that_is_not_known_is_said_to_be_so(self, kid: str) -> None:
        with pytest.raises(UnknownKeyError):
            self.verify(token(kid=kid))

    def test_kid_of_a_key_for_another_algorithm_selects_nothing(self) -> None:
        with pytest.raises(UnknownKeyError):
            self.verify(token(kid="old"))

    @pytest.mark.parametrize("kid", [1, ["new"], {"a": 1}])
    def test_kid_of_a_wrong_type_is_refused(self, kid: object) -> None:
        text = raw_token(json.dumps({"alg": "EdDSA", "kid": kid}).encode(), json.dumps(CLAIMS).encode())
        with pytest.raises(TokenError, match="malformed"):
            self.verify(text)


class TestTime:
    @pytest.mark.parametrize(
        ("claims", "message"),
        [
            ({"exp": NOW - 11}, "the token has expired"),
            ({"exp": NOW - 10}, "the token has expired"),
            ({}, "the token lacks `exp`"),
            ({"exp": None}, "the token lacks `exp`"),
            ({"exp": str(NOW + 60)}, "the token is malformed: `exp` is not a number"),
            ({"exp": True}, "the token is malformed: `exp` is not a number"),
            ({"exp": [NOW + 60]}, "the token is malformed: `exp` is not a number"),
            ({"exp": math.inf}, "the token is malformed: `exp` is no time"),
            ({"exp": math.nan}, "the token is malformed: `exp` is no time"),
            ({"exp": 10**400}, "the token is malformed: `exp` is no time"),
            ({"exp": NOW + 60, "nbf": NOW + 11}, "the token is not valid yet"),
            ({"exp": NOW + 60, "nbf": "soon"}, "the token is malformed: `nbf` is not a number"),
        ],
    )
    def test_token_is_refused(self, claims: dict[str, Any], message: str) -> None:
        text = with_raw_payload(json.dumps({"sub": "alice", **claims}).encode())
        assert refusal(verifier(), text) == message

    @pytest.mark.parametrize("claims", [{"exp": NOW - 9}, {"exp": NOW + 60, "nbf": NOW + 9}, {"exp": NOW + 0.5}])
    def test_clocks_may_differ_by_the_leeway(self, claims: dict[str, Any]) -> None:
        assert verifier().verify(token({"sub": "alice", **claims})).name == "alice"

    def test_expiry_has_a_class_of_its_own(self) -> None:
        with pytest.raises(ExpiredTokenError):
            verifier().verify(token({"sub": "alice", "exp": NOW - 100}))

    def test_token_without_expiry_is_accepted_where_that_is_configured(self) -> None:
        found = verifier(expiry_required=False).verify(token({"sub": "alice"}))
        assert found == Identity("alice", ("default",), None)


class TestClaims:
    def test_issuer_and_audience_are_checked_where_they_are_configured(self) -> None:
        strict = verifier(issuer="https://login.example", audience="broker")
        good = {**CLAIMS, "iss": "https://login.example", "aud": ["other", "broker"]}
        assert strict.verify(token(good)).name == "alice"
        assert refusal(strict, token({**good, "iss": "https://evil.example"})) == "the token is from another issuer"
        assert refusal(strict, token({**good, "aud": "other"})) == "the token is for another audience"
        assert refusal(strict, token(CLAIMS)) == "the token lacks `iss`"
        assert verifier().verify(token(good)).name == "alice"

    @pytest.mark.parametrize(
        ("claims", "name"),
        [({"sub": "alice"}, "alice"), ({"sub": 17}, "17"), ({"sub": "alice@example.com"}, "alice@example.com")],
    )
    def test_identity_is_read(self, claims: dict[str, Any], name: str) -> None:
        assert verifier().verify(with_raw_payload(json.dumps({**CLAIMS, **claims}).encode())).name == name

    @pytest.mark.parametrize("value", [None, "", True, 1.5, [], {}, "a\nb", "x" * 256, 10**30])
    def test_token_without_an_identity_is_refused(self, value: object) -> None:
        text = with_raw_payload(json.dumps({**CLAIMS, "sub": value}).encode())
        assert "names" in refusal(verifier(), text)

    def test_claims_may_be_nested_or_have_dots(self) -> None:
        nested = {"exp": NOW + 60, "user": {"id": "bob"}, "https://example.com/roles": ["a"]}
        found = verifier(identity_claim="user.id", roles_claim="https://example.com/roles").verify(token(nested))
        assert found == Identity("bob", ("a",), NOW + 60)

    @pytest.mark.parametrize(
        ("value", "roles"),
        [
            (["a", "b", "a"], ("a", "b")),
            ("a b", ("a", "b")),
            (None, ("default",)),
            ([], ("default",)),
            ("", ("default",)),
        ],
    )
    def test_roles_are_read(self, value: object, roles: tuple[str, ...]) -> None:
        assert verifier().verify(token({**CLAIMS, "roles": value})).roles == roles

    @pytest.mark.parametrize("value", [{}, 1, [1], [None], [["a"]], ["r"] * 65])
    def test_roles_of_a_wrong_type_are_refused(self, value: object) -> None:
        assert "role" in refusal(verifier(), token({**CLAIMS, "roles": value}))


class TestMalformed:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            ".",
            "..",
            "...",
            "a.b.c",
            "eyJ",
            "é.é.é",
            "\0",
            "a" * MAX_TOKEN,
            raw_token(b"[]", b"{}"),
            raw_token(b'"EdDSA"', b"{}"),
            raw_token(b"[" * 3000, b"{}"),
            raw_token(b'{"alg":' + b"9" * 5000 + b"}", b"{}"),
        ],
    )
    def test_what_is_no_token_is_refused(self, text: str) -> None:
        assert refusal(verifier(), text).startswith("the token is ")

    def test_token_that_is_too_long_is_not_looked_at(self) -> None:
        assert refusal(verifier(), "a" * (MAX_TOKEN + 1)) == "the token is too long"

    @pytest.mark.parametrize(
        "payload", [b"", b"[]", b"null", b"1", b"{", b'{"sub":' + b"[" * 3000, b"\xff\xfe", b'{"exp":' + b"9" * 5000]
    )
    def test_signed_payload_that_is_no_object_is_refused(self, payload: bytes) -> None:
        assert refusal(verifier(), with_raw_payload(payload)) == "the token is malformed"

    @given(st.text(max_size=200))
    def test_any_text_is_refused_by_a_token_error(self, text: str) -> None:
        with pytest.raises(TokenError):
            verifier().verify(text)

    @given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
    def test_any_three_parts_are_refused_by_a_token_error(self, head: bytes, payload: bytes, signature: bytes) -> None:
        with pytest.raises(TokenError):
            verifier().verify(raw_token(head, payload, signature))

    def test_errors_hold_nothing_of_the_token(self) -> None:
        # Its parts have words that would stand out.
        for text in (
            raw_token(b'{"alg":"leak"}', b"{}"),
            raw_token(b'{"alg":"EdDSA","kid":"leak"}', b'{"sub":"leak"}'),
            token({**CLAIMS, "sub": "leak", "exp": 1}),
            with_raw_payload(b'{"exp":"leak"}'),
        ):
            assert "leak" not in refusal(verifier(issuer="x"), text)


class TestKeyFiles:
    def test_several_keys_and_kinds_in_pem_format(self) -> None:
        keys = read_public_keys(b"\n".join(pem(PRIVATE[name]) for name in ("RS256", "ES256", "EdDSA")))
        assert len(keys) == 3
        verify = TokenVerifier(TokenPolicy(algorithms=("RS256", "ES256", "EdDSA")), keys, lambda: NOW)
        for name in ("RS256", "ES256", "EdDSA"):
            assert verify.verify(token(algorithm=name)).name == "alice"

    def test_key_set_as_a_file(self) -> None:
        jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key()))
        keys = read_public_keys(json.dumps({"keys": [{**jwk, "kid": "one"}]}).encode())
        assert len(keys.find("RS256", "one")) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no public key in PEM format"),
            (b"{", "neither PEM nor a JSON Web Key Set"),
            (b"{}", "it has no list `keys`"),
            (b'{"keys":[]}', "no key for signatures"),
            (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "cannot be read"),
            (b"-----BEGIN EC PRIVATE KEY-----\n", "has a private key"),
            (pem(rsa.generate_private_key(65537, 1024)), "1024 bits; 2048 are needed"),
            (LONG_RSA, "8193 bits; at most 8192 are supported"),
            (pem(ec.generate_private_key(ec.SECP256K1())), "the curve secp256k1 are not supported"),
        ],
    )
    def test_file_that_cannot_be_used(self, content: bytes, message: str) -> None:
        with pytest.raises(UnusableKeyError, match=message):
            read_public_keys(content)

    @pytest.mark.parametrize(
        "entry",
        [
            1,
            {},
            {"kty": "oct", "k": "c2VjcmV0"},
            {"kty": "RSA"},
            {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
            {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
            {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key())), "use": "enc"},
        ],
    )
    def test_keys_of_a_set_that_cannot_be_used_are_left_out(self, entry: object) -> None:
        good = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(PRIVATE["EdDSA"].public_key()))
        keys = read_key_set({"keys": [entry, {**good, "kid": "good"}]})
        assert len(keys) == 1
        assert keys.find("EdDSA", "good")

    def test_private_keys_of_a_set_are_used_as_public_ones(self) -> None:
        private = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(PRIVATE["EdDSA"]))
        verify = TokenVerifier(TokenPolicy(algorithms=("EdDSA",)), read_key_set({"keys": [private]}), lambda: NOW)
        assert verify.verify(token()).name == "alice"

    def test_key_set_is_bounded(self) -> None:
        with pytest.raises(UnusableKeyError, match="more than 64 keys"):
            read_key_set({"keys": [{}] * 65})

    @pytest.mark.parametrize(("algorithm", "size"), [("HS256", 31), ("HS384", 47), ("HS512", 63)])
    def test_secret_that_is_too_short_is_refused(self, algorithm: str, size: int) -> None:
        with pytest.raises(UnusableKeyError, match=f"the secret has {size} bytes"):
            Secret(b"x" * size, (algorithm,))
