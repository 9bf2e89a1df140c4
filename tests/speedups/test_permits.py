"""The fast path of clients whose rights are limited: only to topics that were permitted, and to all of these."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from broker._speedups import PermittedRoutes, RouteCache
from broker.node import _event_prefix
from tests.speedups.nodes import Node
from tests.speedups.wire import TEXT, client_frame

MakeNode = Callable[..., Node]


class World:
    """A node with routes, and a publisher who may use the permitted ones."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.routes = RouteCache()
        self.permitted = PermittedRoutes(self.routes)
        self.publisher = node.client()
        self.publisher.connection.routes = self.permitted
        self.left_to_the_session = 0
        self.publisher.message = self._count  # type: ignore[method-assign]

    def _count(self, payload: bytes, text: bool) -> None:
        self.left_to_the_session += 1

    def install(self, topic: str) -> None:
        self.routes.install(topic, self.node.hub.audience(topic), _event_prefix(topic))

    def publish(self, topic: str) -> bool:
        """Publish one event. Returns whether the fast path took it."""
        before = self.node.context.fast_publishes, self.left_to_the_session
        self.publisher.connection.feed(client_frame(TEXT, b'{"op":"publish","topic":"%s","data":1}' % topic.encode()))
        after = self.node.context.fast_publishes, self.left_to_the_session
        fast, slow = after[0] - before[0], after[1] - before[1]
        assert fast + slow == 1
        return fast == 1


def test_route_without_a_permit_is_left_to_the_session(new_node: MakeNode) -> None:
    world = World(new_node())
    world.install("a")
    assert not world.publish("a")
    world.permitted.permit("a")
    assert world.publish("a")
    assert not world.publish("b")


def test_permit_without_a_route_does_nothing(new_node: MakeNode) -> None:
    world = World(new_node())
    world.permitted.permit("a")
    world.install("a")
    assert not world.publish("a")


def test_permit_ends_with_its_route(new_node: MakeNode) -> None:
    world = World(new_node())
    world.install("a")
    world.permitted.permit("a")
    world.routes.withdraw("a")
    assert not world.publish("a")
    world.install("a")
    assert not world.publish("a")
    world.permitted.permit("a")
    assert world.publish("a")


def test_clients_with_other_rights_do_not_share_permits(new_node: MakeNode) -> None:
    world = World(new_node())
    world.install("a")
    world.permitted.permit("a")
    other = PermittedRoutes(world.routes)
    world.publisher.connection.routes = other
    assert not world.publish("a")


def test_many_topics_keep_their_permits(new_node: MakeNode) -> None:
    world = World(new_node())
    topics = [f"t{number}" for number in range(1000)]
    for topic in topics:
        world.install(topic)
        world.permitted.permit(topic)
    for topic in topics:
        world.permitted.permit(topic)  # what fell out while the table grew comes back, as after a slow publish
    assert all(world.publish(topic) for topic in topics)


@given(st.lists(st.tuples(st.sampled_from(["install", "withdraw", "permit", "publish"]), st.integers(0, 60))))
def test_only_permitted_routes_are_used(steps: list[tuple[str, int]]) -> None:
    world = World(Node())
    allowed: set[str] = set()
    installed: set[str] = set()
    for step, number in steps:
        topic = f"t{number}"
        if step == "install":
            world.install(topic)
            installed.add(topic)
            allowed.discard(topic)
        elif step == "withdraw":
            world.routes.withdraw(topic)
            installed.discard(topic)
            allowed.discard(topic)
        elif step == "permit":
            world.permitted.permit(topic)
            if topic in installed:
                allowed.add(topic)
                assert world.publish(topic), "a permit counts at once"
        elif world.publish(topic):
            assert topic in allowed
    world.publisher.transport.discard()
