"""Runs the cases under callgrind and reads what it counted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench import native
from bench.instructions.cases import CASES, Case

ROOT = Path(__file__).parent.parent.parent
MARKS = Path(__file__).parent / "marks.c"
HEADER = "valgrind/callgrind.h"

# The C library chooses its memcpy and the like by the processor. So that every machine counts the same, it is told to
# see no more than what every x86-64 has.
HIDDEN = "AVX AVX2 AVX512F AVX512VL AVX512BW AVX_Fast_Unaligned_Load BMI2 ERMS FSRM MOVBE SSSE3 SSE4_1 SSE4_2"

ENVIRON = {
    # The order of sets and the collisions of dicts are the same in each run.
    "PYTHONHASHSEED": "0",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in HIDDEN.split()),
}


class CountError(Exception):
    """There is no valgrind, or the program failed under it; the text says why."""


def count(cases: Sequence[Case] = CASES, keep: Path | None = None) -> dict[str, float]:
    """Instructions of one operation, for each case by its name. Raises CountError, BuildError.

    `keep` is a folder for callgrind's files, of which callgrind_annotate shows where the instructions are.
    """
    if missing := missing_tool():
        raise CountError(missing)
    library = native.build("marks.so", MARKS, "-shared", "-fPIC")
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        _run(library, cases, folder)
        return costs(cases, read_dumps(path.read_text() for path in folder.glob("callgrind.out*")))


def missing_tool() -> str | None:
    """Why nothing can be counted here; None if it can."""
    if shutil.which("valgrind") is None or not Path("/usr/include", HEADER).exists():
        return "counting instructions needs valgrind and its headers (Debian: apt install valgrind)"
    return None


def _run(library: Path, cases: Sequence[Case], folder: Path) -> None:
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/callgrind.out.%p"]
    program = [sys.executable, "-m", "bench.instructions.program", str(library), *(case.name for case in cases)]
    ended = subprocess.run(
        [*valgrind, *program], cwd=ROOT, env={**os.environ, **ENVIRON}, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        raise CountError(f"the cases failed under valgrind (exit status {ended.returncode}):\n{ended.stderr[-2000:]}")


_TRIGGER = re.compile(r"^desc: Trigger: Client Request: (\S+) (\d+)$", re.MULTILINE)
_TOTAL = re.compile(r"^totals: (\d+)$", re.MULTILINE)


def read_dumps(dumps: Iterable[str]) -> dict[str, dict[int, int]]:
    """What callgrind's files say: for each case, the instructions of so many rounds. Other files are passed over."""
    found: dict[str, dict[int, int]] = {}
    for dump in dumps:
        trigger, total = _TRIGGER.search(dump), _TOTAL.search(dump)
        if trigger and total:
            found.setdefault(trigger[1], {})[int(trigger[2])] = int(total[1])
    return found


def costs(cases: Iterable[Case], counted: Mapping[str, Mapping[int, int]]) -> dict[str, float]:
    """Instructions of one operation: what twice the rounds take more than once the rounds. Raises CountError."""
    found = {}
    for case in cases:
        rounds = counted.get(case.name, {})
        if case.rounds not in rounds or 2 * case.rounds not in rounds:
            raise CountError(f"callgrind wrote nothing of {case.name}")
        found[case.name] = round((rounds[2 * case.rounds] - rounds[case.rounds]) / case.rounds / case.operations, 2)
    return found
