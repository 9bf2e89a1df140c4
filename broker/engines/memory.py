"""The default engine: events stay in this process, and nothing is kept of them."""

from __future__ import annotations

from broker.engines.base import Deliver, Done, Engine, Event, HistoryDone, Lost, NoHistory, Position

NOWHERE = Position()


class MemoryEngine(Engine):
    """Delivers an event before `publish` returns. The order of an event loop is all the order that it needs."""

    in_process = True

    def __init__(self) -> None:
        self._deliver: Deliver | None = None

    async def start(self, deliver: Deliver, lost: Lost) -> None:
        self._deliver = deliver

    async def stop(self) -> None:
        self._deliver = None

    def publish(self, event: Event, done: Done) -> None:
        if self._deliver is None:
            raise RuntimeError("the engine is not started")
        self._deliver(event)
        done(NOWHERE)

    def interest(self, topic: str, on: bool) -> None:
        """Nothing to do: every event is delivered to the one node that there is."""

    def history(self, topic: str, since: Position | None, limit: int, done: HistoryDone) -> None:
        done(NoHistory(topic))
