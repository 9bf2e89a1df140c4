"""`wsbroker token`: makes and checks tokens with the configured keys."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from broker.cli.options import Group, config_option, json_option
from broker.cli.report import Report, Status, print_text, to_json

if TYPE_CHECKING:
    from broker.auth.authenticator import Authenticator
    from broker.auth.tokens import TokenError
    from broker.config import Config
    from broker.identity import Identity

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MAX_INPUT: Final = 65_536
"""Characters of standard input that are read for a token."""


@click.group("token", cls=Group)
def command() -> None:
    """Make and check tokens."""


@command.command("make")
@click.option("--identity", metavar="NAME", required=True, help="Whom the token names.")
@click.option("--role", "roles", metavar="R", multiple=True, help="A role; may be given several times.")
@click.option("--ttl", metavar="T", default="1h", show_default=True, help="How long it is valid: 90s, 15m, 1h, 30d.")
@click.option(
    "--key",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The private key to sign it with, in PEM format. By default the configured secret signs it.",
)
@click.option("--kid", metavar="K", help="The `kid` of the key, where the broker has a JSON Web Key Set.")
@config_option
@json_option
def make(
    identity: str, roles: tuple[str, ...], ttl: str, key: Path | None, kid: str | None, file: Path | None, as_json: bool
) -> int:
    """Make a token, and print it."""
    from broker.auth.making import make_token
    from broker.auth.verification_keys import UnusableKeyError
    from broker.errors import ConfigError

    report = Report(as_json)
    seconds = _seconds(ttl)
    try:
        config = _configured(file)[0]
    except ConfigError as error:
        return report.config_error(error)
    try:
        token = make_token(config.auth, identity, roles, seconds, private_key=key, kid=kid)
    except UnusableKeyError as error:
        raise click.BadParameter(str(error), param_hint="--key") from None
    except OSError as error:
        raise click.BadParameter(f"{key} cannot be read: {error.strerror}", param_hint="--key") from None
    return print_text((to_json({"token": token}) if as_json else token) + "\n", as_json)


@command.command("check")
@click.argument("token", required=False)
@config_option
@json_option
def check(token: str | None, file: Path | None, as_json: bool) -> int:
    """Say whose a token or API key is, and what it allows.

    Without TOKEN it is read from standard input, which other users of the machine cannot see.
    """
    from broker.auth.permissions import RIGHTS
    from broker.auth.tokens import TokenError
    from broker.errors import ConfigError

    report = Report(as_json)
    if token is None:
        token = sys.stdin.read(MAX_INPUT).strip()
    try:
        authenticator = _configured(file)[1]
    except ConfigError as error:
        return report.config_error(error)
    found = _identify(authenticator, token)
    if isinstance(found, TokenError):
        report.error("unauthorized", str(found))
        return Status.NO_PERMISSION
    rights = authenticator.rights(found)
    allowed = None if rights is None else {str(name): list(getattr(rights, name)) for name in RIGHTS}
    fields = {"identity": found.name, "roles": list(found.roles), "expires": found.expires, "rights": allowed}
    if as_json:
        return print_text(to_json(fields) + "\n", as_json)
    return print_text("".join(f"{name:10} {text}\n" for name, text in _lines(found, allowed)), as_json)


def _configured(file: Path | None) -> tuple[Config, Authenticator]:
    """Read the configuration and its keys. Raises ConfigError."""
    from broker.auth.configured import check_access, load_authenticator
    from broker.config import Reading

    reading = Reading(file, os.environ, {})
    reading.raise_problems(check_access(reading.keys, reading.roles))
    return reading.config, load_authenticator(reading.config)


def _identify(authenticator: Authenticator, token: str) -> Identity | TokenError:
    """Find whose token it is; for that, fetch the keys if they are behind a URL."""
    from broker.auth.key_set import KeySetError
    from broker.auth.tokens import TokenError

    try:
        if authenticator.key_set is not None and not authenticator.is_cheap(token):
            import asyncio

            asyncio.run(authenticator.key_set.fetch_now())
        return authenticator.identify(token)
    except TokenError as error:
        return error
    except KeySetError as error:
        return TokenError(f"the keys of auth.jwks_url cannot be fetched: {error}")


def _lines(identity: Identity, allowed: dict[str, list[str]] | None) -> list[tuple[str, str]]:
    from datetime import UTC, datetime

    try:
        expires = "never" if identity.expires is None else f"{datetime.fromtimestamp(identity.expires, UTC):%F %T} UTC"
    except (OverflowError, ValueError):
        expires = "in the far future"
    lines = [("identity", identity.name or ""), ("roles", " ".join(identity.roles)), ("expires", expires)]
    if allowed is None:
        return [*lines, ("rights", "everything, as there are no [[roles]]")]
    return [*lines, *((name, " ".join(patterns) or "nothing") for name, patterns in allowed.items())]


def _seconds(text: str) -> int:
    """Read a duration like 15m."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if not found:
        raise click.BadParameter("must be a number with s, m, h or d behind it, like 15m", param_hint="--ttl")
    return int(found[1]) * UNITS[found[2]]
