"""The counter's knowledge: values and pages, without a broker."""

from __future__ import annotations

import pytest

from examples.counter.counting import MAX_NAME, MAX_PAGES, Counting


def test_counter_counts_up_and_down() -> None:
    counting = Counting(timeout=5)
    assert counting.handle("add", {"page": "a", "by": 1}, now=0)
    assert counting.handle("add", {"page": "a", "by": 1}, now=0)
    assert counting.handle("add", {"page": "a", "by": -1}, now=0)
    assert counting.state == {"value": 1, "online": 1}


def test_hello_is_answered_with_the_state() -> None:
    counting = Counting(timeout=5)
    assert counting.handle("hello", {"page": "a"}, now=0)
    assert counting.handle("hello", {"page": "a"}, now=1)
    assert counting.state["online"] == 1


def test_roll_call_answer_is_announced_only_for_an_unknown_page() -> None:
    counting = Counting(timeout=5)
    assert counting.handle("here", {"page": "a"}, now=0)
    assert not counting.handle("here", {"page": "a"}, now=1)


def test_bye_removes_the_page() -> None:
    counting = Counting(timeout=5)
    counting.handle("hello", {"page": "a"}, now=0)
    assert counting.handle("bye", {"page": "a"}, now=1)
    assert not counting.handle("bye", {"page": "a"}, now=1)
    assert counting.state["online"] == 0


def test_silent_page_is_removed() -> None:
    counting = Counting(timeout=5)
    counting.handle("hello", {"page": "a"}, now=0)
    counting.handle("hello", {"page": "b"}, now=3)
    assert not counting.remove_silent(now=5)
    assert counting.remove_silent(now=6)
    assert counting.state["online"] == 1
    assert counting.remove_silent(now=9)
    assert counting.state["online"] == 0


def test_broker_outage_removes_no_page() -> None:
    counting = Counting(timeout=5)
    counting.handle("hello", {"page": "a"}, now=0)
    counting.reset_timeouts(now=100)
    assert not counting.remove_silent(now=105)
    assert counting.remove_silent(now=106)


@pytest.mark.parametrize(
    "data", [None, 1, "page", [], {}, {"page": 1}, {"page": ""}, {"page": "x" * (MAX_NAME + 1)}, {"by": 1}]
)
def test_invalid_event_is_ignored(data: object) -> None:
    counting = Counting(timeout=5)
    assert not counting.handle("add", data, now=0)
    assert counting.state == {"value": 0, "online": 0}


@pytest.mark.parametrize("by", [None, 0, 2, -2, 1.5, "1", [1]])
def test_step_other_than_one_is_ignored(by: object) -> None:
    counting = Counting(timeout=5)
    counting.handle("add", {"page": "a", "by": by}, now=0)
    assert counting.state["value"] == 0


def test_number_of_known_pages_is_bounded() -> None:
    counting = Counting(timeout=5)
    for number in range(MAX_PAGES):
        counting.handle("hello", {"page": str(number)}, now=0)
    assert not counting.handle("hello", {"page": "one more"}, now=0)
    assert counting.state["online"] == MAX_PAGES
