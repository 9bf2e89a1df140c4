"""The program that runs under callgrind: does the rounds of each case, with a mark after each that says what was done.

    python -m bench.instructions.program LIBRARY CASE…

LIBRARY is marks.c compiled. A mark is named "CASE ROUNDS".
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from itertools import repeat

from bench.instructions.cases import CASES, Case
from broker.config import Config
from broker.log import set_up_log


def main() -> int:
    library = ctypes.CDLL(sys.argv[1])
    if not library.marks_heard():
        print("this program is to be run by valgrind", file=sys.stderr)
        return 1
    # The log as the broker has it: without this, each connection would be written to it.
    set_up_log(Config().log)
    # When the collector runs depends on all that was allocated before; what it does is not of the case.
    gc.disable()
    for case in CASES:
        # Each in a process of its own, which inherits what was imported: where memory is free, and so what malloc and
        # realloc have to do, is then nothing that another case has left behind.
        if case.name not in sys.argv[2:]:
            continue
        child = os.fork()
        if child == 0:
            count(case, library)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            print(f"{case.name} failed", file=sys.stderr)
            return 1
    return 0


def count(case: Case, library: ctypes.CDLL) -> None:
    run = case.make()
    # Caches fill, buffers grow, Python specialises its bytecode.
    for _ in repeat(None, max(case.rounds, 20)):
        run()
    library.marks_start()
    library.marks_dump(b"start")
    for rounds in (case.rounds, 2 * case.rounds):
        for _ in repeat(None, rounds):
            run()
        library.marks_dump(f"{case.name} {rounds}".encode())
    library.marks_stop()


if __name__ == "__main__":
    sys.exit(main())
