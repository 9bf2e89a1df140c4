"""What is wrong with values: each on its own, and together."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from broker.config.addresses import find_group, parse_address, printable
from broker.config.keys import KEYS, Key, convert
from broker.errors import ConfigError, Place, Problem
from broker.net.origin import Origin, parse_origin


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
    if mistakes and key.is_list and isinstance(value, list) and value:
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
        hint = f'; write "{value}"' if key.allowed == "a string" and type(value) is int else ""
        return [f"must be {key.allowed}{key.unit}, not {_show(value)}{hint}"]
    return []


def _show(value: object) -> str:
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:60] + "…"


def converted(setting: Setting) -> Any:
    """Give the value in the type of its key. Raises ValueError where it is not of that type."""
    return convert(KEYS[setting.key], setting.value, setting.is_text)


NOTHING: Final[Mapping[str, Setting | None]] = {}


def contradictions(settings: Mapping[str, Setting], unknown: Mapping[str, Setting | None] = NOTHING) -> list[Problem]:
    """Say what is wrong with values together, each of which is right on its own.

    `unknown` are keys whose values are wrong: nothing is said about them, except about the valid addresses among them.
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
    for key in ("server.listen", "server.admin"):
        setting = settings.get(key) or unknown.get(key)
        addresses = [] if setting is None else _elements(setting)
        remote = [number for number, address in enumerate(addresses) if _is_remote(address)]
        if setting and remote and value("server.anonymous") is None and known("server.anonymous"):
            problems.append(too_open(key, [addresses[number] for number in remote], setting.place_of(remote[0])))
    return problems


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
    return Problem(
        f"{', '.join(addresses)} can be reached from other machines, and everybody is allowed; listen on {local} or a "
        "Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] "
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


def _check_anonymous(anonymous: bool | None) -> list[Mistake]:
    # With tokens this becomes a choice; until then it would be a broker that refuses every client.
    wrong = anonymous is False
    return [Mistake("false is not supported yet: nobody could connect, as there are no tokens")] if wrong else []


_CHECKS: Final[dict[str, Callable[[Any], list[Mistake]]]] = {
    "server.listen": _check_listen,
    "server.admin": _check_admin,
    "server.path": _check_path,
    "server.origins": _check_origins,
    "server.anonymous": _check_anonymous,
    "server.trusted_proxies": _check_networks,
    "server.proxy_protocol": _check_proxy_protocol,
    "server.unix_mode": _check_unix_mode,
    "server.unix_group": _check_unix_group,
}
