"""What each Python library does with the broker, step by step: `await run(client)`.

A program of tests/interop takes a URL and a topic. It prints `version VERSION`, of the library, and a line for each
step: `ok STEP`, or `failed STEP: reason`, after which it ends. `ok close` has the close code at its end, if the library
shows it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, Protocol

SUBPROTOCOL = "wsbroker.v1"

PATIENCE = 20.0
"""Seconds that a step may take. Far more than any needs, also on a busy machine."""

SMALL = {"bid": 1.0843, "name": "Zürich 🚀"}
FRAGMENTED = 30_000
"""Characters of the fragmented event: more than the write buffer of a library."""


class Client(Protocol):
    """A library, as the steps need it."""

    version: str

    async def connect(self, url: str) -> None:
        """Open a connection, with the subprotocol."""

    async def send(self, text: str) -> None:
        """Send a message."""

    async def send_fragments(self, parts: list[str]) -> None:
        """Send a message in as many fragments. Not called where the library makes none."""

    async def receive(self) -> str:
        """Wait for a message."""

    async def close(self) -> int | None:
        """Close with code 1000; gives the code that the broker answered."""


class Talk:
    """A connection, with the messages that came before somebody waited for them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._early: list[dict[str, Any]] = []

    async def message(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for the first message that fits. An error fails the step."""
        for place, early in enumerate(self._early):
            if fits(early):
                return self._early.pop(place)
        while True:
            message: dict[str, Any] = json.loads(await self._client.receive())
            if fits(message):
                return message
            check(message["op"] != "error", f"an error came: {message}")
            self._early.append(message)

    async def answer(self, id: int) -> dict[str, Any]:
        """Wait for the answer to a command."""
        return await self.message(lambda message: message.get("id") == id)

    async def event(self, topic: str, data: object) -> None:
        """Wait for the next event, which must be this one."""
        event = await self.message(lambda message: message["op"] == "event")
        same = event == {"op": "event", "topic": topic, "data": data}
        check(same, f"another event came: {json.dumps(event)[:200]}")


class StepError(Exception):
    """A step went otherwise than it should."""


async def run(client: Client, *, fragments: bool = True) -> None:
    """Run all steps and print how each went."""
    url, topic = sys.argv[1:]
    print("version", client.version, flush=True)
    step = "connect"
    talk = Talk(client)
    try:
        async with asyncio.timeout(PATIENCE):
            await client.connect(url)
            welcome = await talk.message(lambda message: True)
            check((welcome["op"], welcome["version"]) == ("welcome", 1), f"no welcome, but {welcome}")
            passed(step)

            step = "subscribe"
            await client.send(command("subscribe", 1, topic))
            answer = await talk.answer(1)
            check(answer == {"op": "ok", "id": 1, "topic": topic}, f"answered {answer}")
            passed(step)

            step = "publish"
            await client.send(command("publish", 2, topic, SMALL))
            answer = await talk.answer(2)
            check(answer == {"op": "ok", "id": 2, "receivers": 1, "queued": 0, "dropped": 0}, f"answered {answer}")
            passed(step)

            step = "receive"
            await talk.event(topic, SMALL)
            passed(step)

            step = "large"
            room = welcome["max_size"] - len(command("publish", 3, topic, ""))
            await client.send(command("publish", 3, topic, numbers(room)))
            await talk.event(topic, numbers(room))
            passed(step)

            if fragments:
                step = "fragments"
                text = command("publish", 4, topic, numbers(FRAGMENTED))
                await client.send_fragments([text[:10_000], text[10_000:20_000], text[20_000:]])
                await talk.event(topic, numbers(FRAGMENTED))
                passed(step)

            step = "close"
            code = await client.close()
            passed(step, "" if code is None else str(code))
    except Exception as error:  # noqa: BLE001 – whatever a library raises
        print(f"failed {step}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)


def command(op: str, id: int, topic: str, data: object = None) -> str:
    """A command, as short as JSON can be."""
    fields = {"op": op, "id": id, "topic": topic} | ({} if data is None else {"data": data})
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def numbers(length: int) -> str:
    """A text of this length which compression makes smaller, but not small: 0 1 2 3 …"""
    return " ".join(map(str, range(length // 2)))[:length]


def check(holds: bool, otherwise: str) -> None:
    """Fail the step unless it holds."""
    if not holds:
        raise StepError(otherwise)


def passed(step: str, note: str = "") -> None:
    """Report a step."""
    print("ok", step, note, flush=True)
