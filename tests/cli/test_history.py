"""`wsbroker history`, `wsbroker presence` and `wsbroker sub --last` with a real broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.fixtures_broker import RunningBroker, start_broker
from tests.fixtures_command import Result, start, wsbroker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """A broker with a topic that keeps history and has presence."""
    config = tmp_path / "wsbroker.toml"
    config.write_text(
        "[server]\nadmin = ''\n[limits]\nmax_size = 20000\n"
        "[[topics]]\nmatch = 'room.*'\nhistory = 5000\npresence = true\n"
    )
    with start_broker("--config", str(config)) as broker:
        yield broker


def ask(client: ClientConnection, **command: Any) -> dict[str, Any]:
    client.send(json.dumps({"id": 1, **command}))
    while (answer := json.loads(client.recv())).get("id") != 1:
        pass
    assert answer["op"] == "ok", answer
    return dict(answer)


def lines(finished: Result) -> list[dict[str, Any]]:
    assert finished.status == 0, finished.err
    return [json.loads(line) for line in finished.out.splitlines()]


async def test_history_prints_the_newest_events_over_several_pages(broker: RunningBroker) -> None:
    with connect(broker.url, proxy=None) as client:
        for n in range(2500):
            client.send(json.dumps({"op": "publish", "topic": "room.a", "data": [n, "x" * 20]}))
        ask(client, op="publish", topic="room.a", key="k", data="end\n")
    url = ("--url", broker.url)
    assert lines(await wsbroker("history", "room.a", "--last", "1", *url)) == [
        {"offset": 2501, "key": "k", "data": "end\n"}
    ]
    assert [each["offset"] for each in lines(await wsbroker("history", "room.a", *url))] == list(range(2402, 2502))
    found = lines(await wsbroker("history", "room.a", "--last", "2000", *url))
    assert [each["offset"] for each in found] == list(range(502, 2502))


async def test_history_prints_more_than_one_answer_may_have(broker: RunningBroker) -> None:
    """An answer of this broker has at most 20,000 bytes, which ten of these events have."""
    with connect(broker.url, proxy=None) as client:
        for n in range(60):
            ask(client, op="publish", topic="room.a", data=[n, "x" * 2000])
    for last in (9, 10, 11, 50, 60, 100):
        found = lines(await wsbroker("history", "room.a", "--last", str(last), "--url", broker.url))
        assert [each["data"][0] for each in found] == list(range(60))[-last:]


async def test_presence_prints_the_members(broker: RunningBroker) -> None:
    with connect(broker.url, proxy=None) as client:
        session = json.loads(client.recv())["session"]
        ask(client, op="subscribe", topic="room.a", info={"name": "Ann"})
        found = lines(await wsbroker("presence", "room.a", "--url", broker.url))
        assert found == [{"session": session, "info": {"name": "Ann"}}]
    assert lines(await wsbroker("presence", "room.b", "--url", broker.url)) == []


async def test_sub_prints_kept_events_first(broker: RunningBroker) -> None:
    with connect(broker.url, proxy=None) as client:
        for n in range(5):
            ask(client, op="publish", topic="room.a", data=n)
        async with start("sub", "room.a", "--last", "2", "--url", broker.url) as program:
            assert program.stdout is not None
            assert [json.loads(await program.stdout.readline())["data"] for _ in range(2)] == [3, 4]
            ask(client, op="publish", topic="room.a", data=5)
            assert json.loads(await program.stdout.readline())["offset"] == 6


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("history", "none"), 65, "no_history: `none` keeps no history"),
        (("presence", "none"), 65, "no_presence: `none` has no presence"),
        (("sub", "none", "--last", "3"), 65, "no_history"),
        (("history", "a..b"), 65, "bad_topic"),
        (("presence", "*"), 65, "bad_topic"),
        (("history", "a", "--last", "0"), 2, "--last"),
    ],
)
async def test_refusals(broker: RunningBroker, arguments: tuple[str, ...], status: int, message: str) -> None:
    finished = await wsbroker(*arguments, "--url", broker.url)
    assert finished.status == status
    assert message in finished.err


async def test_bench_says_that_its_topics_must_not_keep_history(tmp_path: Path) -> None:
    config = tmp_path / "wsbroker.toml"
    config.write_text("[server]\nadmin = ''\n[[topics]]\nmatch = '>'\nhistory = 10\n")
    with start_broker("--config", str(config)) as broker:
        refused = await wsbroker("bench", "--seconds", "1", "--url", broker.url)
    assert refused.status == 69
    assert "the topics bench.> keep history here: give them a topic rule with history = 0" in refused.err
    config.write_text(config.read_text() + "[[topics]]\nmatch = 'bench.>'\nhistory = 0\n")
    with start_broker("--config", str(config)) as broker:
        assert (await wsbroker("bench", "--seconds", "0.2", "--subscribers", "2", "--url", broker.url)).status == 0
