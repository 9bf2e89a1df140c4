"""Counting instructions: what callgrind wrote is read, compared with what was recorded, and judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.instructions import record
from bench.instructions.__main__ import verdict
from bench.instructions.cases import CASES, Case
from bench.instructions.count import CountError, costs, count, missing_tool, read_dumps
from bench.instructions.record import Comparison, Record

pytestmark = pytest.mark.needs("valgrind")

ROOT = Path(__file__).parent.parent.parent
TOOLS = {"compiler": "gcc 12", "python": "3.11.7"}


def dump(trigger: str, total: int) -> str:
    """As much of a file of callgrind's as is read."""
    return f"# callgrind format\nversion: 1\ndesc: Trigger: {trigger}\n\nevents: Ir\nfn=(1) f\n1 2\n\ntotals: {total}\n"


def case(name: str, operations: int = 1, rounds: int = 10) -> Case:
    return Case(name, "do it", operations, rounds, lambda: list)


def test_reads_the_count_at_each_mark() -> None:
    dumps = [
        dump("Client Request: start", 10),
        dump("Client Request: fast 5", 700),
        dump("Client Request: fast 10", 1200),
        dump("Client Request: slow 5", 90_000),
        dump("Program termination", 12),
    ]
    assert read_dumps(dumps) == {"fast": {5: 700, 10: 1200}, "slow": {5: 90_000}}


def test_constant_cost_is_subtracted() -> None:
    counted = {"fast": {10: 1000 + 10 * 300, 20: 1000 + 20 * 300}}
    assert costs([case("fast")], counted) == {"fast": 300.0}
    assert costs([case("fast", operations=64)], counted) == {"fast": 4.69}


@pytest.mark.parametrize("counted", [{}, {"fast": {10: 100}}, {"fast": {20: 100}}])
def test_case_without_counts_is_an_error(counted: dict[str, dict[int, int]]) -> None:
    with pytest.raises(CountError, match="nothing of fast"):
        costs([case("fast")], counted)


def test_growth_is_reported_beyond_the_tolerance_only() -> None:
    before = Record(TOOLS, {"a": 100.0, "b": 100.0, "c": 100.0, "d": 100.0, "read-fragments": 100.0})
    now = Record(TOOLS, {"a": 105.0, "b": 105.1, "c": 94.9, "d": 95.0, "read-fragments": 114.0})
    assert record.compare(before, now) == Comparison(grown=["b"], shrunk=["c"], unknown=[])


def test_cases_of_only_one_side_are_reported() -> None:
    before = Record(TOOLS, {"a": 100.0, "gone": 1.0})
    assert record.compare(before, Record(TOOLS, {"a": 100.0, "new": 1.0})).unknown == ["gone", "new"]


def test_counts_of_other_tool_versions_are_not_compared() -> None:
    found = record.compare(Record(TOOLS, {"a": 1.0}), Record({**TOOLS, "compiler": "gcc 13"}, {"a": 9.0}))
    assert found == Comparison([], [], [], "recorded with compiler gcc 12, here gcc 13")


@pytest.mark.parametrize(
    ("comparison", "status", "said"),
    [
        (Comparison([], [], []), 0, ""),
        (Comparison(["fast"], [], []), 1, "grown beyond tolerance (5%): fast"),
        (Comparison([], ["fast"], []), 0, "cheaper than recorded: fast"),
        (Comparison([], [], ["new"]), 1, "(new): record them"),
        (Comparison([], [], [], "recorded with gcc 12"), 2, "not comparable: recorded with gcc 12"),
    ],
)
def test_verdict_states_the_result(
    comparison: Comparison, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(comparison) == status
    assert said in "".join(capsys.readouterr())


def test_record_round_trips(tmp_path: Path) -> None:
    written = Record(record.made_with(), {"fast": 2960.2})
    record.save(written, tmp_path / "recorded.json")
    assert record.load(tmp_path / "recorded.json") == written
    assert record.load(tmp_path / "none.json") is None


def test_knows_which_compiler_built_the_extension() -> None:
    assert record.compiler(b"\x7fELF..\0GCC: (Debian 12.2.0-14) 12.2.0\0.data") == "GCC: (Debian 12.2.0-14) 12.2.0"
    assert record.compiler(b"nothing") == "unknown"
    assert record.made_with()["compiler"] != "unknown"


def test_record_has_every_case() -> None:
    recorded = record.load()
    assert recorded is not None
    assert list(recorded.costs) == [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_repeatable(case: Case) -> None:
    run = case.make()
    for _ in range(3):
        run()


def test_instructions_are_counted() -> None:
    """Two cases of which it is known how they compare: the same work, and 128 times as much of it."""
    assert missing_tool() is None
    found = count([case for case in CASES if case.name in ("unmask-128", "unmask-16k")])
    assert found["unmask-128"] < found["unmask-16k"]
    # 16 kB take at least an instruction for each of the widest words that x86-64 is sure to have.
    assert found["unmask-16k"] - found["unmask-128"] > (16_384 - 128) / 16


def test_a_case_that_does_not_exist_is_refused() -> None:
    command = [sys.executable, "-m", "bench.instructions", "sideways"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no such case: sideways" in ended.stderr
