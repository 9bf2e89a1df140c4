"""Connections: all at once, one after the other, and idle."""

from bench.figures import duration, micros, rate, share, size
from bench.measure import Opening
from bench.peers import BROKER, NATS, NCHAN, PICOWS, REDIS, SOCKETIFY, WEBSOCKETS
from bench.scenarios.base import (
    GOAL,
    Column,
    Plot,
    Scenario,
    connect_cpu,
    connect_p50,
    connect_p99,
    connection_rss,
    connects_per_second,
)

PEERS = (BROKER, WEBSOCKETS, PICOWS, SOCKETIFY, NATS, NCHAN, REDIS)

STORM = Scenario(
    "storm",
    "Connection storm",
    "2,000 clients connect at the same moment and subscribe to one topic. New connections wait in a queue of the "
    "kernel until the server accepts them; the queue has 4,096 places, if the server lets its size be set. If it is "
    "full, the kernel refuses a client, and the client tries again after a second.",
    (Opening(connections=2000, base=1, opening=2000, subscribed=True, settle=0.2, patience=10.0),),
    PEERS,
    (
        Column("connects/s", connects_per_second, rate),
        Column("all open after", lambda result: result.seconds * 1e6, duration),
        Column("p50", connect_p50, duration),
        Column("p99", connect_p99, duration),
        Column("server CPU", lambda result: result.server_cpu, share),
        Column("load CPU", lambda result: result.load_cpu, share),
    ),
    connects_per_second,
    plots=(
        Plot(
            "rate",
            "2,000 clients connect at the same moment",
            "bars",
            "connects/s",
            connects_per_second,
            metric="connections accepted per second",
        ),
    ),
)

CONNECT = Scenario(
    "connect",
    "Connecting",
    "The CPU time that the server needs for a connection and its handshake. Up to 64 clients connect at the same time, "
    "and all connections stay open.",
    (Opening(connections=3000, base=500, settle=0.3),),
    PEERS,
    (
        Column("server µs each", connect_cpu, micros),
        Column("connects/s", connects_per_second, rate),
        Column("p50", connect_p50, duration),
        Column("p99", connect_p99, duration),
        Column("load CPU", lambda result: result.load_cpu, share),
    ),
    connect_cpu,
    repetitions=lambda load, peer: GOAL if peer is BROKER else 2,
    less_is_better=True,
    plots=(
        Plot(
            "cpu",
            "3,000 clients, up to 64 at a time",
            "bars",
            "µs of CPU for each connection",
            connect_cpu,
            metric="CPU time of the server for a connection with its handshake",
        ),
    ),
)

IDLE = Scenario(
    "idle",
    "Idle connections",
    "The memory that each connection adds to the resident memory of the server. The first 500 connections are not "
    "counted, because during them a server also allocates what it needs only once. Socket buffers in the kernel are "
    "not part of resident memory.",
    (Opening(connections=10_000), Opening(connections=10_000, subscribed=True)),
    PEERS,
    (
        Column("RSS of each", connection_rss, size),
        Column("RSS in all", lambda result: result.server_rss, size),
    ),
    connection_rss,
    repetitions=lambda load, peer: 3 if peer is BROKER and not load.subscribed else 1,
    less_is_better=True,
    plots=(
        Plot(
            "rss",
            "10,000 connections",
            "bars",
            "kB for each connection",
            lambda result: result.rss_per_connection / 1e3,
            label=lambda load: "subscribed to one topic" if load.subscribed else "idle",
            metric="memory of the server for each connection",
        ),
    ),
)
