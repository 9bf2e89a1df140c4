"""From many runs to a few figures: medians, ratios, a table for the terminal, JSON for the record."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.measure import DISTURBED, ROOT, Load, Published, Run, load_core, server_core
from bench.peers import Peer

RESULTS = Path(__file__).parent / "results"
# Above this the load program may be what limits the rate.
LOAD_BOUND = 0.9


@dataclass(frozen=True)
class Figure:
    """The median of some repetitions, and how far they lie apart: half of the range, as a share of the median."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Takes the values of all repetitions, at least one."""
        median = statistics.median(values)
        return cls(median, (max(values) - min(values)) / 2 / median if median else 0.0)


def figure(runs: Sequence[Run[Any]], load: Load[Any], peer: Peer, value: Callable[[Any], float]) -> Figure | None:
    """The figure of one peer under one load; None if it was not measured."""
    values = [value(run.result) for run in runs if run.peer is peer and run.load == load]
    return Figure.of(values) if values else None


def ratio(
    runs: Sequence[Run[Any]], load: Load[Any], peer: Peer, other: Peer, value: Callable[[Any], float]
) -> Figure | None:
    """How many times the other peer's value this peer has, run by run as they took turns."""
    mine = [value(run.result) for run in runs if run.peer is peer and run.load == load]
    others = [value(run.result) for run in runs if run.peer is other and run.load == load]
    ratios = [a / b for a, b in zip(mine, others, strict=False) if b]
    return Figure.of(ratios) if ratios else None


PUBLISHING_HEADINGS = ("deliveries/s", "spread", "µs each", "server CPU", "load CPU", "done p50", "p99")


def publishing_row(
    runs: Sequence[Run[Published]], load: Load[Published], peer: Peer, others: Sequence[Peer]
) -> list[str]:
    """The cells below PUBLISHING_HEADINGS, and one with the ratio to each of the others.

    "µs each" is the server's CPU time for a delivery; "done" is how long a publish was under way.
    """
    found = figure(runs, load, peer, deliveries)
    if found is None:
        return ["-"] * (len(PUBLISHING_HEADINGS) + len(others))
    medians = [
        statistics.median(value(run.result) for run in runs if run.peer is peer and run.load == load)
        for value in _MEDIANS
    ]
    each, server, own, p50, p99 = medians
    ratios = [ratio(runs, load, peer, other, deliveries) for other in others]
    return [
        rate(found.median),
        f"±{found.spread:.0%}",
        f"{each:.2f}",
        f"{server:.0%}",
        f"{own:.0%}",
        _duration(p50),
        _duration(p99),
        *(f"{times.median:.2f}" if times else "" for times in ratios),
    ]


_MEDIANS: Sequence[Callable[[Published], float]] = (
    lambda result: result.server_us_per_delivery,
    lambda result: result.server_cpu,
    lambda result: result.load_cpu,
    lambda result: result.done_us.p50,
    lambda result: result.done_us.p99,
)


def deliveries(result: Published) -> float:
    """What throughput is compared by."""
    return result.deliveries_per_second


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.1f} ms" if microseconds >= 1000 else f"{microseconds:.0f} µs"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others, which are numbers, to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = []
    for row in [headings, *rows]:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]).rstrip())
    return "\n".join(lines)


def remarks(runs: Sequence[Run[Any]]) -> list[str]:
    """What a reader of the figures should know about how they came about."""
    found = []
    bound = [run for run in runs if run.result.load_cpu > LOAD_BOUND]
    if bound:
        names = ", ".join(sorted({run.peer.name for run in bound}))
        found.append(f"In {len(bound)} of {len(runs)} runs ({names}) the load program was busy all the time.")
    disturbed = [run for run in runs if run.result.other_cpu > DISTURBED]
    if disturbed:
        found.append(
            f"In {len(disturbed)} of {len(runs)} runs other programs used more than {DISTURBED:.0%} of a core: "
            "these figures do not count for much."
        )
    if server_core() == load_core():
        found.append("Server and load had to share the only core.")
    return found


def save(scenario: str, runs: Sequence[Run[Any]], file: Path | None) -> None:
    """Writes all runs, with the command, the machine and the versions, as JSON: by default to bench/results/."""
    file = file or RESULTS / f"{scenario}.json"
    document = {
        "scenario": scenario,
        "command": shlex.join(["python", "-m", f"bench.{scenario}", *sys.argv[1:]]),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "runs": [{"peer": run.peer.name, "load": run.load, "result": run.result} for run in runs],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
        "tcp": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {}
    for name in ("websockets", "uvloop", "msgspec"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        command = ["git", "describe", "--always", "--dirty"]
        found["wsbroker"] = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["wsbroker"] = "unknown"
    return found


def rate(value: float) -> str:
    """A rate in three digits: 216 k, 3.05 M."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{value:.0f}"
