"""docs/architecture.md shows the state machines of the native core as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from broker._speedups import (
    CONNECTION_STATES,
    CONNECTION_TRANSITIONS,
    SUBSCRIPTION_STATES,
    SUBSCRIPTION_TRANSITIONS,
)

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "states.py"))


def test_pictures_in_the_docs_are_made_from_the_tables() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert TOOL["update"](text) == text, "run tools/states.py"


def test_picture_of_another_table_is_different() -> None:
    assert "open --> closed" in TOOL["diagram"]({"open": ("closed",), "closed": ()})


@pytest.mark.parametrize(
    ("states", "transitions"),
    [(CONNECTION_STATES, CONNECTION_TRANSITIONS), (SUBSCRIPTION_STATES, SUBSCRIPTION_TRANSITIONS)],
)
def test_each_state_has_its_row_and_one_state_is_the_end(
    states: tuple[str, ...], transitions: dict[str, tuple[str, ...]]
) -> None:
    assert list(transitions) == list(states)
    assert all(after in states for following in transitions.values() for after in following)
    assert [state for state, following in transitions.items() if not following] == [states[-1]]
