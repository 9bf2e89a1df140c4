"""What was counted is compared with what was recorded before."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import msgspec

from broker import _speedups

RECORDED = Path(__file__).parent / "recorded.json"

TOLERANCE = 0.05
"""A case fails that has grown by more. Two runs of the same code differ by 0.1 % at most; but a change somewhere in the
one compiled unit may change what the compiler inlines elsewhere, and where memory happens to be free, which moved
single cases by 1 to 3 %. What is above is of somebody's making; what is below is far less than a rate could show."""

WIDER = {"read-fragments": 0.15, "read-pieces": 0.15}
"""Cases that need more. A message in fragments is put together by realloc, which copies or not, by what lies behind:
10 % between two builds, 5 % between two lists of arguments."""


class Record(msgspec.Struct, frozen=True):
    """Costs, in instructions of one operation, and what they hold for."""

    made_with: dict[str, str]
    costs: dict[str, float]


class Comparison(msgspec.Struct, frozen=True):
    """The names of the cases that have grown, shrunk, or are new or gone; `foreign` says why nothing is comparable."""

    grown: list[str]
    shrunk: list[str]
    unknown: list[str]
    foreign: str | None = None


def made_with() -> dict[str, str]:
    """What the counts depend on beside the code: with another of these nothing can be compared."""
    return {
        "machine": platform.machine(),
        "compiler": compiler(Path(_speedups.__file__).read_bytes()),
        "libc": " ".join(platform.libc_ver()),
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "python built with": _build_of_python(),
        "Cython": _version("Cython"),
        "msgspec": _version("msgspec"),
    }


def compiler(extension: bytes) -> str:
    """The compiler that built an ELF file, which says so in its .comment section."""
    found = re.search(rb"(?:GCC: |clang version )[\x20-\x7e]+", extension)
    return found[0].decode() if found else "unknown"


def _build_of_python() -> str:
    """Whether Python itself was optimised: the interpreter is a large part of the slow path."""
    options = sysconfig.get_config_var("CONFIG_ARGS") or ""
    return " ".join(sorted(set(re.findall(r"--(?:enable-optimizations|with-lto|enable-shared)\b", options)))) or "-"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def load(file: Path = RECORDED) -> Record | None:
    """What was recorded; None if nothing was."""
    return msgspec.json.decode(file.read_bytes(), type=Record) if file.exists() else None


def save(record: Record, file: Path) -> None:
    """Writes a record, for people too."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def compare(recorded: Record, now: Record) -> Comparison:
    """Compares case by case. A case that only one of the two has is `unknown`: it is to be recorded."""
    if differences := [
        f"{name} {recorded.made_with.get(name, '-')}, here {now.made_with.get(name, '-')}"
        for name in sorted({*recorded.made_with, *now.made_with})
        if recorded.made_with.get(name) != now.made_with.get(name)
    ]:
        return Comparison([], [], [], f"recorded with {'; '.join(differences)}")
    both = [name for name in now.costs if name in recorded.costs]
    return Comparison(
        grown=[name for name in both if now.costs[name] > recorded.costs[name] * (1 + WIDER.get(name, TOLERANCE))],
        shrunk=[name for name in both if now.costs[name] < recorded.costs[name] * (1 - WIDER.get(name, TOLERANCE))],
        unknown=sorted({*recorded.costs, *now.costs} - {*both}),
    )


def show(about: Mapping[str, str], recorded: Record | None, now: Record) -> str:
    """A table of all cases, beside what was recorded of them. `about` says of each what one operation is."""
    lines = [f"{'instructions of one operation':70} {'now':>12} {'recorded':>12} {'change':>8}"]
    for name, cost in now.costs.items():
        before = recorded.costs.get(name) if recorded else None
        beside = f"{before:12,.2f} {cost / before - 1:+8.1%}" if before else ""
        lines.append(f"{name:<16} {about[name]:53} {cost:12,.2f} {beside}".rstrip())
    return "\n".join(lines)
