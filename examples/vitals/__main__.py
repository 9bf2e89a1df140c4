"""Publishes this machine's CPU, memory and network figures every second: `python -m examples.vitals`.

    vitals.now.cpu, .memory, .network, .system    program → pages   every second
    vitals.past          page → program  {"page": "k3Zq"}           what was before I came?
    vitals.past.k3Zq     program → page  {"cpu": […], "memory": […], "network": […]}

The figures are dicts with `at`, in milliseconds since 1970, and the fields of the classes in `proc`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import platform
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from examples.link import client_of, tell
from examples.pages import main
from examples.vitals import proc
from wsbroker_client import Client

# Seconds that the program remembers for pages that come later: what a page shows, and a little more.
KEPT_SECONDS = 130

PROC = Path("/proc")

# The name that a page gives itself becomes a part of a topic.
PAGE = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Pages that wait to be told the past. Those that come when so many wait begin with the present.
MAX_REQUESTS = 100


async def program(broker: str) -> None:
    """Reads and publishes, over as many connections as it takes."""
    vitals = Vitals()
    async with client_of(broker) as client, asyncio.TaskGroup() as group:
        group.create_task(vitals.keep_reading())
        group.create_task(vitals.serve(client))


class Vitals:
    """The figures of now and of the last minutes. They are read whether there is a connection or not."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._now: dict[str, dict[str, Any]] = {}
        self._past: dict[str, deque[dict[str, Any]]] = {
            kind: deque(maxlen=KEPT_SECONDS) for kind in ("cpu", "memory", "network")
        }
        self._read = asyncio.Event()

    async def keep_reading(self) -> None:
        """Reads at the beginning of each second, and remembers."""
        while True:
            now = time.time()
            await asyncio.sleep(math.floor(now) + 1 - now)
            self._now = self._meter.read()
            for kind, past in self._past.items():
                past.append(self._now[kind])
            self._read.set()

    async def serve(self, client: Client) -> None:
        """Works until it is cancelled."""
        requests: asyncio.Queue[str] = asyncio.Queue(MAX_REQUESTS)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._publish_now(client))
            group.create_task(self._listen(client, requests))
            group.create_task(self._publish_past(client, requests))

    async def _publish_now(self, client: Client) -> None:
        while True:
            await self._read.wait()
            self._read.clear()
            for kind, figures in self._now.items():
                await tell(client, f"vitals.now.{kind}", figures)

    async def _listen(self, client: Client, requests: asyncio.Queue[str]) -> None:
        async for event in client.subscribe("vitals.past"):
            match event.data:
                case {"page": str(page)} if PAGE.fullmatch(page) and not requests.full():
                    requests.put_nowait(page)

    async def _publish_past(self, client: Client, requests: asyncio.Queue[str]) -> None:
        while True:
            page = await requests.get()
            await tell(client, f"vitals.past.{page}", {kind: list(past) for kind, past in self._past.items()})


class Meter:
    """Reads /proc, and makes rates of what the kernel counts."""

    def __init__(self) -> None:
        self._host = {"host": platform.node(), "kernel": f"{platform.system()} {platform.release()}"}
        self._at, self._cpu, self._network = self._counts()

    def read(self) -> dict[str, dict[str, Any]]:
        """The figures since the last reading: for each kind a dict with `at`, in milliseconds since 1970."""
        at, cpu, network = self._counts()
        figures = {
            "cpu": dataclasses.asdict(proc.cpu(self._cpu, cpu)),
            "memory": dataclasses.asdict(proc.memory(text("meminfo"))),
            "network": dataclasses.asdict(proc.network(self._network, network, at - self._at)),
            "system": {**self._host, **dataclasses.asdict(proc.system(text("loadavg"), text("uptime")))},
        }
        self._at, self._cpu, self._network = at, cpu, network
        now = round(time.time() * 1000)
        return {kind: {"at": now, **each} for kind, each in figures.items()}

    @staticmethod
    def _counts() -> tuple[float, dict[str, proc.CpuTimes], dict[str, tuple[int, int]]]:
        return time.monotonic(), proc.cpu_times(text("stat")), proc.network_counts(text("net/dev"))


def text(name: str) -> str:
    """A file in /proc."""
    return (PROC / name).read_text()


if __name__ == "__main__":
    main("vitals", 8001, program)
