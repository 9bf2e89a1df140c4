"""From many runs to a few figures: medians, spreads, ratios, and how they are written."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from bench.measure import Flushed, Flushing, Load, Opened, Published, Publishing, Result
from broker.cli.measure_view import BUSY, duration, rate

__all__ = ["BUSY", "Figure", "Run", "Value", "duration", "figure", "micros", "pairs", "rate", "ratio", "remarks"]
__all__ += ["run_of", "share", "size", "times"]

# Above this share of its core, a server has a queue even where the publishes come at fixed times.
QUEUEING = 0.8
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
        return self.result.load_cpu > BUSY

    @property
    def waited(self) -> float:
        """In a closed loop: for what share of the time the server had nothing to do, because the load program had not
        come to the next publishes yet. 0 if it is no more than a tenth, and where others may have had the time."""
        closed = isinstance(self.load, Publishing) and self.load.window > 0
        idle = 1.0 - self.result.server_cpu
        return idle if closed and not self.disturbed and idle > 1.0 - BUSY else 0.0

    @property
    def queueing(self) -> bool:
        """Whether, in an open loop, the server was so busy that latencies are made of waiting for it."""
        opened = isinstance(self.load, Publishing) and self.load.window == 0
        return opened and self.result.server_cpu > QUEUEING


def run_of(peer: str, load: Load, result: bytes, repetition: int) -> Run:
    """A run as it was saved; the load says what the result is."""
    if isinstance(load, Publishing):
        return Run(peer, load, msgspec.json.decode(result, type=Published), repetition)
    if isinstance(load, Flushing):
        return Run(peer, load, msgspec.json.decode(result, type=Flushed), repetition)
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
    alone or in turn with the server, in which a queue was measured, and which were disturbed."""
    texts: tuple[tuple[str, Callable[[Run], bool], Callable[[Run], float] | None], ...] = (
        (f"the load program was busy for more than {BUSY:.0%} of the time", lambda run: run.load_bound, None),
        (
            f"the server waited for the load program for more than {1 - BUSY:.0%} of the time, so the rate depends on "
            "both",
            lambda run: run.waited > 0,
            lambda run: run.waited,
        ),
        (
            f"the server was busy for more than {QUEUEING:.0%} of the time, so most of a latency is waiting in a queue",
            lambda run: run.queueing,
            None,
        ),
        (f"other programs used more than {DISTURBED:.0%} of a core", lambda run: run.disturbed, None),
    )
    found = []
    for text, chosen, measure in texts:
        which = [run for run in runs if chosen(run)]
        if len(which) == len(runs) > 1 and measure is None:
            found.append(f"In all {len(runs)} runs {text}.")
        elif which:
            at: dict[str, dict[str, list[Run]]] = {}
            for run in which:
                at.setdefault(str(run.load), {}).setdefault(run.peer, []).append(run)
            names = "; ".join(
                f"{load} ({', '.join(_named(peer, these, measure) for peer, these in peers.items())})"
                for load, peers in at.items()
            )
            found.append(f"In {len(which)} of {len(runs)} runs {text}: {names}.")
    return found


def _named(peer: str, runs: Sequence[Run], measure: Callable[[Run], float] | None) -> str:
    if measure is None:
        return peer
    return f"{peer} {share(statistics.median(measure(run) for run in runs))}"


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
