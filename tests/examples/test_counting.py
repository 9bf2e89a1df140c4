"""The counter's knowledge: values and pages, without a broker."""

from __future__ import annotations

import pytest

from examples.counter.counting import MAX_NAME, MAX_PAGES, Counting


def test_counter_counts_up_and_down() -> None:
    counting = Counting(patience=5)
    assert counting.take("add", {"page": "a", "by": 1}, now=0)
    assert counting.take("add", {"page": "a", "by": 1}, now=0)
    assert counting.take("add", {"page": "a", "by": -1}, now=0)
    assert counting.state == {"value": 1, "online": 1}


def test_hello_is_answered_with_the_state() -> None:
    counting = Counting(patience=5)
    assert counting.take("hello", {"page": "a"}, now=0)
    assert counting.take("hello", {"page": "a"}, now=1)
    assert counting.state["online"] == 1


def test_roll_call_answer_is_announced_only_for_an_unknown_page() -> None:
    counting = Counting(patience=5)
    assert counting.take("here", {"page": "a"}, now=0)
    assert not counting.take("here", {"page": "a"}, now=1)


def test_bye_removes_the_page() -> None:
    counting = Counting(patience=5)
    counting.take("hello", {"page": "a"}, now=0)
    assert counting.take("bye", {"page": "a"}, now=1)
    assert not counting.take("bye", {"page": "a"}, now=1)
    assert counting.state["online"] == 0


def test_silent_page_is_removed() -> None:
    counting = Counting(patience=5)
    counting.take("hello", {"page": "a"}, now=0)
    counting.take("hello", {"page": "b"}, now=3)
    assert not counting.strike_off(now=5)
    assert counting.strike_off(now=6)
    assert counting.state["online"] == 1
    assert counting.strike_off(now=9)
    assert counting.state["online"] == 0


def test_broker_outage_removes_no_page() -> None:
    counting = Counting(patience=5)
    counting.take("hello", {"page": "a"}, now=0)
    counting.forgive(now=100)
    assert not counting.strike_off(now=105)
    assert counting.strike_off(now=106)


@pytest.mark.parametrize(
    "data", [None, 1, "page", [], {}, {"page": 1}, {"page": ""}, {"page": "x" * (MAX_NAME + 1)}, {"by": 1}]
)
def test_invalid_event_is_ignored(data: object) -> None:
    counting = Counting(patience=5)
    assert not counting.take("add", data, now=0)
    assert counting.state == {"value": 0, "online": 0}


@pytest.mark.parametrize("by", [None, 0, 2, -2, 1.5, "1", [1]])
def test_step_other_than_one_is_ignored(by: object) -> None:
    counting = Counting(patience=5)
    counting.take("add", {"page": "a", "by": by}, now=0)
    assert counting.state["value"] == 0


def test_number_of_known_pages_is_bounded() -> None:
    counting = Counting(patience=5)
    for number in range(MAX_PAGES):
        counting.take("hello", {"page": str(number)}, now=0)
    assert not counting.take("hello", {"page": "one more"}, now=0)
    assert counting.state["online"] == MAX_PAGES
