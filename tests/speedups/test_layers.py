"""The files of the native core are layers: each uses only names of the files above it. None is long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "_speedups"

MAX_LINES = 350
MAX_FUNCTION = 60

DEFINITION = re.compile(
    r"^(?:cdef (?:inline )?class (?P<klass>\w+)"
    r"|cdef struct (?P<struct>\w+)"
    r"|(?:cdef |def )(?:[\w\[\]*. ]+?[ *])??(?P<function>\w+)\("
    r"|cdef [\w* ]+? (?P<variable>\w+)(?:\[\w+\])?(?: =.*)?$"
    r"|(?P<table>[A-Z]\w+) = )",
    re.MULTILINE,
)
CONSTANT = re.compile(r"^    (?P<name>[A-Z][A-Z0-9_]+) = -?\w+", re.MULTILINE)
ENUM = re.compile(r"^cdef enum:\n((?:    .*\n|\n)+)", re.MULTILINE)
NAME = re.compile(r"(?<![.\w])[A-Za-z_]\w*")
NOISE = re.compile(r'""".*?"""|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|#[^\n]*', re.DOTALL)
FUNCTION = re.compile(r"^(?P<indent> *)(?:cdef|def|class) [^\n]*?(?P<name>\w+)\(")


def included() -> list[str]:
    """The names of the included files, from the top to the bottom."""
    return re.findall(r'^include "(\w+)\.pxi"$', (SOURCES / "speedups.pyx").read_text(), re.MULTILINE)


def defined(source: str) -> set[str]:
    """The names that a file defines."""
    found = {name for match in DEFINITION.finditer(source) for name in match.groups() if name}
    for enum in ENUM.findall(source):
        found.update(CONSTANT.findall(enum))
    return found


def used(source: str) -> set[str]:
    """The names that a file uses, but for attributes."""
    return set(NAME.findall(NOISE.sub(" ", source)))


def offences(sources: dict[str, str]) -> list[str]:
    """Each name that a file uses though it is defined in a file below. `sources` are in their order."""
    order = list(sources)
    owner: dict[str, str] = {}
    for file in order:
        for name in defined(sources[file]):
            owner.setdefault(name, file)
    return [
        f"{file} uses {name} of {owner[name]}"
        for place, file in enumerate(order)
        for name in sorted(used(sources[file]) & owner.keys())
        if order.index(owner[name]) > place
    ]


def functions(source: str) -> dict[str, int]:
    """The functions of a file and how many lines each has."""
    lines = source.split("\n")
    found: dict[str, int] = {}
    for number, line in enumerate(lines):
        match = FUNCTION.match(line)
        if match is None:
            continue
        last = number
        # The end of the head, then all that is indented deeper.
        while last < len(lines) and not lines[last].rstrip().endswith(":"):
            last += 1
        end = last
        for below in range(last + 1, len(lines)):
            if lines[below].strip() == "":
                continue
            if len(lines[below]) - len(lines[below].lstrip()) <= len(match["indent"]):
                break
            end = below
        found[match["name"]] = end - number + 1
    return found


def read() -> dict[str, str]:
    return {name: (SOURCES / f"{name}.pxi").read_text() for name in included()}


def test_every_file_is_included_once() -> None:
    assert sorted(included()) == sorted(path.stem for path in SOURCES.glob("*.pxi"))


def test_a_file_uses_only_names_of_the_files_above_it() -> None:
    assert offences(read()) == []


def test_the_names_of_the_core_are_found() -> None:
    sources = read()
    for file, names in {
        "list": {"Link", "append", "reserve"},
        "states": {"LIVE", "CLOSED", "SUBSCRIPTION_TRANSITIONS", "check_transition"},
        "subscription": {"Outbox", "SubscriptionBase", "set_state", "ask_close", "UNLIMITED"},
        "writer": {"send_waiting", "send_pieces"},
        "connection": {"Connection"},
        "loop_state": {"LoopState", "WRITE_TIME", "Limits"},
        "wire": {"frame", "OP_TEXT"},
    }.items():
        assert names <= defined(sources[file])


@pytest.mark.parametrize(
    ("upper", "lower"),
    [
        ("cdef int queue(x):\n    return send(x)\n", "cdef int send(int x) except -1:\n    return x\n"),
        ("cdef class Queue:\n    cdef Connection owner\n", "cdef class Connection(Queue):\n    pass\n"),
        ("cdef int f():\n    return CLOSED\n", "cdef enum:\n    CLOSED = 3\n"),
        ("cdef void g(Piece* piece):\n    pass\n", "cdef struct Piece:\n    int kind\n"),
    ],
)
def test_a_name_of_a_lower_file_is_found(upper: str, lower: str) -> None:
    assert len(offences({"upper": upper, "lower": lower})) == 1


def test_only_the_writer_sends() -> None:
    for name, source in read().items():
        if name != "writer":
            assert not {"send", "sendmsg"} & used(source), name


@pytest.mark.parametrize("name", included())
def test_a_file_is_short_and_begins_with_its_purpose_and_its_invariant(name: str) -> None:
    source = (SOURCES / f"{name}.pxi").read_text()
    assert len(source.split("\n")) <= MAX_LINES + 1
    assert re.match(r"# [A-Z][^\n]+\n(?:# [^\n]+\n)*#\n# Invariant: ", source), "its caption"
    long = {function: lines for function, lines in functions(source).items() if lines > MAX_FUNCTION}
    # A class is as long as its methods.
    assert {function for function in long if not re.search(rf"class {function}\(", source)} == set()
