"""The arithmetic of the load program, compared with Python's, and what it reads of the kernel; compiled by itself."""

import math
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench import native

Part = Callable[..., list[int]]
THOUSANDTHS = (500, 900, 990, 999, 1000)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """Runs one of the parts with these arguments, and what is said to it: the numbers that it prints."""
    with pytest.MonkeyPatch.context() as patch:
        # Always compiled afresh: what it includes is not looked at for changes.
        patch.setattr(native, "BUILD", tmp_path_factory.mktemp("build"))
        program = native.build("load_parts", Path(__file__).parent / "load_parts.c", "-pthread")

    def run(*arguments: object, said: str = "") -> list[int]:
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(command, input=said, capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    return run


def percentile(values: Sequence[int], thousandths: int) -> int:
    """The smallest value that so many do not exceed."""
    return sorted(values)[math.ceil(len(values) * thousandths / 1000) - 1]


def sets() -> list[list[int]]:
    """Values of every magnitude: few and many, close together and far apart, and those at the edges of buckets."""
    chosen = random.Random(3)
    found = [[0], [127], [128], [2**63], [1, 2], list(range(129)), [2**n + d for n in range(1, 63) for d in (-1, 0, 1)]]
    for count in (1, 2, 9, 10, 11, 99, 100, 101, 160, 1000, 1001, 3000):
        top = chosen.choice([100, 1000, 10**6, 10**9, 10**12])
        found.append([chosen.randrange(top) for _ in range(count)])
        found.append([int(chosen.lognormvariate(math.log(1e6), 2)) for _ in range(count)])
    return found


@pytest.mark.parametrize("values", sets(), ids=lambda values: f"{len(values)} up to {max(values)}")
def test_a_percentile_is_that_of_the_sorted_values(part: Part, values: list[int]) -> None:
    *found, most = part("percentiles", *THOUSANDTHS, said=" ".join(map(str, values)))
    assert most == max(values)
    for thousandths, given in zip(THOUSANDTHS, found, strict=True):
        exact = percentile(values, thousandths)
        assert exact <= given <= most
        assert given == exact if exact < 128 else given < exact * (1 + 1 / 64)


def test_empty_histogram_has_no_percentiles(part: Part) -> None:
    assert part("percentiles", *THOUSANDTHS) == [0] * 6


def test_p99_of_160_values_is_the_159th(part: Part) -> None:
    values = " ".join(str(number if number < 100 else number // 2 + 50) for number in range(160))
    exact = sorted(map(int, values.split()))[158]
    assert part("percentiles", 990, said=values)[0] == exact


def test_stolen_time_is_busy_time(part: Part) -> None:
    # user, nice, system, idle, iowait, irq, softirq, steal, guest (which is in user), guest_nice
    assert part("ticks", said="cpu  1000 200 30 4444444 555555 6 7 80000 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n") == [81243]
    assert part("ticks", said="nothing of the kind\n") == [0]


def test_cpu_time_of_ended_threads_counts(part: Part) -> None:
    (used,) = part("thread", 30_000_000)
    assert used >= 30_000_000
