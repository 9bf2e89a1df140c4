"""The program that runs under callgrind: does the rounds of each case, with a mark after each that says what was done.

    python -m bench.instructions.program LIBRARY CASE…

LIBRARY is marks.c compiled. A mark is named "CASE ROUNDS".
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from itertools import repeat

from bench.instructions.cases import CASES, Case
from broker.config import Config
from broker.daemon import set_up_log


def main() -> int:
    library = ctypes.CDLL(sys.argv[1])
    if not library.marks_heard():
        print("this program is to be run by valgrind", file=sys.stderr)
        return 1
    cases = [case for case in CASES if case.name in sys.argv[2:]]
    # The log as the broker has it: without this, each connection would be written to it.
    set_up_log(Config().log)
    # When the collector runs depends on all that was allocated before; what it does is not of the case.
    gc.disable()
    for case in cases:
        count(case, library.marks_start, library.marks_dump)
        library.marks_stop()
    return 0


def count(case: Case, start: Callable[[], object], dump: Callable[[bytes], object]) -> None:
    run = case.make()
    # Caches fill, buffers grow, Python specialises its bytecode.
    for _ in repeat(None, max(case.rounds, 20)):
        run()
    start()
    dump(b"start")
    for rounds in (case.rounds, 2 * case.rounds):
        for _ in repeat(None, rounds):
            run()
        dump(f"{case.name} {rounds}".encode())


if __name__ == "__main__":
    sys.exit(main())
