"""The same cycles as in `make soak`, for some seconds."""

from __future__ import annotations

from tests.soak.cycles import cycle, growth


def test_memory_stays_flat_over_clients_that_come_and_go() -> None:
    sizes = cycle(5000)
    print(sizes)
    # A leak of one session, some 10 kB, in each cycle would be 40 MB.
    assert growth(sizes) < 0.25, sizes
