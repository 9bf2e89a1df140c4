"""No client makes a command cost more than what it meets: instructions are counted, for a number and for twice as many.

An operation that meets twice as many subscribers, events or routes may take 2.3 times the instructions. One that has
nothing to do with what there is more of may take 1.2 times as many. callgrind counts them (see bench/instructions), so
the figures do not depend on who else uses the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import native
from bench.instructions.count import ENVIRON, MARKS, ROOT, missing_tool, read_dumps
from tests.faults.costs import CASES, Case

pytestmark = pytest.mark.needs("valgrind")

PROCESSES = 2
"""How many valgrinds run at one time."""

Counted = dict[str, dict[int, int]]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """The instructions of each case, by its name and size."""
    assert missing_tool() is None
    library = native.build("marks.so", MARKS, "-shared", "-fPIC")
    folder = tmp_path_factory.mktemp("callgrind")
    running = [start(library, [case.name for case in CASES[part::PROCESSES]], folder) for part in range(PROCESSES)]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said[-3000:]
    return read_dumps(path.read_text() for path in folder.glob("callgrind.out*"))


def start(library: Path, names: list[str], folder: Path) -> subprocess.Popen[str]:
    """Count some cases in a process of its own."""
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/callgrind.out.%p"]
    program = [sys.executable, "-m", "tests.faults.costs", str(library), *names]
    return subprocess.Popen(
        [*valgrind, *program], cwd=ROOT, env={**os.environ, **ENVIRON}, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cost_of_an_operation_grows_with_its_matches_only(case: Case, counted: Counted) -> None:
    once, twice = counted[case.name][case.size], counted[case.name][2 * case.size]
    ratio = twice / once
    assert ratio <= case.most, f"{case.about}: {once:,} instructions for {case.size}, {twice:,} for {2 * case.size}"
