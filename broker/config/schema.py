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
    secret: bool = False,
) -> Meta:
    """Describe a key: what it is for, the range that it allows, its unit, an example where it has no default, and what
    a reload does to it. The value of a `secret` is shown in no message.

    Ranges are wide. They are there to catch a slip of the unit, like milliseconds for seconds.
    """
    examples = None if example is None else [example]
    about += f" In {unit}." if unit else ""
    extra = {"unit": unit, "reload": reload, "secret": secret}
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
            "Whether clients without an identity may connect. Left out: only where all addresses are on loopback or "
            "are Unix sockets, and auth.required does not say otherwise.",
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
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        _key(
            "Threads that send events to many subscribers at the same time, the one of the event loop included. Left "
            "out: as many as the process has cores, at most 8. 1: no other threads.",
            example=4,
            reload="restart",
        ),
    ] = None
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
    client_ca: Annotated[
        str | None,
        _key(
            "File with the certificates of the authorities that sign client certificates, in PEM format. With it, "
            "clients on TCP addresses are asked for a certificate, and one that they show identifies them.",
            example="/etc/wsbroker/clients.pem",
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
    auth_timeout: Annotated[
        float,
        _key(
            "Time for a client to show a token, where one is required; beyond it the connection is closed with 4500.",
            0.1,
            3600,
            "seconds",
            reload="new_connections",
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
    command_rate: Annotated[
        float,
        _key(
            "Commands a second that one connection may send, on the average; beyond it the answer is rate_limited, and "
            "who goes on is closed with 4002. 0: any number.",
            0,
            10**7,
            reload="at_once",
        ),
    ] = 0.0
    command_burst: Annotated[
        int, _key("Commands that one connection may send at once.", 1, 10**7, reload="at_once")
    ] = 200
    byte_rate: Annotated[
        float,
        _key(
            "Bytes of commands a second that one connection may send, on the average; beyond it as with command_rate. "
            "0: any number.",
            0,
            2**40,
            reload="at_once",
        ),
    ] = 0.0
    byte_burst: Annotated[
        int, _key("Bytes of commands that one connection may send at once.", 64, 2**40, "bytes", reload="at_once")
    ] = 4 * 2**20
    handshake_rate: Annotated[
        float,
        _key(
            "Connections a second that one client address may begin, or one IPv6 network of 64 bits, on the average; "
            "beyond it the answer is 429. Who comes by a Unix socket without an address is not counted. 0: any number.",
            0,
            10**6,
            reload="new_connections",
        ),
    ] = 0.0
    handshake_burst: Annotated[
        int, _key("Connections that one client address may begin at once.", 1, 10**6, reload="new_connections")
    ] = 50
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


Algorithm = Literal[
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
"""The algorithms of JSON Web Signatures that the broker verifies (RFC 7518, section 3.1; RFC 8037)."""


class Auth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who clients are: the tokens that identify them, JSON Web Tokens (RFC 7519)."""

    required: Annotated[
        bool | None,
        _key(
            "Whether a client must show a valid token or API key. Left out: not on loopback and Unix sockets, and "
            "everywhere else.",
            example=True,
            reload="restart",
        ),
    ] = None
    algorithms: Annotated[
        Annotated[list[Algorithm], Meta(min_length=1)],
        _key(
            "Algorithms that a token may be signed with. What a token itself says never adds to them.",
            reload="at_once",
        ),
    ] = msgspec.field(default_factory=lambda: ["EdDSA"])
    key_file: Annotated[
        str | None,
        _key(
            "File with the public keys that tokens are verified with: PEM, one or several, or a JSON Web Key Set. "
            "credential:NAME stands for a credential that systemd passes.",
            example="/etc/wsbroker/jwt.pub",
            reload="at_once",
        ),
    ] = None
    key: Annotated[
        str | None,
        _key(
            "The same keys themselves, for the environment.",
            example="-----BEGIN PUBLIC KEY-----…",
            reload="at_once",
        ),
    ] = None
    jwks_url: Annotated[
        str | None,
        _key(
            "URL of the JSON Web Key Set of a login service, instead of a file: https, or http on loopback.",
            example="https://login.example/.well-known/jwks.json",
            reload="at_once",
        ),
    ] = None
    secret_file: Annotated[
        str | None,
        _key(
            "File with the secret for HS256, HS384 and HS512, which the broker shares with those who make tokens. A "
            "newline at its end does not belong to it. credential:NAME stands for a credential that systemd passes.",
            example="credential:jwt-secret",
            reload="at_once",
        ),
    ] = None
    secret: Annotated[
        str | None,
        _key(
            "The same secret itself, for the environment.",
            example="at least 32 bytes, at random, for HS256",
            reload="at_once",
            secret=True,
        ),
    ] = None
    url: Annotated[
        str | None,
        _key(
            "URL of a backend that says who a client without a token is, asked with headers of its request when it "
            "connects: https, or http on loopback.",
            example="http://127.0.0.1:8000/wsbroker",
            reload="at_once",
        ),
    ] = None
    url_headers: Annotated[
        Annotated[list[str], Meta(min_length=1)],
        _key(
            "Headers of the client's request that the backend gets. A client that sends none of them has no identity, "
            "and the backend is not asked.",
            reload="new_connections",
        ),
    ] = msgspec.field(default_factory=lambda: ["Cookie"])
    url_timeout: Annotated[float, _key("Time for an answer of the backend.", 0.1, 60, "seconds", reload="at_once")] = (
        3.0
    )
    url_concurrency: Annotated[
        int, _key("Requests to the backend that are under way at one time.", 1, 10_000, reload="at_once")
    ] = 64
    certificate_identity: Annotated[
        Literal["cn", "dns", "email", "uri"],
        _key(
            "The name in a client certificate that is the identity: the common name of the subject, or the DNS name, "
            "email address or URI in subjectAltName. A certificate must have exactly one of this kind.",
            reload="new_connections",
        ),
    ] = "cn"
    certificate_roles: Annotated[
        Annotated[list[str], Meta(min_length=1)],
        _key("The roles of clients that are identified by a certificate.", reload="at_once"),
    ] = msgspec.field(default_factory=lambda: ["default"])
    issuer: Annotated[
        str | None,
        _key("The `iss` that a token must have. Left out: any.", example="https://login.example", reload="at_once"),
    ] = None
    audience: Annotated[
        str | None,
        _key("The `aud` that a token must have. Left out: any.", example="wsbroker", reload="at_once"),
    ] = None
    identity_claim: Annotated[
        str, _key("The claim with the name of the identity. A dot leads into a claim.", reload="at_once")
    ] = "sub"
    roles_claim: Annotated[
        str,
        _key(
            "The claim with the roles, a list or a string with spaces in between, like realm_access.roles or scope. A "
            "token without it has the role default.",
            reload="at_once",
        ),
    ] = "roles"
    leeway: Annotated[
        float, _key("How far clocks may differ, for `exp` and `nbf`.", 0, 300, "seconds", reload="at_once")
    ] = 10.0
    expiry_required: Annotated[bool, _key("Whether a token must have `exp`.", reload="at_once")] = True


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
        str,
        _key(
            "The topic or pattern that the rule is for. `*` and `>` are as in subscriptions.",
            example="prices.>",
            reload="at_once",
        ),
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
    presence: Annotated[
        bool | None,
        _key(
            "Whether subscribers of the topic are its members: they can be listed, and others told when they come and "
            "go.",
            example=True,
            reload="new_subscriptions",
        ),
    ] = None


_Patterns = Annotated[tuple[str, ...], Meta(max_length=1000)]


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An API key of a backend: one [[keys]] table. `wsbroker key make` makes one."""

    name: Annotated[str, _key("The identity of those who show the key.", example="shop", reload="at_once")]
    hash: Annotated[
        str,
        _key(
            "The hash of the key; the key itself is written nowhere.",
            example=f"sha256:{64 * '0'}",
            reload="at_once",
            secret=True,
        ),
    ]
    roles: Annotated[
        Annotated[tuple[str, ...], Meta(min_length=1)],
        _key("What it may do. admin stands for the admin listener.", example=["publisher"], reload="at_once"),
    ]


class Role(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What those who have this role may do, and how much of it: one [[roles]] table. A list left out grants nothing."""

    name: Annotated[
        str,
        _key(
            "Name of the role, as tokens have it. anonymous is for those who show none, default for tokens that name "
            "no role.",
            example="user",
            reload="at_once",
        ),
    ]
    publish: Annotated[
        _Patterns,
        _key(
            "Topics and patterns that events may be published to. {identity} stands for the name of the identity.",
            example=["chat.*"],
            reload="at_once",
        ),
    ] = ()
    subscribe: Annotated[
        _Patterns,
        _key(
            "What may be subscribed to: a pattern, too, if each topic that it matches is allowed.",
            example=["prices.>", "user.{identity}.>"],
            reload="at_once",
        ),
    ] = ()
    presence: Annotated[
        _Patterns, _key("Where it may be asked who is subscribed.", example=["chat.*"], reload="at_once")
    ] = ()
    history: Annotated[_Patterns, _key("Whose kept events may be read.", example=["prices.>"], reload="at_once")] = ()
    block: Annotated[
        _Patterns,
        _key(
            "Where a subscription may have the overflow policy block, which parks publishers.",
            example=["orders.>"],
            reload="at_once",
        ),
    ] = ()
    max_connections: Annotated[
        Annotated[int, Meta(ge=1, le=10**7)] | None,
        _key(
            "Connections of one identity at one time. Left out: any number.",
            example=10,
            reload="new_connections",
        ),
    ] = None
    connect_rate: Annotated[
        Annotated[float, Meta(ge=0.001, le=10**6)] | None,
        _key(
            "Connections a second that one identity may begin, on the average, and ten times as many at once. Left "
            "out: any number.",
            example=1.0,
            reload="at_once",
        ),
    ] = None
    max_subscriptions: Annotated[
        Annotated[int, Meta(ge=1, le=10**6)] | None,
        _key(
            "Subscriptions of one connection. Left out: limits.max_subscriptions.",
            example=100,
            reload="new_subscriptions",
        ),
    ] = None
    publish_rate: Annotated[
        Annotated[float, Meta(ge=0, le=10**7)] | None,
        _key(
            "Events a second that one identity may publish, by all its connections together. 0: any number. Left out: "
            "limits.publish_rate, which is for each connection.",
            example=10.0,
            reload="at_once",
        ),
    ] = None
    publish_burst: Annotated[
        Annotated[int, Meta(ge=1, le=10**7)] | None,
        _key(
            "Events that it may publish at once. Left out: limits.publish_burst.",
            example=20,
            reload="at_once",
        ),
    ] = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration of one broker."""

    server: Server = msgspec.field(default_factory=Server)
    limits: Limits = msgspec.field(default_factory=Limits)
    auth: Auth = msgspec.field(default_factory=Auth)
    log: Log = msgspec.field(default_factory=Log)
    keys: list[ApiKey] = msgspec.field(default_factory=list)
    roles: list[Role] = msgspec.field(default_factory=list)
    topics: list[TopicRule] = msgspec.field(default_factory=list)
