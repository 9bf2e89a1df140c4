"""Verifications take a bounded time of each turn of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.auth.tokens import TokenError
from broker.auth.verifications import SLICE, Verifications
from broker.identity import Identity


class Clock:
    """The time, as the test lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class World:
    """Verifications that take as long as their token says, in seconds behind the dot."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.verifications = Verifications(asyncio.get_running_loop(), self.clock)
        self.done: list[str | None] = []

    def verify(self, token: str) -> Identity:
        self.clock.now += float(token.partition(".")[2] or 0)
        if token.startswith("wrong"):
            raise TokenError("wrong")
        return Identity(token, ())

    def submit(self, token: str) -> None:
        self.verifications.submit(self.verify, token, self.on_done)

    def on_done(self, result: Identity | TokenError) -> None:
        self.done.append(str(result) if isinstance(result, TokenError) else result.name)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    made.verifications.stop()


async def test_token_is_verified_at_once_where_the_turn_has_time(world: World) -> None:
    world.submit("a.0.0001")
    world.submit("wrong")
    assert world.done == ["a.0.0001", "wrong"]


async def test_burst_is_verified_in_slices_and_in_order(world: World) -> None:
    tokens = [f"{number}.0.0005" for number in range(100)]
    for token in tokens:
        world.submit(token)
    turns = [len(world.done)]
    while len(world.done) < 100:
        await asyncio.sleep(0)
        turns.append(len(world.done))
    assert world.done == tokens
    most = int(SLICE / 0.0005) + 1
    assert all(after - before <= most for before, after in zip([0, *turns], turns, strict=False))
    assert len(turns) >= 100 // most


async def test_loop_does_other_things_between_slices(world: World) -> None:
    for number in range(100):
        world.submit(f"{number}.0.001")
    ticks = 0
    while len(world.done) < 100:
        await asyncio.sleep(0)
        ticks += 1
    assert ticks >= 33


async def test_nobody_is_called_after_the_stop(world: World) -> None:
    for number in range(100):
        world.submit(f"{number}.0.001")
    before = len(world.done)
    world.verifications.stop()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(world.done) == before
