"""What is wrong with values: each on its own, and together."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Final, NamedTuple

from broker.config.addresses import parse_address, printable
from broker.config.keys import KEYS, Key, convert
from broker.errors import ConfigError, Place, Problem

SQLITE: Final = "sqlite://"
"""How the engine is named that keeps history in a file; the absolute path follows."""


class Setting(NamedTuple):
    key: str
    value: object
    place: Place
    is_text: bool = False
    """Whether the value is text which stands for a number, a list and so on, as in the environment."""


def check(setting: Setting) -> list[str]:
    """Say what is wrong with one value on its own."""
    mistakes = check_value(KEYS[setting.key], setting.value, setting.is_text)
    return mistakes or (_CHECKS[setting.key](converted(setting)) if setting.key in _CHECKS else [])


def check_value(key: Key, value: object, is_text: bool = False) -> list[str]:
    try:
        convert(key, value, is_text)
    except ValueError:
        shown = json.dumps(value, default=str, ensure_ascii=False)
        return [f"must be {key.allowed}{key.unit}, not {shown if len(shown) <= 60 else shown[:60] + '…'}"]
    return []


def converted(setting: Setting) -> Any:
    """Give the value in the type of its key. Raises ValueError where it is not of that type."""
    return convert(KEYS[setting.key], setting.value, setting.is_text)


def contradictions(settings: Mapping[str, Setting], unknown: Container[str] = ()) -> list[Problem]:
    """Say what is wrong with values together, each of which is right on its own.

    `unknown` are keys whose values are not known, because they are wrong: nothing is said about them.
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
    for name, other in (("server.certificate", "server.key"), ("server.key", "server.certificate")):
        if value(name) is not None and value(other) is None and known(name, other):
            problems.append(Problem(f"needs {other} beside it", name, place(name)))
    listen = value("server.listen")
    admin = value("server.admin")
    for key, addresses in (("server.listen", listen), ("server.admin", [admin] if admin else [])):
        remote = [address for address in addresses if not parse_address(address).local]
        if remote and value("server.anonymous") is None and known(key, "server.anonymous"):
            problems.append(too_open(key, remote, place(key)))
    return problems


def too_open(key: str, addresses: Iterable[str], place: Place | None = None) -> Problem:
    """Say that the broker does not listen on these for everybody."""
    local = "127.0.0.1:8766" if key == "server.admin" else "127.0.0.1:8765"
    return Problem(
        f"{', '.join(addresses)} can be reached from other machines, and everybody is allowed; listen on {local} or a "
        "Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] "
        "(WSBROKER_SERVER__ANONYMOUS=true) to allow it",
        key,
        place,
    )


def _check_listen(addresses: list[str]) -> list[str]:
    problems = [f"{printable(text)} is listed twice" for text in dict.fromkeys(addresses) if addresses.count(text) > 1]
    for address in addresses:
        try:
            parse_address(address)
        except ConfigError as error:
            problems += [problem.message for problem in error.problems]
    return problems


def _check_admin(address: str) -> list[str]:
    return _check_listen([address]) if address else []


def _check_engine(engine: str) -> list[str]:
    path = engine.removeprefix(SQLITE)
    if engine == "memory" or (path != engine and path.startswith("/") and not path.endswith("/") and "\0" not in path):
        return []
    form = "memory, or sqlite:// and an absolute path, like sqlite:///var/lib/wsbroker/broker.db"
    return [f"must be {form}, not {printable(engine)}"]


def _check_path(path: str) -> list[str]:
    if not re.fullmatch(r"/[!-~]*", path) or "?" in path or "#" in path:
        return ["must begin with / and hold only visible ASCII characters (others as %XX), no ? and no #"]
    if path == "/healthz":
        return ["must not be /healthz, which answers load balancers"]
    return []


def _check_origins(origins: list[str]) -> list[str]:
    return [
        f"`{printable(origin)}` is no origin: it must be scheme://host or scheme://host:port, without a path"
        for origin in origins
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin)
    ]


def _check_networks(networks: list[str]) -> list[str]:
    problems = []
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            problems.append(f"`{printable(network)}` is no network, as 10.0.0.0/8: {printable(str(error))}")
    return problems


def _check_anonymous(anonymous: bool | None) -> list[str]:
    # With tokens this becomes a choice; until then it would be a broker that refuses every client.
    return ["false is not supported yet: nobody could connect, as there are no tokens"] if anonymous is False else []


_CHECKS: Final[dict[str, Callable[[Any], list[str]]]] = {
    "server.listen": _check_listen,
    "server.admin": _check_admin,
    "server.engine": _check_engine,
    "server.path": _check_path,
    "server.origins": _check_origins,
    "server.anonymous": _check_anonymous,
    "server.trusted_proxies": _check_networks,
}

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:*\[\]]+)(:[1-9][0-9]{0,4})?", re.IGNORECASE)
