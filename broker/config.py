"""The configuration: what can be set, what each key allows, and the only defaults there are.

A key is one field of one Struct below. Its type says what is allowed; the file, the environment variable, the flag, the
JSON Schema, the commented file and the words of an error message follow from it.

Flags go before the environment, the environment before the file, the file before the defaults. Whatever is wrong is
reported, not only the first mistake, also where a later layer would have put another value in its place.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta, inspect

from broker.errors import ConfigError
from broker.overflow import OVERFLOWS, Overflow

DEFAULT_FILE: Final = Path("/etc/wsbroker/wsbroker.toml")
"""Read where it exists and no other file is named."""

PREFIX: Final = "WSBROKER_"
"""What the environment variables begin with: WSBROKER_LIMITS__MAX_SIZE is limits.max_size."""


Reload = Literal["at_once", "new_connections", "new_subscriptions", "restart"]
"""From when on a changed key holds after a reload. `new_subscriptions`: and for changes to subscriptions."""

RELOADS: Final[dict[Reload, str]] = {
    "at_once": "A reload changes it at once.",
    "new_connections": "A reload changes it for new connections.",
    "new_subscriptions": "A reload changes it for new subscriptions.",
    "restart": "It changes with a restart only.",
}


def _key(
    about: str,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    example: Any = None,
    *,
    reload: Reload,
) -> Meta:
    """Describe a key: what it is for, the range that it allows, its unit, an example where it has no default, and what
    a reload does to it.

    Ranges are wide. They are there to catch a slip of the unit, like milliseconds for seconds.
    """
    examples = None if example is None else [example]
    about += f" In {unit}." if unit else ""
    extra = {"unit": unit, "reload": reload}
    return Meta(
        ge=low, le=high, description=about, examples=examples, extra=extra, extra_json_schema={"x-reload": reload}
    )


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the broker listens, and to whom."""

    listen: Annotated[
        Annotated[list[str], Meta(min_length=1)],
        _key(
            "Addresses to listen on, each host:port, [v6]:port, unix:/path (a socket with mode 0660), or systemd for "
            "the sockets that it passes. "
            "In the environment they are separated by commas.",
            reload="restart",
        ),
    ] = msgspec.field(default_factory=lambda: ["127.0.0.1:8765"])
    path: Annotated[str, _key("Path of the WebSocket. Whatever follows a ? is not looked at.", reload="restart")] = "/"
    origins: Annotated[
        list[str],
        _key(
            "Origins whose pages may connect besides the broker's own host, written as browsers send them, like "
            '"https://example.org". "null" and "*" (every origin) must be listed in so many words.',
            reload="new_connections",
        ),
    ] = msgspec.field(default_factory=list)
    anonymous: Annotated[
        bool | None,
        _key(
            "Whether clients without an identity may connect. Left out: only where all addresses of listen are on "
            "loopback or are Unix sockets.",
            example=True,
            reload="restart",
        ),
    ] = None
    block: Annotated[
        Literal["local", "all", "none"],
        _key(
            "Which clients may subscribe with the overflow policy block, which parks publishers. local: "
            "clients on loopback and Unix sockets, but nobody for whom a proxy says in X-Forwarded-For who it is and "
            "is believed. Behind a proxy on this machine that is not believed it is everybody.",
            reload="new_subscriptions",
        ),
    ] = "local"
    engine: Annotated[
        Literal["memory"],
        _key(
            "What happens to an event between publish and delivery. memory: nothing outlives the process.",
            reload="restart",
        ),
    ] = "memory"
    admin: Annotated[
        str,
        _key(
            "Address of the admin listener, written as those of listen; systemd stands for the socket that is named "
            "admin there. Empty: none. It has health and metrics, in HTTP.",
            reload="restart",
        ),
    ] = "127.0.0.1:8766"
    trusted_proxies: Annotated[
        list[str],
        _key(
            "Networks whose proxies are believed when they say in X-Forwarded-For from where a client comes, like "
            "10.0.0.0/8. Unix sockets are always trusted.",
            reload="new_connections",
        ),
    ] = msgspec.field(default_factory=list)
    certificate: Annotated[
        str | None,
        _key(
            "File with the certificate for TLS, in PEM format, those that lead from it to its root behind it. With it, "
            "clients on TCP addresses have to speak TLS; those on Unix sockets do not.",
            example="/etc/wsbroker/certificate.pem",
            reload="new_connections",
        ),
    ] = None
    key: Annotated[
        str | None,
        _key(
            "File with the private key of the certificate, in PEM format, not encrypted.",
            example="/etc/wsbroker/key.pem",
            reload="new_connections",
        ),
    ] = None
    compression: Annotated[
        bool,
        _key(
            "Whether clients may agree to compressed messages (permessage-deflate, RFC 7692). It saves traffic, and "
            "costs the broker time for each event and each command.",
            reload="new_connections",
        ),
    ] = False


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds on what a client may ask for, and on the time that things may take."""

    max_size: Annotated[
        int,
        _key(
            "Largest message from a client, all its fragments together.", 64, 2**30, "bytes", reload="new_connections"
        ),
    ] = 2**20
    max_fragments: Annotated[
        int, _key("Fragments in one message from a client, empty ones counted.", 1, 10**6, reload="new_connections")
    ] = 4096
    max_connections: Annotated[
        Annotated[int, Meta(ge=1, le=10**7)] | None,
        _key(
            "Connections at one time; beyond it the answer is 503. Left out: as many as there are file descriptors "
            "(RLIMIT_NOFILE), less a reserve.",
            example=10_000,
            reload="new_connections",
        ),
    ] = None
    max_connections_per_address: Annotated[
        Annotated[int, Meta(ge=1, le=10**7)] | None,
        _key(
            "Connections of one client address at one time, or of one IPv6 network of 64 bits; beyond it the answer is "
            "429. The address is the forwarded one where a proxy is believed; who comes by a Unix socket without one "
            "is not counted, nor who is being closed. Left out: any number.",
            example=100,
            reload="new_connections",
        ),
    ] = None
    max_subscriptions: Annotated[
        int, _key("Subscriptions of one connection.", 1, 10**6, reload="new_subscriptions")
    ] = 1000
    max_queue: Annotated[
        int,
        _key(
            "Events queued for one subscription that does not set max_queue.",
            1,
            2**24,
            reload="new_subscriptions",
        ),
    ] = 256
    max_queue_limit: Annotated[
        int, _key("Upper bound of the max_queue of a subscription.", 1, 2**24, reload="new_subscriptions")
    ] = 65_536
    max_outbox: Annotated[
        int,
        _key(
            "All events queued for one connection, whatever its subscriptions allow. Counted are the events' "
            "frames, not what a place in a queue costs beside.",
            1024,
            2**34,
            "bytes",
            reload="at_once",
        ),
    ] = 4 * 2**20
    max_answers: Annotated[
        int,
        _key(
            "All answers queued for one connection; beyond it the connection is closed with 4003.",
            1024,
            2**30,
            "bytes",
            reload="at_once",
        ),
    ] = 2**20
    max_inflight: Annotated[
        int,
        _key(
            "Commands of one connection in flight; at this number the broker stops reading from it.",
            1,
            65_536,
            reload="at_once",
        ),
    ] = 64
    # The upper bound stays clear of the recursion limit of Python (1000), which the JSON decoder counts against.
    max_depth: Annotated[
        int, _key("Levels that the JSON of a command may be nested, its own object included.", 2, 512, reload="at_once")
    ] = 64
    open_timeout: Annotated[
        float,
        _key(
            "Time from connecting to the end of the opening handshake.", 0.1, 3600, "seconds", reload="new_connections"
        ),
    ] = 10.0
    ping_interval: Annotated[
        float,
        _key(
            "Time between two pings to a client, whatever it sends. 0: no pings.",
            0,
            86_400,
            "seconds",
            reload="restart",
        ),
    ] = 25.0
    ping_timeout: Annotated[
        float,
        _key(
            "Time from a ping to its answer; beyond it the connection is closed with 4001.",
            0.1,
            3600,
            "seconds",
            reload="restart",
        ),
    ] = 10.0
    close_timeout: Annotated[
        float,
        _key(
            "Time from a close to its answer; beyond it the connection is aborted.",
            0.1,
            3600,
            "seconds",
            reload="restart",
        ),
    ] = 5.0
    block_timeout: Annotated[
        float,
        _key(
            "Time for which a subscriber with the overflow policy block may park a publisher; beyond it the subscriber "
            "is closed with 4000.",
            0.1,
            3600,
            "seconds",
            reload="restart",
        ),
    ] = 5.0
    publish_rate: Annotated[
        float,
        _key(
            "Events a second that one connection may publish, on the average; beyond it the answer is rate_limited. "
            "0: any number.",
            0,
            10**7,
            reload="at_once",
        ),
    ] = 0.0
    publish_burst: Annotated[
        int,
        _key(
            "Events that one connection may publish at once, after it was silent for long enough.",
            1,
            10**7,
            reload="at_once",
        ),
    ] = 100
    drain_timeout: Annotated[
        float,
        _key(
            "Time for a shutdown: queued events and answers are sent until then.",
            0,
            86_400,
            "seconds",
            reload="at_once",
        ),
    ] = 10.0
    reconnect_spread: Annotated[
        float,
        _key(
            "Span over which clients are told to come back after a shutdown, so that they do not all come at once.",
            0,
            3600,
            "seconds",
            reload="at_once",
        ),
    ] = 5.0
    max_memory: Annotated[
        Annotated[int, Meta(ge=2**24, le=2**50)] | None,
        _key(
            "Memory that the process may take up. From nine tenths of it on new connections are refused, and beyond it "
            "publishers are slowed down. Left out: no bound.",
            unit="bytes",
            example=2**30,
            reload="at_once",
        ),
    ] = None
    notsent_lowat: Annotated[
        int,
        _key(
            "What the kernel holds unsent for one TCP connection before it takes no more (TCP_NOTSENT_LOWAT). Small: a "
            "slow client is noticed early, while its queue can still be thinned out. 0: the kernel's own, megabytes.",
            0,
            2**31 - 1,
            "bytes",
            reload="restart",
        ),
    ] = 16_384


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the broker writes to standard error."""

    format: Annotated[Literal["text", "json"], _key("Lines for people, or a JSON object a line.", reload="restart")] = (
        "text"
    )
    level: Annotated[
        Literal["debug", "info", "warning", "error"], _key("The least important that is written.", reload="at_once")
    ] = "info"


class TopicRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for some topics: one [[topics]] table. Of those that match, the most specific one applies, alone."""

    match: Annotated[
        str, _key("The topic or pattern that the rule is for. `*` and `>` are as in subscriptions.", reload="at_once")
    ]
    max_queue: Annotated[
        Annotated[int, Meta(ge=1, le=2**24)] | None,
        _key(
            "Events queued for a subscription that does not set max_queue.",
            example=64,
            reload="new_subscriptions",
        ),
    ] = None
    max_queue_limit: Annotated[
        Annotated[int, Meta(ge=1, le=2**24)] | None,
        _key("Upper bound of the max_queue of a subscription.", example=1024, reload="new_subscriptions"),
    ] = None
    overflow: Annotated[
        Overflow | None,
        _key("Policy of a subscription which does not name one.", example="latest", reload="new_subscriptions"),
    ] = None
    overflows: Annotated[
        Annotated[list[Overflow], Meta(min_length=1)] | None,
        _key(
            "Policies that a subscription may name; the first is the default.",
            example=["latest", "drop_oldest"],
            reload="new_subscriptions",
        ),
    ] = None
    max_age: Annotated[
        Annotated[float, Meta(ge=0.01, le=31_536_000)] | None,
        _key(
            "Age beyond which a queued event is dropped.",
            unit="seconds",
            example=30.0,
            reload="at_once",
        ),
    ] = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration of one broker."""

    server: Server = msgspec.field(default_factory=Server)
    limits: Limits = msgspec.field(default_factory=Limits)
    log: Log = msgspec.field(default_factory=Log)
    topics: list[TopicRule] = msgspec.field(default_factory=list)


class Address(msgspec.Struct, frozen=True):
    """What to listen on: a TCP address (`host` without brackets, `port` 0 for any free), a Unix socket's path, or the
    sockets that systemd passes."""

    host: str = ""
    port: int = 0
    path: str = ""
    systemd: bool = False

    @property
    def local(self) -> bool:
        """Whether only this machine can connect: a Unix socket, or a host that stands for loopback (RFC 6761, 6.3).

        Of `systemd` nobody knows before its sockets are there; it is looked at then.
        """
        if self.systemd or self.path or self.host.lower() == "localhost" or self.host.lower().endswith(".localhost"):
            return True
        try:
            ip = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return (mapped or ip).is_loopback

    def __str__(self) -> str:
        if self.systemd:
            return "systemd"
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """Build the configuration from all layers.

    `file` is the one that was asked for; with None it is `DEFAULT_FILE`, if that exists. `flags` maps dotted keys to
    values; None and the empty tuple (an option of click that may be repeated, and was not given) say nothing.
    Raises ConfigError with every mistake.
    """
    problems: list[str] = []
    settings: dict[str, _Setting] = {}
    rules: list[dict[str, object]] = []
    for layer in (_of_file(file, problems, rules), _of_environment(environ, problems), _of_flags(flags)):
        try:
            for setting in layer:
                if mistakes := _mistakes(setting):
                    problems += [f"{setting.key} ({setting.origin}): {mistake}" for mistake in mistakes]
                else:
                    settings[setting.key] = setting
        except RecursionError:  # only a file may hold values within values
            problems.append(f"{file or DEFAULT_FILE}: is nested too deeply")
    if not problems:
        problems = _contradictions(settings)
    if problems:
        raise ConfigError(problems)
    sections: dict[str, Any] = {"topics": rules}
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = _converted(setting)
    return msgspec.convert(sections, Config)


def log_of(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Log:
    """Give what there is to be known of the log in a configuration that has mistakes: they are to be said in it."""
    found: dict[str, Any] = {}
    for layer in (_of_file(file, [], []), _of_environment(environ, []), _of_flags(flags)):
        try:
            for setting in layer:
                section, _, name = setting.key.partition(".")
                if section == "log" and not _mistakes(setting):
                    found[name] = _converted(setting)
        except RecursionError:
            continue
    return Log(**found)


def default_toml() -> str:
    """Give a file with every key, its default and what it is for. Read back, it is the default configuration."""
    lines = ["# Configuration of wsbroker. Every value here is the default.", ""]
    for section, struct in _SECTIONS.items():
        lines += [f"# {struct.__doc__}", f"[{section}]", ""]
        for key in _KEYS.values():
            if key.section != section:
                continue
            lines += _comment(key)
            example = f"# {key.name} = {_toml(key.example)}"
            lines += [example if key.default is None else f"{key.name} = {_toml(key.default)}", ""]
    # Two marks, because a rule is no default to be switched on by taking away one.
    lines += [f"# {TopicRule.__doc__}", "# # [[topics]]", ""]
    for key in _RULE_KEYS.values():
        lines += [*_comment(key), f"# # {key.name} = {_toml('prices.>' if key.name == 'match' else key.example)}", ""]
    return "\n".join(lines)


def _comment(key: _Key) -> list[str]:
    about = f"{key.description} Allowed: {key.allowed}. {RELOADS[key.reload]}"
    return textwrap.wrap(about, 100, initial_indent="# ", subsequent_indent="# ")


def schema() -> dict[str, Any]:
    """Give the JSON Schema (2020-12) of the file, for editors and tests."""
    result = msgspec.json.schema(Config)
    for key in _KEYS.values():
        if key.default is not None:  # msgspec leaves out defaults that are lists
            result["$defs"][_SECTIONS[key.section].__name__]["properties"][key.name]["default"] = key.default
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def parse_address(text: str) -> Address:
    """Read `host:port`, `[v6]:port`, `unix:/path` or `systemd`.

    Raises ConfigError, with `text` and what is allowed.
    """
    shown = _printable(text)
    if text == "systemd":
        return Address(systemd=True)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > _MAX_UNIX_PATH:
            raise ConfigError([f"`{shown}`: a Unix socket has an absolute path of at most {_MAX_UNIX_PATH} bytes"])
        return Address(path=path)
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
        raise ConfigError(
            [f"`{shown}` is no address: it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535"]
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError([f"`{shown}`: between the brackets must be an IPv6 address"]) from None
    elif ":" in host:
        raise ConfigError([f"`{shown}`: an IPv6 address is put in brackets, [{host}]:{port}"])
    elif not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host):
        hint = "; for every interface say 0.0.0.0 or [::]" if host in ("", "*") else ""
        raise ConfigError([f"`{shown}`: the host must be a name or an IP address{hint}"])
    return Address(host=host, port=int(port))


# From where values come


class _Setting(NamedTuple):
    key: str
    value: object
    origin: str
    """For people: the file, the variable, or the command line."""
    is_text: bool = False
    """Whether the value is text which stands for a number, a list and so on, as in the environment."""


def _of_file(file: Path | None, problems: list[str], rules: list[dict[str, object]]) -> Iterator[_Setting]:
    asked, file = file, file or DEFAULT_FILE
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        if asked is None and isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        problems.append(f"{file}: cannot be read: {error.strerror}")
        return
    except ValueError as error:  # tomllib.TOMLDecodeError, or UnicodeDecodeError
        problems.append(f"{file}: is not TOML: {error}")
        return
    for section, table in document.items():
        if section == "topics":
            _read_rules(table, str(file), problems, rules)
        elif section not in _SECTIONS:
            what = "section" if isinstance(table, dict) else "key"
            problems.append(f"{section} ({file}): there is no such {what}{_suggest(section, [*_SECTIONS, *_KEYS])}")
        elif not isinstance(table, dict):
            problems.append(f"{section} ({file}): must be a table, [{section}]")
        else:
            for name, value in table.items():
                key = f"{section}.{name}"
                if key in _KEYS:
                    yield _Setting(key, value, str(file))
                else:
                    problems.append(f"{key} ({file}): there is no such key{_suggest(key, _KEYS)}")


def _read_rules(tables: object, origin: str, problems: list[str], rules: list[dict[str, object]]) -> None:
    """Read the [[topics]] tables."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        problems.append(f"topics ({origin}): must be tables, each [[topics]]")
        return
    for number, table in enumerate(tables, 1):
        where = f"topics[{number}]"
        if "match" not in table:
            problems.append(f"{where}.match ({origin}): is missing: the topic or pattern that the rule is for")
        for name, value in table.items():
            key = _RULE_KEYS.get(name)
            if key is None:
                wrong = f"{where}.{name} ({origin}): there is no such key"
                problems.append(wrong + _suggest(name, _RULE_KEYS))
            else:
                problems += [f"{where}.{name} ({origin}): {mistake}" for mistake in _mistakes_of(key, value)]
        rules.append(table)


def _of_environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[_Setting]:
    for name, value in sorted(environ.items()):
        if not name.startswith(PREFIX):
            continue
        if name in _VARIABLES:
            yield _Setting(_VARIABLES[name], value, name, is_text=True)
        elif name.removesuffix("_FILE") in _VARIABLES:
            variable = name.removesuffix("_FILE")
            if variable in environ:
                problems.append(f"{_VARIABLES[variable]} ({name}): {variable} is set too, only one of the two may be")
                continue
            try:
                content = Path(value).read_text(encoding="utf-8").removesuffix("\n")
            except (OSError, ValueError) as error:
                problems.append(f"{_VARIABLES[variable]} ({name}): {value} cannot be read: {error}")
                continue
            yield _Setting(_VARIABLES[variable], content, name, is_text=True)
        elif "__" in name.removeprefix(PREFIX) or name in _LIKELY_TYPOS:
            # A variable with no key in it, like WSBROKER_URL, is none of the broker's.
            key = name.removeprefix(PREFIX).lower().replace("__", ".")
            problems.append(f"{name} (environment): there is no such key{_suggest(key, _KEYS, _variable)}")


def _of_flags(flags: Mapping[str, object]) -> Iterator[_Setting]:
    for key, value in flags.items():
        if value is not None and value != ():
            yield _Setting(key, value, "command line")


# What is wrong with them


def _mistakes(setting: _Setting) -> list[str]:
    """Say what is wrong with one value on its own."""
    mistakes = _mistakes_of(_KEYS[setting.key], setting.value, setting.is_text)
    return mistakes or (_CHECKS[setting.key](_converted(setting)) if setting.key in _CHECKS else [])


def _mistakes_of(key: _Key, value: object, is_text: bool = False) -> list[str]:
    try:
        _convert(key, value, is_text)
    except ValueError:
        shown = json.dumps(value, default=str, ensure_ascii=False)
        return [f"must be {key.allowed}{key.unit}, not {shown if len(shown) <= 60 else shown[:60] + '…'}"]
    return []


def _converted(setting: _Setting) -> Any:
    """Give the value in the type of its key. Raises ValueError where it is not of that type."""
    return _convert(_KEYS[setting.key], setting.value, setting.is_text)


def _convert(key: _Key, value: object, is_text: bool) -> Any:
    if is_text and isinstance(value, str) and key.is_list:
        value = [part.strip() for part in value.split(",")] if value.strip() else []
    # Of what is not a value of the type msgspec says ValidationError, and of a variable that is not UTF-8
    # UnicodeEncodeError; both are ValueErrors.
    return msgspec.convert(value, key.type, strict=not is_text)


def _contradictions(settings: Mapping[str, _Setting]) -> list[str]:
    """Say what is wrong with values together, each of which is right on its own."""

    def value(key: str) -> Any:
        return _converted(settings[key]) if key in settings else _KEYS[key].default

    def origin(key: str) -> str:
        return f"{key} ({settings[key].origin if key in settings else 'default'})"

    problems = []
    queue, ceiling = value("limits.max_queue"), value("limits.max_queue_limit")
    if queue > ceiling:
        problems.append(
            f"{origin('limits.max_queue')}: {queue} must not be more than "
            f"{origin('limits.max_queue_limit')}, which is {ceiling}"
        )
    for name, other in (("server.certificate", "server.key"), ("server.key", "server.certificate")):
        if value(name) is not None and value(other) is None:
            problems.append(f"{origin(name)}: needs {other} beside it")
    remote = [address for address in value("server.listen") if not parse_address(address).local]
    if remote and value("server.anonymous") is None:
        problems.append(too_open(origin("server.listen"), remote))
    return problems


def too_open(where: str, addresses: Iterable[str]) -> str:
    """Say that the broker does not listen on these for everybody."""
    return (
        f"{where}: refuses to listen beyond loopback or a Unix socket ({', '.join(addresses)}) while everybody is "
        "allowed, unless server.anonymous = true"
    )


def _printable(text: str) -> str:
    """Give a text for a message, which is one line."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _check_listen(addresses: list[str]) -> list[str]:
    problems = [f"{_printable(text)} is listed twice" for text in dict.fromkeys(addresses) if addresses.count(text) > 1]
    for address in addresses:
        try:
            parse_address(address)
        except ConfigError as error:
            problems += error.problems
    return problems


def _check_admin(address: str) -> list[str]:
    return _check_listen([address]) if address else []


def _check_path(path: str) -> list[str]:
    if not re.fullmatch(r"/[!-~]*", path) or "?" in path or "#" in path:
        return ["must begin with / and hold only visible ASCII characters (others as %XX), no ? and no #"]
    if path == "/healthz":
        return ["must not be /healthz, which answers load balancers"]
    return []


def _check_origins(origins: list[str]) -> list[str]:
    return [
        f"`{_printable(origin)}` is no origin: it must be scheme://host or scheme://host:port, without a path"
        for origin in origins
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin)
    ]


def _check_networks(networks: list[str]) -> list[str]:
    problems = []
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            problems.append(f"`{_printable(network)}` is no network, as 10.0.0.0/8: {_printable(str(error))}")
    return problems


def _check_anonymous(anonymous: bool | None) -> list[str]:
    # With tokens this becomes a choice; until then it would be a broker that refuses every client.
    return ["false is not supported yet: nobody could connect, as there are no tokens"] if anonymous is False else []


_CHECKS: Final[dict[str, Callable[[Any], list[str]]]] = {
    "server.listen": _check_listen,
    "server.admin": _check_admin,
    "server.path": _check_path,
    "server.origins": _check_origins,
    "server.anonymous": _check_anonymous,
    "server.trusted_proxies": _check_networks,
}

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:*\[\]]+)(:[1-9][0-9]{0,4})?", re.IGNORECASE)

_MAX_UNIX_PATH: Final = 107
"""Bytes: sun_path in unix(7) has 108, of which the last is NUL."""


# The keys, from the Structs


class _Key(NamedTuple):
    section: str
    name: str
    type: Any
    default: Any
    description: str
    allowed: str
    unit: str
    example: Any
    """For a key that has no default of its own."""
    reload: Reload

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)


def _read_keys() -> dict[str, _Key]:
    keys: dict[str, _Key] = {}
    for section, struct in _SECTIONS.items():
        keys |= {f"{section}.{key.name}": key for key in _keys_of(section, struct, struct())}
    return keys


def _keys_of(section: str, struct: type[msgspec.Struct], defaults: msgspec.Struct) -> Iterator[_Key]:
    types = get_type_hints(struct, include_extras=True)
    for name in struct.__struct_fields__:
        kind = inspect.type_info(types[name])
        assert isinstance(kind, inspect.Metadata)  # every field has a description
        # msgspec sorts the choices of a Literal; people expect them in the order that they were written in.
        choices = get_args(get_args(types[name])[0]) if isinstance(kind.type, inspect.LiteralType) else ()
        about, extra = kind.extra_json_schema or {}, kind.extra or {}
        unit = extra["unit"]
        yield _Key(
            section=section,
            name=name,
            type=types[name],
            default=getattr(defaults, name),
            description=about["description"],
            allowed=_allowed(kind.type, choices or OVERFLOWS),
            unit=f" ({unit})" if unit else "",
            example=about.get("examples", [None])[0],
            reload=extra["reload"],
        )


def _allowed(kind: inspect.Type, choices: tuple[str, ...] = ()) -> str:
    """Say in words what a type allows."""
    match kind:
        case inspect.UnionType(types=types):
            (kind,) = (one for one in types if not isinstance(one, inspect.NoneType))
            return _allowed(kind, choices)
        case inspect.Metadata(type=kind):
            return _allowed(kind, choices)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=low, le=high):
            return f"an integer from {low} to {high}"
        case inspect.FloatType(ge=low, le=high):
            return f"a number from {low} to {high}"
        case inspect.LiteralType():
            return ("one of " if len(choices) > 1 else "") + ", ".join(f'"{choice}"' for choice in choices)
        case inspect.ListType(item_type=inspect.LiteralType()):
            return "a list, not empty, of " + ", ".join(f'"{choice}"' for choice in choices)
        case inspect.ListType(min_length=low):
            return "a list of strings" + (", not empty" if low else "")
        case _:
            return "a string"


def _suggest(wrong: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """Name the nearest of the known words, to be put behind a message: the same key elsewhere, or one spelt like it."""
    known = list(known)
    name = wrong.rpartition(".")[2]
    nearest = [word for word in known if word.endswith(f".{name}")] or difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {written(nearest[0])}?" if nearest else ""


def _variable(key: str) -> str:
    """Give the environment variable of a key."""
    return PREFIX + key.upper().replace(".", "__")


def _toml(value: object) -> str:
    """Write a default in TOML; JSON is TOML for numbers, booleans, and the strings and lists that occur."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


_SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {"server": Server, "limits": Limits, "log": Log}
_KEYS: Final = _read_keys()
_RULE_KEYS: Final = {key.name: key for key in _keys_of("topics", TopicRule, TopicRule(match=""))}
RESTART_KEYS: Final = tuple(name for name, key in _KEYS.items() if key.reload == "restart")
"""The settings that a reload does not change."""
_VARIABLES: Final = {_variable(key): key for key in _KEYS}
_LIKELY_TYPOS: Final = {PREFIX + key.upper().replace(".", "_") for key in _KEYS} | {
    PREFIX + key.rpartition(".")[2].upper() for key in _KEYS
}
"""One underscore, or no section. Anything looser would meet what Kubernetes sets for a service of this name."""
