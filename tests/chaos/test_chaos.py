"""Ten rounds of chaos for each client, on both engines and on the model of a broker. `make chaos` plays 200."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.proxy import MISHAPS, proxying
from tests.chaos.rounds import EVENTS, SUBJECTS, Account, Model, Real, Target, check, check_topic, play, subject
from tests.client import model

pytestmark = pytest.mark.needs("node")

ROUNDS = {"memory": 4, "sqlite": 4, "model": 2}


@contextlib.asynccontextmanager
async def target_of(kind: str) -> AsyncIterator[Target]:
    if kind == "model":
        async with model.running() as broker:
            yield Model(broker)
    else:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            yield Real(stack, folder, None if kind == "memory" else "broker.db")


@pytest.mark.parametrize("kind", ["memory", "sqlite", "model"])
@pytest.mark.parametrize("client", SUBJECTS)
async def test_account_is_whole_after_each_round(client: str, kind: str) -> None:
    async with target_of(kind) as target, subject(client) as driven:
        for seed in range(ROUNDS[kind]):
            account = await play(target, driven, seed)
            try:
                check(account, target)
            except AssertionError as error:
                raise AssertionError(f"round {seed}: {account.strikes}, {account.restarts}: {error}") from error


def test_same_seed_gives_the_same_mishaps() -> None:
    def row(seed: int) -> list[str]:
        from tests.chaos.proxy import Proxy

        proxy = Proxy(1, random.Random(seed))
        return [proxy.strike() for _ in range(100)]

    assert row(1) == row(1) != row(2)
    assert set(row(1)) == set(MISHAPS)


async def test_proxy_in_calm_forwards_everything(tmp_path: object) -> None:
    from wsbroker_client import Client

    async with (
        model.running() as broker,
        proxying(int(broker.url.rpartition(":")[2]), random.Random(1)) as proxy,
        Client(f"ws://127.0.0.1:{proxy.port}") as client,
    ):
        subscription = client.subscribe("t")
        await subscription.ready()
        for number in range(100):
            await client.publish("t", number)
        assert [(await anext(subscription)).data for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("fault", ["lost", "twice", "order", "end", "miscounted"])
def test_broken_account_is_found(fault: str) -> None:
    numbers = list(range(EVENTS + 2))
    published = [(number, True) for number in numbers]
    if fault == "lost":
        numbers.remove(7)
    elif fault == "twice":
        numbers.insert(8, 7)
    elif fault == "order":
        numbers[7], numbers[8] = numbers[8], numbers[7]
    elif fault == "end":
        numbers = numbers[:20]
    messages: list[dict[str, Any]] = [{"topic": "t", "data": number} for number in numbers]
    if fault == "miscounted":
        messages[5:9] = [{"gap": "t", "missed": 3}]
    with pytest.raises(AssertionError, match=r"missing|came after"):
        check_topic(messages, "t", published, gapless=False, counted=True)


def test_gap_accounts_for_what_is_missing() -> None:
    published = [(number, True) for number in range(EVENTS + 2)]
    for missed in (4, None):
        messages: list[dict[str, Any]] = [{"topic": "t", "data": number} for number in range(EVENTS + 2)]
        messages[5:9] = [{"gap": "t", "missed": missed}]
        check_topic(messages, "t", published, gapless=False, counted=True)
    assert Account().outcomes == {}
