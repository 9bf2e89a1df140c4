"""The states of connections and subscriptions, as the models see them from outside."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from broker._speedups import CONNECTION_TRANSITIONS, SUBSCRIPTION_TRANSITIONS, Connection, Subscription


def reachable(table: dict[str, tuple[str, ...]], start: str) -> set[str]:
    """Return the states that can follow, after any number of changes, `start` among them."""
    found = {start}
    new = [start]
    while new:
        for state in table[new.pop()]:
            if state not in found:
                found.add(state)
                new.append(state)
    return found


class StateCheck:
    """Remembers the last seen state of each object, and checks that the present one can follow and is true."""

    def __init__(self) -> None:
        self._connections: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()
        self._subscriptions: dict[int, tuple[Subscription, str]] = {}

    def forget(self) -> None:
        """Let go of everything."""
        self._subscriptions.clear()

    def check_connection(self, connection: Connection) -> None:
        """Check that the table of transitions leads to the present state."""
        state = connection.state_name
        before = self._connections.get(connection, state)
        assert state in reachable(CONNECTION_TRANSITIONS, before), f"{before} to {state}"
        self._connections[connection] = state

    def check_subscription(
        self, subscription: Subscription, *, may_have_barrier: bool, must_have_barrier: bool = False
    ) -> None:
        """Check that the table of transitions leads to the present state, and that the state is true.

        A model that cannot tell whether the subscription is behind an order barrier says that it may be.
        """
        state = subscription.state
        _, before = self._subscriptions.get(id(subscription), (subscription, state))
        assert state in reachable(SUBSCRIPTION_TRANSITIONS, before), f"{before} to {state}"
        self._subscriptions[id(subscription)] = subscription, state
        connection = subscription.connection
        assert (state == "cancelled") == (connection is None)
        if connection is None or connection.state_name == "disconnected":
            return  # nothing is sent any more, whatever the state
        if state == "barrier":
            assert may_have_barrier
            return
        assert not must_have_barrier
        assert (state == "no_credit") == (subscription.credit == 0)
        if state == "no_credit":
            return
        assert (state == "replaying") == (subscription.lag > 0)
        if state == "live":
            assert subscription.queued == 0
            assert not connection.blocked
            assert subscription.credit == -1
            assert subscription.overflow != "block"
