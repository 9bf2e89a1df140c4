"""Which interests the engine has been asked for, and who waits for its answer."""

from __future__ import annotations

import pytest

from broker.engines.base import InterestDone, Unavailable
from broker.engines.memory import MemoryEngine
from broker.interests import Interests

REFUSED = Unavailable("not now")


class Asked(MemoryEngine):
    """Leaves it to the test when an interest is answered."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, bool]] = []
        self.done: list[InterestDone] = []

    def interest(self, filter: str, on: bool, done: InterestDone) -> None:
        self.asked.append((filter, on))
        self.done.append(done)


@pytest.fixture
def engine() -> Asked:
    return Asked()


@pytest.fixture
def interests(engine: Asked) -> Interests:
    return Interests(engine)


@pytest.mark.parametrize("result", [None, REFUSED])
def test_all_who_wait_get_the_answer_once(engine: Asked, interests: Interests, result: Unavailable | None) -> None:
    told: list[tuple[int, Unavailable | None]] = []
    interests.begin("a", lambda answer: told.append((1, answer)))
    interests.confirm("a", lambda answer: told.append((2, answer)))
    assert (engine.asked, told) == ([("a", True)], [])
    engine.done[0](result)
    engine.done[0](REFUSED)
    assert told == [(1, result), (2, result)]


def test_confirmed_interest_is_confirmed_at_once(engine: Asked, interests: Interests) -> None:
    told: list[Unavailable | None] = []
    interests.begin("a", told.append)
    engine.done[0](None)
    interests.confirm("a", told.append)
    assert told == [None, None]
    assert engine.asked == [("a", True)]


def test_answer_of_an_ended_interest_does_not_confirm_the_next_one(engine: Asked, interests: Interests) -> None:
    first: list[Unavailable | None] = []
    second: list[Unavailable | None] = []
    interests.begin("a", first.append)
    interests.end("a")
    interests.begin("a", second.append)
    interests.confirm("a", second.append)
    engine.done[0](None)
    assert (first, second) == ([None], [])
    engine.done[1](None)
    engine.done[2](REFUSED)
    assert second == [REFUSED, REFUSED]
    assert engine.asked == [("a", True), ("a", False), ("a", True)]


def test_failure_of_the_engine_leaves_nothing_pending() -> None:
    class Failing(MemoryEngine):
        def interest(self, filter: str, on: bool, done: InterestDone) -> None:
            raise RuntimeError("a fault of the engine")

    told: list[Unavailable | None] = []
    interests = Interests(Failing())
    with pytest.raises(RuntimeError):
        interests.begin("a", told.append)
    assert told == []
    interests.confirm("a", told.append)
    assert told == [None]
