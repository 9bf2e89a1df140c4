"""The settings and their defaults."""

from __future__ import annotations

import msgspec

from broker import messages
from broker.config import RESTART_KEYS, Config, Limits, Log, Server
from broker.overflow import OVERFLOWS
from tests.config.reading import KEYS, reload_of


def test_the_defaults_are_those_of_the_design() -> None:
    assert Config().server == Server(
        listen=["127.0.0.1:8765"],
        path="/",
        origins=[],
        anonymous=None,
        block="local",
        engine="memory",
        certificate=None,
        key=None,
        compression=False,
    )
    assert Config().limits == Limits(
        max_size=1024 * 1024,
        max_fragments=None,
        max_connections=None,
        max_subscriptions=1000,
        max_queue=256,
        max_queue_limit=65536,
        max_outbox=4 * 1024 * 1024,
        max_answers=1024 * 1024,
        max_inflight=64,
        max_depth=64,
        open_timeout=10,
        ping_interval=25,
        ping_timeout=10,
        close_timeout=5,
        block_timeout=5,
        publish_rate=0,
        publish_burst=100,
        drain_timeout=10,
        reconnect_spread=5,
        notsent_lowat=16384,
    )
    assert Config().log == Log("text", "info")


def test_restart_keys_follow_from_the_fields() -> None:
    assert set(RESTART_KEYS) == {key for key in KEYS if reload_of(*key.split(".")) == "restart"}
    # Listeners, handshake answers, the keep-alive sweep and sockets are set up once.
    assert {"server.listen", "limits.ping_interval", "limits.notsent_lowat"} <= {*RESTART_KEYS}


def test_the_policies_are_those_of_the_protocol() -> None:
    protocol = msgspec.json.schema(messages.Subscribe)["$defs"]["Subscribe"]["properties"]["overflow"]["enum"]
    assert sorted(protocol) == sorted(OVERFLOWS)


def test_max_fragments_grows_with_max_size_unless_configured() -> None:
    assert Limits().fragments == 4096
    assert Limits(max_size=2**30).fragments >= 2**30 / 4096
    assert Limits(max_size=2**30, max_fragments=7).fragments == 7
