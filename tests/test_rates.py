"""How often something may happen for each key."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker import rates
from broker.rates import Rates


def test_burst_and_then_the_rate() -> None:
    limited = Rates(2, 3)
    assert [limited.take("a", 10) for _ in range(4)] == [0, 0, 0, 0.5]
    assert limited.take("b", 10) == 0
    assert limited.take("a", 10.5) == 0
    assert limited.take("a", 10.5) == 0.5
    assert [limited.take("a", 1000) for _ in range(4)] == [0, 0, 0, 0.5]


def test_memory_is_bounded() -> None:
    limited = Rates(1, 1)
    for number in range(rates.MOST + 10):
        limited.take(number, 0)
    assert len(limited) == rates.MOST
    assert limited.take(rates.MOST + 9, 0) > 0
    assert limited.take(0, 0) == 0, "it was forgotten"


STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 10)), max_size=200)


@given(STEPS, st.floats(0.1, 10), st.integers(1, 5))
def test_no_key_ever_has_more_than_burst_and_rate(steps: list[tuple[str, float]], rate: float, burst: int) -> None:
    limited, now, taken = Rates(rate, burst), 0.0, {"a": 0, "b": 0}
    for key, passed in steps:
        now += passed
        wait = limited.take(key, now)
        taken[key] += wait == 0
        assert taken[key] <= burst + rate * now + 1e-6
        if wait:
            assert limited.take(key, now + wait + 1e-9) == 0
            taken[key] += 1
            now += wait + 1e-9
