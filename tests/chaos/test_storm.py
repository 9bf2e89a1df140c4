"""2,000 clients lose their broker at once: they come back within the bound, and not at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import resource

import pytest

from tests.fixtures_broker import start_broker
from wsbroker_client import Changed, Client, State
from wsbroker_client.reconnection import FIRST_DELAY, MAX_DELAY

CLIENTS = 2000


def uniform_distance(values: list[float], bound: float) -> float:
    """The Kolmogorov-Smirnov distance of values from the uniform distribution on 0 to `bound`."""
    ordered = sorted(value / bound for value in values)
    count = len(ordered)
    return max(max((at + 1) / count - value, value - at / count) for at, value in enumerate(ordered))


def test_distance_accepts_a_uniform_distribution_and_no_other() -> None:
    count = CLIENTS
    limit = 1.95 / math.sqrt(count)
    even = [(number + 0.5) / count for number in range(count)]
    assert uniform_distance(even, 1.0) < limit
    assert uniform_distance([0.5 + value / 2 for value in even], 1.0) > limit  # half of the wait is fixed
    assert uniform_distance([value**2 for value in even], 1.0) > limit
    assert uniform_distance([0.5] * count, 1.0) > limit


@pytest.mark.parametrize("how", ["kill", "term"])
async def test_clients_come_back_spread(how: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384), hard))
    delays: dict[int, list[float]] = {number: [] for number in range(CLIENTS)}

    def note(number: int, change: Changed) -> None:
        if change.state is State.WAITING and change.delay is not None:
            delays[number].append(change.delay)

    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(start_broker())
        clients = [
            Client(broker.url, timeout=60.0, on_state=lambda change, number=number: note(number, change))  # type: ignore[misc]
            for number in range(CLIENTS)
        ]
        try:
            for at in range(0, CLIENTS, 100):
                await asyncio.gather(*(client.connect() for client in clients[at : at + 100]))
            for recorded in delays.values():
                recorded.clear()
            (broker.program.kill if how == "kill" else broker.program.terminate)()
            await asyncio.to_thread(broker.program.wait)
            stack.enter_context(await asyncio.to_thread(lambda: start_again(broker.port)))
            # By themselves: `connect` would end the wait of each.
            while {client.state for client in clients} != {State.CONNECTED}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        finally:
            await asyncio.gather(*(client.close() for client in clients))
    first = [recorded[0] for recorded in delays.values()]
    # 1.95: one run in a thousand of a uniform distribution is further from it.
    bound = FIRST_DELAY if how == "kill" else max(first)
    assert all(0 <= delay <= bound for delay in first)
    later = [(attempt, delay) for recorded in delays.values() for attempt, delay in enumerate(recorded[1:], 1)]
    assert all(0 <= delay <= min(MAX_DELAY, FIRST_DELAY * 2**attempt) for attempt, delay in later)
    assert uniform_distance(first, bound) < 1.95 / math.sqrt(CLIENTS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def start_again(port: int) -> contextlib.ExitStack:
    with contextlib.ExitStack() as own:
        own.enter_context(start_broker(listen=f"127.0.0.1:{port}"))
        return own.pop_all()
