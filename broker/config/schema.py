"""The settings: what can be set, and the only defaults there are.

A setting is one field of one Struct below. Its type says what is allowed, its `_key` what it is for and what a reload
does to it; the file, the environment variable, the flag, the JSON Schema, the commented file and the words of an error
message follow from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from broker.overflow import Overflow

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
            "Addresses to listen on: host:port, [v6]:port, unix:/path, or systemd for the sockets that systemd "
            "passes. With port 0 the broker takes any free port. In the environment, put commas between them.",
            reload="restart",
        ),
    ] = msgspec.field(default_factory=lambda: ["127.0.0.1:8765"])
    path: Annotated[
        str,
        _key(
            "Path of the WebSocket. The broker ignores what follows a ? in a request, and a slash at the end of "
            "the path.",
            reload="restart",
        ),
    ] = "/"
    origins: Annotated[
        list[str],
        _key(
            "Origins whose pages may connect besides the broker's own host, written as browsers send them, like "
            '"https://example.org". "https://*.example.org" stands for any subdomain, "null" for pages without an '
            'origin, and "*" for every page.',
            reload="new_connections",
        ),
    ] = msgspec.field(default_factory=list)
    anonymous: Annotated[
        bool | None,
        _key(
            "Whether clients without an identity may connect. Left out: only where all addresses are on loopback "
            "or are Unix sockets.",
            example=True,
            reload="restart",
        ),
    ] = None
    block: Annotated[
        Literal["local", "all", "none"],
        _key(
            "Which clients may subscribe with the overflow policy block, which parks publishers. local: clients "
            "on loopback and Unix sockets, but not clients behind a trusted proxy. Behind a proxy on this machine "
            "that is not trusted, every client is local.",
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
            "Address of the admin listener, which serves health and metrics over HTTP. It is written like those "
            "of listen; systemd stands for the socket that systemd passes with the name admin. Empty: none.",
            reload="restart",
        ),
    ] = "127.0.0.1:8766"
    trusted_proxies: Annotated[
        list[str],
        _key(
            "Networks of trusted proxies, like 10.0.0.0/8. From them the broker takes the client's address in the "
            "header of forwarded_header. Unix sockets are always trusted.",
            reload="new_connections",
        ),
    ] = msgspec.field(default_factory=list)
    forwarded_header: Annotated[
        Literal["X-Forwarded-For", "Forwarded"],
        _key(
            "The header in which trusted proxies write the client's address. The broker does not read the other "
            "one, because a client could have sent it. Forwarded is that of RFC 7239.",
            reload="new_connections",
        ),
    ] = "X-Forwarded-For"
    proxy_protocol: Annotated[
        list[str],
        _key(
            "Networks of load balancers whose connections begin with the header of the PROXY protocol, version 1 "
            "or 2, like 10.0.0.0/8; unix stands for Unix sockets. A connection from there without the header is "
            "refused. It applies to the addresses of listen, not to the admin listener.",
            reload="new_connections",
        ),
    ] = msgspec.field(default_factory=list)
    unix_mode: Annotated[
        str,
        _key(
            "Mode of the Unix sockets that the broker makes: three octal digits, as for chmod. A program that may "
            "write to the socket may connect.",
            reload="restart",
        ),
    ] = "660"
    unix_group: Annotated[
        str | None,
        _key(
            "Group of the Unix sockets that the broker makes, by name or number. The broker's user must be in it. "
            "Left out: the broker's group.",
            example="www-data",
            reload="restart",
        ),
    ] = None
    certificate: Annotated[
        str | None,
        _key(
            "File with the certificate for TLS in PEM format, followed by the intermediate certificates. With it, "
            "clients on TCP addresses must use TLS; clients on Unix sockets do not.",
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
            "Whether clients may agree to compressed messages (permessage-deflate, RFC 7692). It saves traffic, "
            "and costs CPU time for each event and each command.",
            reload="new_connections",
        ),
    ] = False


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of what a client may use, and of the time that things may take."""

    max_size: Annotated[
        int,
        _key(
            "Largest message from a client, all its fragments together.", 64, 2**30, "bytes", reload="new_connections"
        ),
    ] = 2**20
    max_fragments: Annotated[
        Annotated[int, Meta(ge=1, le=10**6)] | None,
        _key(
            "Fragments in one message from a client, empty ones too. Left out: 4096, or max_size divided by 2048 "
            "if that is more.",
            example=4096,
            reload="new_connections",
        ),
    ] = None
    max_connections: Annotated[
        Annotated[int, Meta(ge=1, le=10**7)] | None,
        _key(
            "Connections at one time; beyond it the answer is 503. Left out: as many as the process may have file "
            "descriptors (RLIMIT_NOFILE), less a reserve.",
            example=10_000,
            reload="new_connections",
        ),
    ] = None
    max_connections_per_address: Annotated[
        Annotated[int, Meta(ge=1, le=10**7)] | None,
        _key(
            "Connections of one client address at one time; beyond it the answer is 429. All addresses of an IPv6 "
            "network of 64 bits count as one. Behind a trusted proxy the forwarded address counts. Clients of a "
            "Unix socket without a forwarded address, and connections that are being closed, do not count. Left "
            "out: any number.",
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
            "All events queued for one connection. Only the bytes of the events' frames count, not the memory of "
            "the queue itself.",
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
    max_head: Annotated[
        int,
        _key(
            "Longest head of a request: its request line and all header lines together. One line may be as long "
            "as the head; browsers send the cookies of all programs on localhost in one line.",
            1024,
            2**20,
            "bytes",
            reload="new_connections",
        ),
    ] = 16 * 1024
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
            "Events that one connection may publish at once after a pause.",
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
            "At a shutdown the broker tells each client to reconnect at a different time within this span.",
            0,
            3600,
            "seconds",
            reload="at_once",
        ),
    ] = 5.0
    max_memory: Annotated[
        Annotated[int, Meta(ge=2**24, le=2**50)] | None,
        _key(
            "Memory that the process may use. Above nine tenths of it new connections are refused, and above all "
            "of it publishers are slowed down. Left out: no bound.",
            unit="bytes",
            example=2**30,
            reload="at_once",
        ),
    ] = None
    notsent_lowat: Annotated[
        int,
        _key(
            "Unsent bytes that the kernel stores for one TCP connection before it accepts no more "
            "(TCP_NOTSENT_LOWAT). With a small value the broker notices a slow client early, while it can still "
            "drop events from the queue. 0: the value of the kernel, which is megabytes.",
            0,
            2**31 - 1,
            "bytes",
            reload="restart",
        ),
    ] = 16_384

    @property
    def fragments(self) -> int:
        """The bound of fragments in one message: `max_fragments`, or one that grows with `max_size`.

        Many clients send fragments of 4 kB, some of 2 kB; with a fixed number they could not reach a large `max_size`.
        """
        return max(4096, -(-self.max_size // 2048)) if self.max_fragments is None else self.max_fragments


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the broker writes to standard error."""

    format: Annotated[
        Literal["text", "json"], _key("text for people, or json: one JSON object on each line.", reload="restart")
    ] = "text"
    level: Annotated[
        Literal["debug", "info", "warning", "error"], _key("The lowest level that is logged.", reload="at_once")
    ] = "info"


class TopicRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings for some topics: one [[topics]] table. If several match a topic, only the most specific one applies."""

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
            "Age above which a queued event is dropped.",
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
