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
        str,
        _key(
            "Where the history of topics is kept. memory: in this process, and lost with it. sqlite:///PATH: in the "
            "SQLite file at this absolute path, which outlives it; each broker needs a file of its own.",
            reload="restart",
        ),
    ] = "memory"
    durability: Annotated[
        Literal["full", "normal"],
        _key(
            "With sqlite: when a publish is answered. full: once it is on the disk, so that it outlives a power cut. "
            "normal: once it is in the file, so that it outlives the broker; the last seconds may be lost with the "
            "machine, and then every numbering begins anew.",
            reload="restart",
        ),
    ] = "full"
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
        Annotated[int, Meta(ge=1, le=10**6)] | None,
        _key(
            "Fragments in one message from a client, empty ones counted. Left out: 4096, or one for each 2048 bytes of "
            "max_size if that is more.",
            example=4096,
            reload="new_connections",
        ),
    ] = None
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
    history_bytes: Annotated[
        int,
        _key(
            "Memory for the history of all topics together, with what each event and each topic costs beside its "
            "data. Beyond it the topic that was published to least recently loses its kept events.",
            2**16,
            2**44,
            "bytes",
            reload="at_once",
        ),
    ] = 256 * 2**20
    history_topics: Annotated[
        int,
        _key(
            "Topics with history. Beyond it the topic that was published to least recently is forgotten; its numbering "
            "begins anew, in another epoch.",
            1,
            10**8,
            reload="at_once",
        ),
    ] = 100_000
    dedup_entries: Annotated[
        int,
        _key(
            "Values of dedup that are remembered, of all topics together; beyond it the oldest is forgotten before its "
            "time.",
            1,
            10**8,
            reload="at_once",
        ),
    ] = 100_000
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

    @property
    def fragments(self) -> int:
        """The bound of fragments in one message: `max_fragments`, or one that grows with `max_size`.

        Many clients send fragments of 4 kB, some of 2 kB; with a fixed number they could not reach a large `max_size`.
        """
        return max(4096, -(-self.max_size // 2048)) if self.max_fragments is None else self.max_fragments


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the broker writes to standard error."""

    format: Annotated[Literal["text", "json"], _key("Lines for people, or a JSON object a line.", reload="restart")] = (
        "text"
    )
    level: Annotated[
        Literal["debug", "info", "warning", "error"], _key("The least important that is written.", reload="at_once")
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
            "Age beyond which a queued event is dropped.",
            unit="seconds",
            example=30.0,
            reload="at_once",
        ),
    ] = None
    history: Annotated[
        Annotated[int, Meta(ge=0, le=2**24)] | None,
        _key(
            "Newest events of each topic that are kept, for subscribers that come later or were away. Left out or 0: "
            "none.",
            example=1000,
            reload="at_once",
        ),
    ] = None
    history_age: Annotated[
        Annotated[float, Meta(ge=1, le=31_536_000)] | None,
        _key(
            "Age beyond which a kept event is dropped from history.", unit="seconds", example=3600.0, reload="at_once"
        ),
    ] = None
    history_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**40)] | None,
        _key(
            "Bytes of data and keys that the kept events of one topic may have together; the newest one is kept in any "
            "case.",
            unit="bytes",
            example=2**20,
            reload="at_once",
        ),
    ] = None
    compact: Annotated[
        bool | None,
        _key(
            "Whether of each key only the newest event is kept, and none of a key whose newest event has null as data.",
            example=True,
            reload="at_once",
        ),
    ] = None
    tombstone_age: Annotated[
        Annotated[float, Meta(ge=1, le=31_536_000)] | None,
        _key(
            "Time for which the event that removes a key is kept on a compacted topic, for those who were away. Left "
            "out: a day.",
            unit="seconds",
            example=3600.0,
            reload="at_once",
        ),
    ] = None
    dedup_age: Annotated[
        Annotated[float, Meta(ge=1, le=86_400)] | None,
        _key(
            "Time for which the dedup of a publish is remembered: the same one within it is not published again. Left "
            "out: two minutes.",
            unit="seconds",
            example=120.0,
            reload="at_once",
        ),
    ] = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration of one broker."""

    server: Server = msgspec.field(default_factory=Server)
    limits: Limits = msgspec.field(default_factory=Limits)
    log: Log = msgspec.field(default_factory=Log)
    topics: list[TopicRule] = msgspec.field(default_factory=list)
