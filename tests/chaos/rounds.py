"""Rounds of chaos: a client behind a proxy that maltreats its connections, and a broker that is restarted meanwhile.

After each round the account must be whole: of everything that was published, a subscription got each event once and in
order, or a gap where it is missing; reliable publishes arrived exactly once; nothing hangs, nothing went unhandled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.proxy import proxying
from tests.client import model
from tests.fixtures_broker import ROOT, RunningBroker, start_broker
from wsbroker_client import Client, ClientError, Position

HERE = Path(__file__).parent
PATIENCE = 60.0

TOPICS = ("c.a", "c.b", "h.t", "n.a")
SUBSCRIPTIONS = ("c.a", "c.*", "h.t", "n.a")
RELIABLE = "h.r"
EVENTS = 150
STRIKES = 8
PUBLISHES = 20

# Pings so often that the longest stall of the proxy ends a connection.
PING = "0.2"
SUBJECTS = {
    "python": [sys.executable, "-m", "tests.chaos.subject"],
    "js": [shutil.which("node") or "node", "--expose-gc", str(HERE / "subject.mjs")],
}


@dataclass
class Account:
    """What a round was about."""

    published: dict[str, list[tuple[int, bool]]] = field(default_factory=lambda: {topic: [] for topic in TOPICS})
    """For each topic the numbers in their order, and whether the broker confirmed them."""
    received: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)
    stored: list[int] = field(default_factory=list)
    """The reliable publishes that the broker kept, where it remembers."""
    end: dict[str, Any] = field(default_factory=dict)
    strikes: list[str] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)


class Subject:
    """A client in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[dict[str, Any]] = []
        self.news = asyncio.Condition()
        self.reading = asyncio.ensure_future(self._read())

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    async def until(self, *keys: str, count: int = 1) -> dict[str, Any]:
        """The last message with one of these keys, when there are so many."""
        async with self.news:
            await asyncio.wait_for(self.news.wait_for(lambda: len(self.find(*keys)) >= count), PATIENCE)
        return self.find(*keys)[-1]

    def find(self, *keys: str) -> list[dict[str, Any]]:
        assert not self.reading.done(), f"the subject has ended: {self.said[-3:]}"
        return [each for each in self.said if any(key in each for key in keys)]

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self.news:
                self.said.append(json.loads(line))
                self.news.notify_all()


@contextlib.asynccontextmanager
async def subject(kind: str, python: str = sys.executable) -> AsyncIterator[Subject]:
    """Run a client to be driven; that for Python with this one."""
    process = await asyncio.create_subprocess_exec(
        *(python if part == sys.executable else part for part in SUBJECTS[kind]),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    driven = Subject(process)
    try:
        yield driven
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 10.0)
        except TimeoutError:
            process.kill()
            await process.wait()
        await driven.reading


class Real:
    """The real broker, which is restarted in the middle of each round; the topics `h.` keep history.

    With `store`, a file, that is in SQLite, and outlives the broker. Without, it is in memory.
    """

    def __init__(self, stack: contextlib.ExitStack, folder: Path, store: str | None = None) -> None:
        self.remembers = store is not None
        """Whether it has history and `dedup` over a restart."""
        self._stack = stack
        self._since: dict[str, Position] = {}
        self._config = folder / "wsbroker.toml"
        engine = "memory" if store is None else f"sqlite://{folder / store}"
        self._config.write_text(f'[server]\nengine = "{engine}"\n[[topics]]\nmatch = "h.>"\nhistory = 100000\n')
        self._broker = self._start("127.0.0.1:0")

    def _start(self, listen: str) -> RunningBroker:
        limits = {"WSBROKER_LIMITS__PING_INTERVAL": PING, "WSBROKER_LIMITS__DRAIN_TIMEOUT": "1"}
        environ = {**limits, "WSBROKER_SERVER__ADMIN": ""}
        start = start_broker("--config", str(self._config), listen=listen, environ=environ)
        return self._stack.enter_context(start)

    @property
    def port(self) -> int:
        return self._broker.port

    async def restart(self, how: str) -> None:
        program = self._broker.program
        (program.kill if how == "kill" else program.terminate)()
        await asyncio.to_thread(program.wait)
        self._broker = await asyncio.to_thread(self._start, f"127.0.0.1:{self.port}")

    async def begin_round(self, direct: Client) -> None:
        """Note what there is already."""
        receipt = await direct.publish(RELIABLE, "begin")
        assert receipt.epoch is not None
        assert receipt.offset is not None
        self._since[RELIABLE] = Position(receipt.epoch, receipt.offset)

    async def stored(self, direct: Client, topic: str) -> list[int]:
        """The numbers that were published to a topic in this round and are kept."""
        return [event.data async for event in direct.history(topic, since=self._since[topic])]


class Model:
    """The model broker, with history and `dedup`; a restart ends its connections, and it knows what it knew."""

    remembers = True

    def __init__(self, broker: model.Broker) -> None:
        self._broker = broker
        broker.ping = float(PING)
        broker.keep = 10_000

    @property
    def port(self) -> int:
        return int(self._broker.url.rpartition(":")[2])

    async def restart(self, how: str) -> None:
        if how == "kill":
            self._broker.cut()
        else:
            await self._broker.close_peers(1001, "going_away", retry_after_ms=50)

    async def stored(self, direct: Client, topic: str) -> list[int]:
        return [event["data"] for event in self._broker.topic(topic).kept]

    async def begin_round(self, direct: Client) -> None:
        self._broker.topics.clear()
        self._broker.received.clear()


Target = Real | Model


async def play(target: Target, driven: Subject, seed: int) -> Account:
    """One round."""
    rng = random.Random(seed)
    account = Account()
    start = len(driven.said)
    async with (
        proxying(target.port, rng) as proxy,
        Client(f"ws://127.0.0.1:{target.port}", timeout=PATIENCE) as direct,
    ):
        await target.begin_round(direct)
        driven.said.clear()
        start = 0
        driven.tell(do="round", url=f"ws://127.0.0.1:{proxy.port}", topics=SUBSCRIPTIONS)
        await driven.until("ready", count=len(SUBSCRIPTIONS))
        feeding = asyncio.ensure_future(feed(direct, account))
        restart_at = rng.randrange(STRIKES)
        numbers = iter(range(PUBLISHES))
        for strike in range(STRIKES):
            for number in [next(numbers, None) for _ in range(PUBLISHES // STRIKES + 1)]:
                if number is not None:
                    driven.tell(do="publish", topic=RELIABLE, data=number, reliable=True)
            await asyncio.sleep(rng.uniform(0.02, 0.2))
            account.strikes.append(proxy.strike())
            if strike == restart_at:
                account.restarts.append(rng.choice(["term", "kill"]))
                await target.restart(account.restarts[-1])
        proxy.settle()
        await feeding
        await finish(direct, driven, account)
        await driven.until("published", count=PUBLISHES)
        driven.tell(do="end")
        account.end = await driven.until("ended")
        if target.remembers:
            account.stored = await target.stored(direct, RELIABLE)
    account.received = driven.said[start:]
    account.outcomes = {each["published"]: each["outcome"] for each in account.received if "published" in each}
    return account


async def feed(direct: Client, account: Account) -> None:
    """Publish numbers to all topics, past the proxy."""
    for number in range(EVENTS):
        for topic in TOPICS:
            await publish(direct, account, topic, number)
        await asyncio.sleep(0.002)


async def publish(direct: Client, account: Account, topic: str, number: int) -> None:
    try:
        await direct.publish(topic, number)
        confirmed = True
    except ClientError:
        confirmed = False  # it was under way when the broker ended
    account.published[topic].append((number, confirmed))


async def finish(direct: Client, driven: Subject, account: Account) -> None:
    """Publish on until each subscription has got something of each of its topics: what comes before has come then."""
    wanted = {("c.a", "c.a"), ("c.*", "c.a"), ("c.*", "c.b"), ("h.t", "h.t"), ("n.a", "n.a")}
    for number in range(EVENTS, EVENTS + 2000):
        for topic in TOPICS:
            await publish(direct, account, topic, number)
        await asyncio.sleep(0.02)
        last = {
            (each["sub"], each["topic"]) for each in driven.said if each.get("data", -1) >= EVENTS and "sub" in each
        }
        if last >= wanted:
            return
    raise AssertionError(f"events no longer come: {wanted - last}")


def check(account: Account, target: Target) -> None:
    """Raise AssertionError where the account is not whole."""
    uncaught = [each["uncaught"] for each in account.received if "uncaught" in each]
    assert uncaught == [], uncaught
    assert account.end["pending"] == 0
    assert account.end["errors"] == []
    for name in SUBSCRIPTIONS:
        messages = [each for each in account.received if each.get("sub") == name]
        for topic in TOPICS:
            if topic == name or (name == "c.*" and topic.startswith("c.")):
                gapless = target.remembers and topic == "h.t"
                check_topic(messages, topic, account.published[topic], gapless=gapless, counted=topic == name)
        if name == "h.t":  # what history in memory loses with the broker, and nothing else
            assert {each["reason"] for each in messages if "gap" in each} <= {"epoch"}
    assert sorted(account.outcomes) == list(range(PUBLISHES))
    assert set(account.outcomes.values()) == {"ok"}
    if target.remembers:
        assert sorted(account.stored) == list(range(PUBLISHES)), "each reliable publish exactly once"


def check_topic(
    messages: list[dict[str, Any]], topic: str, published: list[tuple[int, bool]], *, gapless: bool, counted: bool
) -> None:
    """Each event once and in order; where confirmed ones are missing there is a gap.

    `counted`: all gaps are of this topic, so that their numbers must be those of the missing events.
    """
    expected = 0
    gaps: list[int | None] = []
    for message in messages:
        if "gap" in message:
            assert not gapless, message
            gaps.append(message.get("missed"))
        elif message["topic"] == topic:
            number = message["data"]
            assert number >= expected, f"{topic}: {number} came after {expected - 1}"
            missing = [each for each, confirmed in published[expected:number] if confirmed]
            assert gaps or not missing, f"{topic}: {missing} are missing, and no gap says so"
            known = [each for each in gaps if each is not None]
            if counted and len(known) == len(gaps):
                # Events that the broker did not confirm may have been published or not.
                assert len(missing) <= sum(known) <= number - expected, f"{topic}: {missing} are missing, not {known}"
            expected, gaps = number + 1, []
    assert expected > EVENTS, f"{topic}: the end is missing"
