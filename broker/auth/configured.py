"""From the configuration to an `Authenticator`: reads the key files, and says every mistake in keys and roles.

The one file of this package that reads files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from broker.auth.authenticator import Authenticator
from broker.auth.certificates import ClientCertificates
from broker.auth.key_set import KeySet
from broker.auth.permissions import IDENTITY_TOKEN, RIGHTS
from broker.auth.tokens import TokenPolicy, TokenVerifier
from broker.auth.verification_keys import MIN_SECRET, Keys, KeySources, Secret, UnusableKeyError, read_public_keys
from broker.auth.webhook import Webhook
from broker.config import ApiKey, Auth, Config, Role, read_file
from broker.errors import CommandError, ConfigError, Problem
from broker.topics import check_pattern

CREDENTIAL: Final = "credential:"
"""Before the name of a credential that systemd passes (systemd.exec(5), LoadCredential=)."""
MAX_FILE: Final = 1 << 20
"""Bytes of a key file."""
SAMPLE: Final = "x"
"""What stands for `{identity}` where a pattern is checked."""


def load_authenticator(
    config: Config, environ: Mapping[str, str] = os.environ, before: Authenticator | None = None
) -> Authenticator:
    """Read the keys, and build what decides on tokens. Raises ConfigError with every mistake in the keys.

    Whether an identity is required is left at what the configuration says; the daemon knows the sockets. A key set that
    `before` has fetched from the same URL is kept.
    """
    auth = config.auth
    if not (identifies(config) or config.keys or config.roles or requires_identity(config)):
        return Authenticator()
    key_set = None
    if auth.jwks_url is not None:
        known = None if before is None else before.key_set
        key_set = known if known is not None and known.url == auth.jwks_url else KeySet(auth.jwks_url)
    return Authenticator(
        required=requires_identity(config),
        verifier=_verifier(auth, environ, key_set),
        key_set=key_set,
        webhook=_webhook(auth, None if before is None else before.webhook),
        certificates=_certificates(config),
        keys=config.keys,
        roles=config.roles,
    )


def requires_identity(config: Config, remote: bool = False) -> bool:
    """Whether clients must show a token. `remote`: other machines can connect."""
    if config.auth.required is not None:
        return config.auth.required
    return not config.server.anonymous if config.server.anonymous is not None else remote


def identifies(config: Config) -> bool:
    """Whether there are keys to verify tokens with, a backend that says who a client is, or client certificates."""
    auth = config.auth
    sources = (auth.key_file, auth.key, auth.jwks_url, auth.secret_file, auth.secret, auth.url, config.server.client_ca)
    return any(source is not None for source in sources)


def _certificates(config: Config) -> ClientCertificates | None:
    """Give what reads identities from client certificates; None where no authority of theirs is configured."""
    if config.server.client_ca is None:
        return None
    return ClientCertificates(config.auth.certificate_identity, config.auth.certificate_roles)


def _webhook(auth: Auth, before: Webhook | None) -> Webhook | None:
    """Give what asks the backend: `before`, if its settings are the same."""
    if auth.url is None:
        return None
    webhook = Webhook(auth.url, auth.url_timeout, auth.url_concurrency)
    return before if before is not None and before.settings == webhook.settings else webhook


def check_access(keys: Mapping[int, ApiKey], roles: Mapping[int, Role]) -> list[Problem]:
    """Say what is wrong with API keys and roles, by their numbers in the file."""
    problems = list(_repeated("keys", "hash", {number: key.hash for number, key in keys.items()}))
    problems += _repeated("keys", "name", {number: key.name for number, key in keys.items()})
    problems += _repeated("roles", "name", {number: role.name for number, role in roles.items()})
    for number, role in roles.items():
        problems += [
            Problem(message, f"roles[{number}].{right}")
            for right in RIGHTS
            for pattern in getattr(role, right)
            if (message := _mistake(pattern)) is not None
        ]
    return problems


def _repeated(section: str, name: str, values: Mapping[int, str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for number, value in values.items():
        if value in first:
            yield Problem(f"is the same as in {section}[{first[value]}]", f"{section}[{number}].{name}")
        first.setdefault(value, number)


def _mistake(pattern: str) -> str | None:
    """Say what is wrong with a pattern of a role."""
    tokens = [SAMPLE if token == IDENTITY_TOKEN else token for token in pattern.split(".")]
    if any("{" in token and "}" in token for token in tokens):
        return f"`{pattern[:64]}`: {IDENTITY_TOKEN} must be a token of its own, and there is no other placeholder"
    try:
        check_pattern(".".join(tokens))
    except CommandError as error:
        return error.message
    return None


def read_secret(auth: Auth, environ: Mapping[str, str] = os.environ) -> bytes | None:
    """Read the secret; None where none is configured. Raises OSError, UnusableKeyError."""
    if auth.secret is not None:
        return auth.secret.encode()
    return None if auth.secret_file is None else _read(auth.secret_file, environ).removesuffix(b"\n")


def _verifier(auth: Auth, environ: Mapping[str, str], key_set: KeySet | None) -> TokenVerifier | None:
    """Give what verifies tokens; None where no keys are configured. Raises ConfigError."""
    problems: list[Problem] = []
    sources: list[Keys] = [] if key_set is None else [key_set]
    secrets = [name for name in auth.algorithms if name in MIN_SECRET]
    public = [name for name in auth.algorithms if name not in MIN_SECRET]
    for name, value in (("key_file", auth.key_file), ("key", auth.key)):
        if value is None:
            continue
        try:
            keys = read_public_keys(_read(value, environ) if name == "key_file" else value.encode())
        except (UnusableKeyError, OSError) as error:
            problems.append(_problem(name, value, error))
            continue
        sources.append(keys)
        if not set(keys.algorithms) & set(public):
            what = f"the keys are for {_listed(keys.algorithms)}, and auth.algorithms has none of these"
            problems.append(Problem(what, f"auth.{name}"))
    for name, value in (("secret_file", auth.secret_file), ("secret", auth.secret)):
        if value is None:
            continue
        try:
            sources.append(Secret(read_secret(auth, environ) or b"", secrets))
        except (UnusableKeyError, OSError) as error:
            problems.append(_problem(name, value, error))
    if problems:
        raise ConfigError(problems)
    if not sources:
        return None
    policy = TokenPolicy(
        algorithms=tuple(auth.algorithms),
        issuer=auth.issuer,
        audience=auth.audience,
        identity_claim=auth.identity_claim,
        roles_claim=auth.roles_claim,
        leeway=auth.leeway,
        expiry_required=auth.expiry_required,
    )
    return TokenVerifier(policy, KeySources(sources))


def _read(path: str, environ: Mapping[str, str]) -> bytes:
    """Read a key file, or a credential. Raises OSError, UnusableKeyError."""
    if path.startswith(CREDENTIAL):
        folder, name = environ.get("CREDENTIALS_DIRECTORY"), path.removeprefix(CREDENTIAL)
        if folder is None:
            raise UnusableKeyError("systemd has passed no credentials; the unit needs LoadCredential=")
        if not name or "/" in name or name in (".", ".."):
            raise UnusableKeyError("a credential has a name without a slash")
        path = f"{folder}/{name}"
    try:
        content = read_file(path)
    except ValueError as error:  # a NUL in the path
        raise UnusableKeyError(str(error)) from None
    if len(content) > MAX_FILE:
        raise UnusableKeyError(f"the file has more than {MAX_FILE} bytes")
    return content


def _problem(name: str, value: str, error: Any) -> Problem:
    reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    return Problem(f"{value}: {reason}" if name.endswith("_file") else reason, f"auth.{name}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
