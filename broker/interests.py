"""The filters that the engine was asked to deliver to this node, and the subscribers that wait for its answer.

The node has an interest in each topic or pattern that has a subscriber. Only the interests that the engine has not
answered yet are kept here; those that it has confirmed are the filters of the hub.
"""

from __future__ import annotations

from functools import partial

import structlog

from broker.engines.base import Engine, InterestDone, Unavailable

log = structlog.get_logger(__name__)


class Interests:
    """The interests of one node."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending: dict[str, list[InterestDone]] = {}

    def begin(self, filter: str, done: InterestDone) -> None:
        """Ask the engine for the events of a filter that has its first subscriber. `done` gets its answer.

        An exception of the engine is raised only where it has not answered.
        """
        waiting = self._pending[filter] = [done]
        try:
            self._engine.interest(filter, True, partial(self._answer, filter, waiting))
        except Exception:
            if waiting:
                del self._pending[filter]
                raise
            log.exception("engine failed after its answer")

    def _answer(self, filter: str, waiting: list[InterestDone], result: Unavailable | None) -> None:
        if self._pending.get(filter) is waiting:
            del self._pending[filter]
        while waiting:  # a second answer finds no waiting subscriber
            waiting.pop(0)(result)

    def confirm(self, filter: str, done: InterestDone) -> None:
        """Call `done` once the engine has answered for a filter that has subscribers already."""
        waiting = self._pending.get(filter)
        if waiting is None:
            done(None)
        else:
            waiting.append(done)

    def end(self, filter: str) -> None:
        """Tell the engine that the last subscriber of a filter is gone. Waiting subscribers get its earlier answer."""
        self._pending.pop(filter, None)
        self._engine.interest(filter, False, _ignore)


def _ignore(result: Unavailable | None) -> None:
    """The events of an interest that could not be ended find no subscriber."""
