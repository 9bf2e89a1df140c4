"""The counter's knowledge: values and pages, without a broker."""

from __future__ import annotations

import pytest

from examples.counter.counting import MAX_NAME, MAX_PAGES, Counting


def test_it_counts_up_and_down() -> None:
    counting = Counting(patience=5)
    assert counting.take("add", {"page": "a", "by": 1}, now=0)
    assert counting.take("add", {"page": "a", "by": 1}, now=0)
    assert counting.take("add", {"page": "a", "by": -1}, now=0)
    assert counting.state == {"value": 1, "online": 1}


def test_a_page_that_says_hello_is_always_told_the_state() -> None:
    counting = Counting(patience=5)
    assert counting.take("hello", {"page": "a"}, now=0)
    assert counting.take("hello", {"page": "a"}, now=1)
    assert counting.state["online"] == 1


def test_the_answer_to_a_roll_call_is_news_only_from_a_page_that_was_not_known() -> None:
    counting = Counting(patience=5)
    assert counting.take("here", {"page": "a"}, now=0)
    assert not counting.take("here", {"page": "a"}, now=1)


def test_a_page_that_says_bye_is_gone() -> None:
    counting = Counting(patience=5)
    counting.take("hello", {"page": "a"}, now=0)
    assert counting.take("bye", {"page": "a"}, now=1)
    assert not counting.take("bye", {"page": "a"}, now=1)
    assert counting.state["online"] == 0


def test_who_is_silent_for_too_long_is_struck_off() -> None:
    counting = Counting(patience=5)
    counting.take("hello", {"page": "a"}, now=0)
    counting.take("hello", {"page": "b"}, now=3)
    assert not counting.strike_off(now=5)
    assert counting.strike_off(now=6)
    assert counting.state["online"] == 1
    assert counting.strike_off(now=9)
    assert counting.state["online"] == 0


def test_nobody_is_struck_off_for_a_silence_of_the_broker() -> None:
    counting = Counting(patience=5)
    counting.take("hello", {"page": "a"}, now=0)
    counting.forgive(now=100)
    assert not counting.strike_off(now=105)
    assert counting.strike_off(now=106)


@pytest.mark.parametrize(
    "data", [None, 1, "page", [], {}, {"page": 1}, {"page": ""}, {"page": "x" * (MAX_NAME + 1)}, {"by": 1}]
)
def test_what_makes_no_sense_is_passed_over(data: object) -> None:
    counting = Counting(patience=5)
    assert not counting.take("add", data, now=0)
    assert counting.state == {"value": 0, "online": 0}


@pytest.mark.parametrize("by", [None, 0, 2, -2, 1.5, "1", [1]])
def test_it_counts_by_one_only(by: object) -> None:
    counting = Counting(patience=5)
    counting.take("add", {"page": "a", "by": by}, now=0)
    assert counting.state["value"] == 0


def test_it_remembers_only_so_many_pages() -> None:
    counting = Counting(patience=5)
    for number in range(MAX_PAGES):
        counting.take("hello", {"page": str(number)}, now=0)
    assert not counting.take("hello", {"page": "one more"}, now=0)
    assert counting.state["online"] == MAX_PAGES
