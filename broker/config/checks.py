"""What is wrong with values: each on its own, and together."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from broker.config.addresses import Address, find_group, parse_address, printable
from broker.config.keys import KEYS, Key, convert
from broker.errors import ConfigError, Place, Problem
from broker.net.origin import Origin, parse_origin

SQLITE: Final = "sqlite://"
"""How the engine is named that keeps history in a file; the absolute path follows."""


class Setting(NamedTuple):
    key: str
    value: object
    place: Place
    is_text: bool = False
    """Whether the value is text which stands for a number, a list and so on, as in the environment."""
    elements: Sequence[Place] = ()
    """The place of each element of a list, where they are known."""

    def place_of(self, element: int | None) -> Place:
        """Give the place of an element, counted from 0, or that of the whole value."""
        return self.place if element is None or element >= len(self.elements) else self.elements[element]


class Mistake(NamedTuple):
    """What is wrong with a value, or with one element of a list, which is counted from 0."""

    message: str
    element: int | None = None


def check(setting: Setting) -> list[Problem]:
    """Say what is wrong with one value on its own."""
    key, value = KEYS[setting.key], setting.value
    mistakes = [Mistake(message) for message in check_value(key, value, setting.is_text)]
    if mistakes and setting.key in _CHECKS and key.is_list and isinstance(value, list) and value:
        # Name the elements that are wrong, and check the others.
        wrong = [number for number, each in enumerate(value) if not isinstance(each, str)]
        right = [number for number in range(len(value)) if number not in wrong]
        mistakes = [Mistake(f"must be a string, not {_show(value[number])}", number) for number in wrong]
        for message, number in _CHECKS[setting.key]([value[number] for number in right]):
            mistakes.append(Mistake(message, None if number is None else right[number]))
    elif not mistakes and setting.key in _CHECKS:
        mistakes = _CHECKS[setting.key](converted(setting))
    return [Problem(mistake.message, setting.key, setting.place_of(mistake.element)) for mistake in mistakes]


def check_value(key: Key, value: object, is_text: bool = False) -> list[str]:
    try:
        convert(key, value, is_text)
    except ValueError:
        if key.secret:
            return [f"must be {key.allowed}{key.unit}; what it is is not shown"]
        hint = f'; write "{value}"' if key.allowed == "a string" and type(value) is int else ""
        return [f"must be {key.allowed}{key.unit}, not {_show(value)}{hint}"]
    return []


def _show(value: object) -> str:
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:60] + "…"


def converted(setting: Setting) -> Any:
    """Give the value in the type of its key. Raises ValueError where it is not of that type."""
    return convert(KEYS[setting.key], setting.value, setting.is_text)


def check_table(key: Key, value: object) -> list[str]:
    """Say what is wrong with one value of a table like [[topics]]."""
    mistakes = check_value(key, value)
    checked = _TABLE_CHECKS.get(f"{key.section}.{key.name}")
    return mistakes or ([] if checked is None else [each.message for each in checked(convert(key, value, False))])


NOTHING: Final[Mapping[str, Setting | None]] = {}


def contradictions(
    settings: Mapping[str, Setting], unknown: Mapping[str, Setting | None] = NOTHING, tables: Container[str] = ()
) -> list[Problem]:
    """Say what is wrong with values together, each of which is right on its own.

    `unknown` are keys whose values are wrong: nothing is said about them, except about the valid addresses among them.
    `tables` are the kinds of tables that there are.
    """

    def value(key: str) -> Any:
        return converted(settings[key]) if key in settings else KEYS[key].default

    def place(key: str) -> Place:
        return settings[key].place if key in settings else Place()

    def known(*keys: str) -> bool:
        return not any(key in unknown for key in keys)

    problems = []
    queue, ceiling = value("limits.max_queue"), value("limits.max_queue_limit")
    if queue > ceiling and known("limits.max_queue", "limits.max_queue_limit"):
        message = f"{queue} must not be more than limits.max_queue_limit ({place('limits.max_queue_limit')})"
        problems.append(Problem(f"{message}, which is {ceiling}", "limits.max_queue", place("limits.max_queue")))
    for name, other in PAIRS:
        if value(name) is not None and value(other) is None and known(name, other):
            problems.append(Problem(f"needs {other} beside it", name, place(name)))
    for problem in _contradictions_of_access(value, known, tables):
        where = place(problem.key) if problem.key in KEYS else None
        problems.append(msgspec.structs.replace(problem, place=where))

    def elements(key: str) -> list[Any]:
        setting = settings.get(key) or unknown.get(key)
        return [] if setting is None else _elements(setting)

    for key, number, problem in _open_addresses(value, known, tables, elements):
        setting = settings.get(key) or unknown.get(key)
        where = Place() if setting is None else setting.place_of(number)
        problems.append(msgspec.structs.replace(problem, place=where))
    return problems


PAIRS: Final = (
    ("server.certificate", "server.key"),
    ("server.key", "server.certificate"),
    ("server.client_ca", "server.certificate"),
)
"""Settings that need another one."""
IDENTIFYING: Final = (
    *("auth.key_file", "auth.key", "auth.jwks_url", "auth.secret_file", "auth.secret", "auth.url"),
    "server.client_ca",
)
"""The settings by which clients can be identified; each is enough."""
EXCLUSIVE: Final = (
    ("auth.key_file", "auth.key"),
    ("auth.key_file", "auth.jwks_url"),
    ("auth.key", "auth.jwks_url"),
    ("auth.secret_file", "auth.secret"),
)
"""Settings of which one may be set."""


def _contradictions_of_access(
    value: Callable[[str], Any], known: Callable[..., bool], tables: Container[str]
) -> Iterator[Problem]:
    """Say what is wrong with who is let in. The problems have no place yet."""
    anonymous, required = value("server.anonymous"), value("auth.required")
    if not known("server.anonymous", "auth.required"):
        return
    if anonymous is not None and anonymous == required:
        shown = "true" if anonymous else "false"
        yield Problem(f"{shown} contradicts auth.required, which is {shown} too", "server.anonymous")
    for keys in EXCLUSIVE:
        if all(value(key) is not None for key in keys):
            yield Problem(f"only one of {' and '.join(keys)} may be set", keys[0])
    identifies = "keys" in tables or any(value(key) is not None or not known(key) for key in IDENTIFYING)
    if identifies and "roles" not in tables:
        message = 'allows nothing without [[roles]]; write one, like name = "default" with subscribe = [">"]'
        by = [key for key in IDENTIFYING if value(key) is not None]
        yield from (Problem(message, key) for key in [*by, *(["keys"] if "keys" in tables else [])])
    if (required or anonymous is False) and not identifies:
        for_tokens = "auth.key_file, auth.jwks_url, auth.secret_file"
        needed = f"a key for tokens ({for_tokens}), auth.url, server.client_ca or [[keys]]"
        yield Problem(f"nobody could connect: it needs {needed}", "auth.required" if required else "server.anonymous")
    if known("auth.algorithms"):
        yield from _contradictions_of_algorithms(value)


def _open_addresses(
    value: Callable[[str], Any],
    known: Callable[..., bool],
    tables: Container[str],
    elements: Callable[[str], list[Any]],
) -> Iterator[tuple[str, int, Problem]]:
    """Find addresses that other machines can reach, and where nobody has to say who they are.

    `elements` gives the addresses of a setting, of which some may be wrong. Gives the setting, the place of the first
    such address in it, and the problem.
    """
    required = value("auth.required")
    if value("server.anonymous") is not None or not known("server.anonymous", "auth.required"):
        return
    identifies = "keys" in tables or any(value(key) is not None or not known(key) for key in IDENTIFYING)
    # Where an identity is required and there is nothing that could give one, that is said already.
    for key, is_safe in (
        ("server.listen", required or (identifies and required is not False)),
        ("server.admin", "keys" in tables or (required and not identifies)),
    ):
        addresses = elements(key)
        remote = [number for number, address in enumerate(addresses) if _is_remote(address)]
        if remote and not is_safe:
            yield key, remote[0], too_open(key, [addresses[number] for number in remote])


def _contradictions_of_algorithms(value: Callable[[str], Any]) -> Iterator[Problem]:
    secrets = [key for key in ("auth.secret", "auth.secret_file") if value(key) is not None]
    shared = [name for name in value("auth.algorithms") if name.startswith("HS")]
    if secrets and not shared:
        yield Problem("is for HS256, HS384 and HS512, and auth.algorithms has none of these", secrets[0])
    if shared and not secrets:
        yield Problem(f"{shared[0]} needs auth.secret_file, the secret that it is signed with", "auth.algorithms")


def _elements(setting: Setting) -> list[Any]:
    """Give the elements of a list, or a single value as one, also where some of them are wrong."""
    try:
        value = converted(setting)
    except ValueError:
        value = setting.value
    return value if isinstance(value, list) else [value]


def _is_remote(address: object) -> bool:
    """Whether other machines can reach an address; False if it is none."""
    try:
        return isinstance(address, str) and not parse_address(address).local
    except ConfigError:
        return False


def too_open(key: str, addresses: Iterable[str], place: Place | None = None) -> Problem:
    """Say that the broker does not listen on these for everybody."""
    local = "127.0.0.1:8766" if key == "server.admin" else "127.0.0.1:8765"
    require = "configure an API key ([[keys]])" if key == "server.admin" else "require tokens ([auth])"
    return Problem(
        f"{', '.join(addresses)} can be reached from other machines, and everybody is allowed; {require}, listen on "
        f"{local} or a Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] "
        "(WSBROKER_SERVER__ANONYMOUS=true) to allow it",
        key,
        place,
    )


def _check_listen(addresses: list[str]) -> list[Mistake]:
    mistakes = []
    seen: dict[str, int] = {}
    for number, address in enumerate(addresses):
        times = seen[address] = seen.get(address, 0) + 1
        if times == 2:
            mistakes.append(Mistake(f"`{printable(address)}` is listed twice", number))
        if times > 1:
            continue
        try:
            parse_address(address)
        except ConfigError as error:
            mistakes += [Mistake(problem.message, number) for problem in error.problems]
    return mistakes


def _check_admin(address: str) -> list[Mistake]:
    return _check_listen([address]) if address else []


def _check_engine(engine: str) -> list[Mistake]:
    path = engine.removeprefix(SQLITE)
    if engine == "memory" or (path != engine and path.startswith("/") and not path.endswith("/") and "\0" not in path):
        return []
    form = "memory, or sqlite:// and an absolute path, like sqlite:///var/lib/wsbroker/broker.db"
    return [Mistake(f"must be {form}, not {printable(engine)}")]


def _check_path(path: str) -> list[Mistake]:
    if not re.fullmatch(r"/[!-~]*", path) or "?" in path or "#" in path:
        return [Mistake("must begin with / and hold only visible ASCII characters (others as %XX), no ? and no #")]
    if path == "/healthz":
        return [Mistake("must not be /healthz, which answers load balancers")]
    return []


def _check_origins(origins: list[str]) -> list[Mistake]:
    message = (
        "`%s` is no origin: it must be scheme://host or scheme://host:port, without a path; "
        "https://*.example.com stands for any subdomain"
    )
    return [
        Mistake(message % printable(origin), number)
        for number, origin in enumerate(origins)
        if origin not in ("*", "null") and not _is_rule(parse_origin(origin))
    ]


def _is_rule(origin: Origin | None) -> bool:
    """Whether an origin can be listed: its only star is that of `*.`, and it has a port that exists."""
    if origin is None or not 1 <= int(origin.port or 1) <= 65_535:
        return False
    name = origin.host.removeprefix("*.")
    return "*" not in name and (bool(name) or origin.host == name)


def _check_networks(networks: list[str], *words: str) -> list[Mistake]:
    """Check networks; `words` are allowed beside them."""
    mistakes = []
    for number, network in enumerate(networks):
        try:
            if network not in words:
                ipaddress.ip_network(network)
        except ValueError as error:
            message = f"`{printable(network)}` is no network, as 10.0.0.0/8: {printable(str(error))}"
            mistakes.append(Mistake(message, number))
    return mistakes


def _check_proxy_protocol(networks: list[str]) -> list[Mistake]:
    return _check_networks(networks, "unix")


def _check_unix_mode(mode: str) -> list[Mistake]:
    if not re.fullmatch(r"0?[0-7]{3}", mode):
        return [Mistake(f'must be three octal digits, like "660", not {json.dumps(mode, ensure_ascii=False)}')]
    return []


def _check_unix_group(group: str | None) -> list[Mistake]:
    try:
        if group is not None:
            find_group(group)
    except KeyError:
        return [Mistake(f"there is no group `{printable(group or '')}` on this machine")]
    return []


def _check_url(url: str | None) -> list[Mistake]:
    """Say what is wrong with a URL that the broker asks."""
    if url is None:
        return []
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return [Mistake(f"is no URL: {printable(str(error))}")]
    host = parts.hostname or ""
    if not host or not url.isascii() or not url.isprintable() or " " in url or port == 0:
        return [Mistake("must be a URL like https://host/path")]
    if parts.username is not None or parts.password is not None or parts.fragment:
        return [Mistake("must have no user, no password and no fragment")]
    if parts.scheme == "https" or (parts.scheme == "http" and Address(host=host).local):
        return []
    return [Mistake("must begin with https://; http:// is for loopback alone")]


def _check_header_names(names: list[str]) -> list[Mistake]:
    # Those of the connection itself are the broker's own.
    taken = ("host", "connection", "upgrade", "content-length", "transfer-encoding", "accept", "x-forwarded-for")
    return [
        Mistake(f"`{printable(name)}` is no header that can be passed on", number)
        for number, name in enumerate(names)
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in taken
    ]


def _check_secret(secret: str | None) -> list[Mistake]:
    # Which algorithms it is long enough for is checked when it is read, as of a file.
    return [Mistake("must not be empty")] if secret == "" else []


def _check_hash(text: str) -> list[Mistake]:
    if re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        return []
    if text.startswith("wsb_"):
        return [Mistake("is an API key itself; here stands its hash, which `wsbroker key make` prints with it")]
    return [Mistake("is no hash as `wsbroker key make` prints it, sha256: and 64 hexadecimal digits")]


def _check_name(name: str) -> list[Mistake]:
    if 0 < len(name) <= 255 and name.isprintable():
        return []
    return [Mistake("must be 1 to 255 characters that can be printed")]


_CHECKS: Final[dict[str, Callable[[Any], list[Mistake]]]] = {
    "server.listen": _check_listen,
    "server.admin": _check_admin,
    "server.engine": _check_engine,
    "server.path": _check_path,
    "server.origins": _check_origins,
    "server.trusted_proxies": _check_networks,
    "server.proxy_protocol": _check_proxy_protocol,
    "server.unix_mode": _check_unix_mode,
    "server.unix_group": _check_unix_group,
    "auth.jwks_url": _check_url,
    "auth.url": _check_url,
    "auth.url_headers": _check_header_names,
    "auth.secret": _check_secret,
    "auth.identity_claim": _check_name,
    "auth.roles_claim": _check_name,
}
_TABLE_CHECKS: Final[dict[str, Callable[[Any], list[Mistake]]]] = {
    "keys.name": _check_name,
    "keys.hash": _check_hash,
    "roles.name": _check_name,
}
