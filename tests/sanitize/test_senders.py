"""The threads that send (_speedups/senders.h), in a program of their own, built with gcc's ThreadSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.sanitize.build import ROOT

PROGRAM = Path(__file__).with_name("senders.c")
HEADER = ROOT / "_speedups" / "senders.h"
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fsanitize=thread", "-pthread")


def build(folder: Path, header: str) -> Path:
    """Build the program in `folder` with this text of the header."""
    (folder / HEADER.name).write_text(header)
    program = folder / "senders"
    subprocess.run(["gcc", *FLAGS, f"-I{folder}", str(PROGRAM), "-o", str(program)], check=True)
    return program


def run(program: Path, rounds: int, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(rounds), str(seed)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_threads_send_all_and_do_not_race(tmp_path: Path, seed: int) -> None:
    done = run(build(tmp_path, HEADER.read_text()), 1000, seed)
    assert done.stderr == ""
    assert done.returncode == 0


FAULTS = {
    "the run ends before its threads": ("while (senders->inside > 0)", "while (0)"),
    "two threads take the same jobs": (
        "atomic_fetch_add_explicit(&senders->next, SENDERS_CHUNK, memory_order_relaxed)",
        "(senders->next += SENDERS_CHUNK / 2) - SENDERS_CHUNK / 2",
    ),
    "a thread joins without the lock": (
        "        seen = senders->run;\n        senders->inside++;\n        pthread_mutex_unlock(&senders->lock);",
        "        pthread_mutex_unlock(&senders->lock);\n        seen = senders->run;\n        senders->inside++;",
    ),
    "the first part is left out": (
        "message.msg_iovlen = job->parts;",
        "message.msg_iovlen = 1; message.msg_iov++;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    header, (right, wrong) = HEADER.read_text(), FAULTS[fault]
    assert header.count(right) == 1
    assert run(build(tmp_path, header.replace(right, wrong)), 1000, 1).returncode != 0
