"""From many runs to a few figures: medians, spreads, ratios, and how they are written."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from bench.measure import Load, Opened, Published, Publishing, Result

# Above this the load program may be what limits the rate.
LOAD_BOUND = 0.9
# Above this much CPU used by other programs, of one core, a run is called disturbed.
DISTURBED = 0.1

# What is read from a result. A scenario's results are all of the one kind that its loads give.
Value = Callable[[Any], float]


class Run(msgspec.Struct, frozen=True):
    """One measurement: of which peer (by its name), under which load, with which result."""

    peer: str
    load: Load
    result: Result
    repetition: int = 0
    """Those of the same number followed each other, and are compared with each other."""

    @property
    def disturbed(self) -> bool:
        """Whether other programs were busy meanwhile."""
        return self.result.other_cpu > DISTURBED

    @property
    def load_bound(self) -> bool:
        """Whether it was the load program that was busy all the time."""
        return self.result.load_cpu > LOAD_BOUND


def run_of(peer: str, load: Load, result: bytes, repetition: int) -> Run:
    """A run as it was saved; the load says what the result is."""
    if isinstance(load, Publishing):
        return Run(peer, load, msgspec.json.decode(result, type=Published), repetition)
    return Run(peer, load, msgspec.json.decode(result, type=Opened), repetition)


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


def figure(runs: Sequence[Run], load: Load, peer: str, value: Value) -> Figure | None:
    """The figure of one peer under one load; None if it was not measured."""
    values = [value(run.result) for run in _of(runs, load, peer)]
    return Figure.of(values) if values else None


def pairs(runs: Sequence[Run], load: Load, peer: str, other: str) -> list[tuple[Run, Run]]:
    """The runs of two peers that followed each other. Where one of them failed, there is no pair."""
    mine, others = ({run.repetition: run for run in _of(runs, load, name)} for name in (peer, other))
    return [(run, others[number]) for number, run in mine.items() if number in others]


def ratio(runs: Sequence[Run], load: Load, peer: str, other: str, value: Value) -> Figure | None:
    """How many times the other peer's value this peer has, run by run as they took turns."""
    found = [(value(mine.result), value(others.result)) for mine, others in pairs(runs, load, peer, other)]
    ratios = [mine / others for mine, others in found if others]
    return Figure.of(ratios) if ratios else None


def _of(runs: Sequence[Run], load: Load, peer: str) -> list[Run]:
    return [run for run in runs if run.peer == peer and run.load == load]


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader of the figures should know about how they came about: which runs were bound by the load program,
    and which were disturbed."""
    found = []
    for text, chosen in (
        (f"the load program was busy for more than {LOAD_BOUND:.0%} of the time", [each.load_bound for each in runs]),
        (f"other programs used more than {DISTURBED:.0%} of a core", [each.disturbed for each in runs]),
    ):
        which = [run for run, is_chosen in zip(runs, chosen, strict=True) if is_chosen]
        if len(which) == len(runs) > 1:
            found.append(f"In all {len(runs)} runs {text}.")
        elif which:
            at: dict[str, list[str]] = {}
            for run in which:
                at.setdefault(str(run.load), []).append(run.peer)
            names = "; ".join(f"{load} ({', '.join(dict.fromkeys(peers))})" for load, peers in at.items())
            found.append(f"In {len(which)} of {len(runs)} runs {text}: {names}.")
    return found


def rate(value: float) -> str:
    """A rate in three digits: 216 k, 3.05 M."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{value:.0f}"


def duration(microseconds: float) -> str:
    """A time in three digits or so: 900 µs, 1.5 ms, 2.10 s."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    return f"{microseconds / 1000:.1f} ms" if microseconds >= 1000 else f"{microseconds:.0f} µs"


def size(byte_count: float) -> str:
    """An amount of memory in decimal units: 710 B, 2.1 kB, 48.0 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(byte_count) >= factor:
            return f"{byte_count / factor:.1f} {unit}"
    return f"{byte_count:.0f} B"


def share(value: float) -> str:
    """A part of one, in percent."""
    return f"{value:.0%}"


def micros(value: float) -> str:
    """The CPU time of something small, in microseconds without the unit."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
