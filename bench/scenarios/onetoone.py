"""One to one: a thousand topics with one subscriber each; and one topic with one subscriber, pipelined."""

from bench.measure import Publishing
from bench.peers import BROKER, FLOOR, NATS, PEERS, PICOWS, REDIS, SOCKETIFY, WEBSOCKETS
from bench.scenarios.base import GOAL, PUBLISHING, Plot, Scenario, deliveries

ONETOONE = Scenario(
    "onetoone",
    "One to one",
    "1,000 topics have one subscriber each. The publisher publishes to them in turn, with 256 publishes under way. "
    "Subscribers have no event in common, so this is the cost of one event for one subscriber.",
    (Publishing(subscribers=1000, topics=1000, window=256),),
    (BROKER, WEBSOCKETS, PICOWS, SOCKETIFY, NATS, REDIS),
    PUBLISHING,
    deliveries,
    repetitions=lambda load, peer: GOAL if peer in (BROKER, NATS, PICOWS, SOCKETIFY) else 2,
    plots=(
        Plot(
            "rate",
            "1,000 topics with one subscriber each, window 256",
            "bars",
            "messages/s",
            deliveries,
            metric="messages per second",
        ),
    ),
)

PIPELINED = Scenario(
    "pipelined",
    "One to one, pipelined",
    "One topic has one subscriber, and 256 publishes are under way. A server can send events together that arrived "
    "together.",
    (Publishing(subscribers=1, window=256),),
    tuple(PEERS.values()),
    PUBLISHING,
    deliveries,
    repetitions=lambda load, peer: GOAL if peer in (BROKER, FLOOR, NATS) else 2,
    plots=(
        Plot(
            "rate",
            "1 topic, 1 subscriber, 256 publishes under way",
            "bars",
            "messages/s",
            deliveries,
            metric="messages per second",
        ),
    ),
)
