"""The regression check: measures a small part of the bench, and compares its ratios with the recorded ones.

Ratios to other servers hold from machine to machine and from hour to hour, where rates do not. A ratio that falls more
than `TOLERANCE` below its record fails the check. If the machine was too busy, the result is inconclusive.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec
from rich.console import Console

from bench import record
from bench.figures import Run, Value, pairs, times
from bench.measure import ROOT, Load, Published, missing_ability
from bench.peers import BROKER, FLOOR, NATS, SOCKETIFY, Peer
from bench.scenarios import fanout
from bench.scenarios.base import deliveries
from bench.scenarios.onetoone import ONETOONE, PIPELINED
from bench.tables import Table
from bench.terminal import console, following, show
from bench.turns import Failure, Runner, Step

RECORDED = record.RESULTS / "recorded.json"
COUNT = (sys.executable, "-m", "bench.instructions", "--check")
TOLERANCE = 0.15
# Repetitions: of a check, and of what is recorded.
REPEAT = 3
RECORD_REPEAT = 5
# So many undisturbed pairs are a ratio.
MIN_PAIRS = 2


def deliveries_per_cpu(result: Published) -> float:
    """Deliveries in a second of the server's CPU time: for a load in which server and load program wait for each other,
    so that the rate hides half of what the server loses."""
    return 1e6 / result.server_us_per_delivery if result.server_us_per_delivery else 0.0


class Comparison(NamedTuple):
    """What is measured, against whom, and by what it is compared."""

    scenario: str
    load: Load
    peers: tuple[Peer, ...]
    compared: Value = deliveries


COMPARISONS = (
    Comparison("fanout", fanout.at(1), (FLOOR, SOCKETIFY, NATS)),
    Comparison("fanout", fanout.at(16), (FLOOR, SOCKETIFY)),
    Comparison("onetoone", ONETOONE.loads[0], (NATS,)),
    Comparison("pipelined", PIPELINED.loads[0], (FLOOR,), deliveries_per_cpu),
)


class Status(IntEnum):
    """Exit statuses."""

    OK = 0
    WORSE = 1
    INCONCLUSIVE = 2


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of deliveries per second, the broker's to a peer's; the spread is half of the range, as a share."""

    ratio: float
    spread: float


class Recorded(msgspec.Struct, frozen=True):
    """What the check compares with."""

    when: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    ratios: dict[str, Ratio]


@dataclass(frozen=True)
class Pair:
    """The ratio of two runs that followed each other: whether others disturbed one of them, and whether one was bound
    by the load program, which would hide what the server lost."""

    ratio: float
    disturbed: bool = False
    bound: bool = False

    @property
    def conclusive(self) -> bool:
        """Whether it says how fast the servers are."""
        return not self.disturbed and not self.bound


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one ratio."""

    word: Literal["kept", "worse", "failed", "too noisy", "not recorded", "not measured", "missing", "recorded"]
    """`failed`: the broker did. `missing`: the peer, or the broker, cannot run here."""
    measured: Ratio | None = None
    recorded: float | None = None


def judge(found: Sequence[Pair], recorded: float | None) -> Verdict:
    """Compares the repetitions of one ratio with its record.

    Pairs that are not conclusive count only where there are no others. A ratio below the bound is worse if there are at
    least two conclusive pairs, all of them below it; otherwise the runs were too noisy.
    """
    if not found:
        return Verdict("not measured", recorded=recorded)
    conclusive = [pair.ratio for pair in found if pair.conclusive]
    values = conclusive or [pair.ratio for pair in found]
    median = statistics.median(values)
    measured = Ratio(median, (max(values) - min(values)) / 2 / median if median else 0.0)
    if recorded is None:
        return Verdict("not recorded", measured)
    bound = recorded * (1 - TOLERANCE)
    if median >= bound:
        return Verdict("kept", measured, recorded)
    if len(conclusive) < 2 or max(conclusive) >= bound:
        return Verdict("too noisy", measured, recorded)
    return Verdict("worse", measured, recorded)


def key(comparison: Comparison, peer: Peer) -> str:
    """By what a ratio is recorded."""
    return f"{comparison.scenario}: {comparison.load}: of {peer.name}"


def make_pairs(runs: Sequence[Run], comparison: Comparison, peer: Peer) -> list[Pair]:
    """The broker's runs and the peer's, one by one as they took turns."""
    compared = comparison.compared
    return [
        Pair(
            compared(one.result) / compared(other.result),
            disturbed=one.disturbed or other.disturbed,
            bound=one.load_bound or other.load_bound,
        )
        for one, other in pairs(runs, comparison.load, BROKER.name, peer.name)
        if compared(other.result)
    ]


def verdicts(
    runs: Sequence[Run],
    failures: Sequence[Failure],
    recorded: Mapping[str, Ratio],
    missing: Collection[str] = (),
) -> dict[str, Verdict]:
    """One for each ratio of the comparison; `missing` are the names of those who cannot run here."""
    found = {}
    for comparison in COMPARISONS:
        failed = any(failure.load == comparison.load and failure.peer == BROKER.name for failure in failures)
        for peer in comparison.peers:
            name = key(comparison, peer)
            known = recorded[name].ratio if name in recorded else None
            if failed:
                # Whatever else came of it: a broker that loses events or connections is no broker.
                found[name] = Verdict("failed", recorded=known)
            elif peer.name in missing or BROKER.name in missing:
                found[name] = Verdict("missing", recorded=known)
            else:
                found[name] = judge(make_pairs(runs, comparison, peer), known)
    return found


def exit_status(found: Mapping[str, Verdict]) -> Status:
    """The exit status that these verdicts make: only what was compared and found no worse is kept."""
    words = {verdict.word for verdict in found.values()}
    if words & {"worse", "failed"}:
        return Status.WORSE
    return Status.OK if "kept" in words and words <= {"kept", "missing"} else Status.INCONCLUSIVE


def plan_steps(names: Collection[str] | None = None, repeat: int = REPEAT) -> tuple[list[Step], dict[str, str]]:
    """The measurements for these ratios (default: for all), and the peers that cannot run, with the reason."""
    steps: list[Step] = []
    missing = {}
    for comparison in COMPARISONS:
        wanted = [peer for peer in comparison.peers if names is None or key(comparison, peer) in names]
        present = []
        for peer in (BROKER, *wanted) if wanted else ():
            if reason := peer.missing() or missing_ability(peer, comparison.load):
                missing[peer.name] = reason
            else:
                present.append(peer)
        steps += [
            Step(comparison.scenario, comparison.load, peer, number) for number in range(repeat) for peer in present
        ]
    return steps, missing


def main(arguments: Sequence[str]) -> int:
    """Checks, or records; the exit status."""
    options = _parse(arguments)
    out, err = console(), console(stderr=True)
    steps, missing = plan_steps()
    for name, reason in missing.items():
        err.print(f"missing: {name} ({reason}); its ratios are not checked", style="yellow")
    if options.record:
        return _record(out, err)
    if not RECORDED.exists():
        err.print("bench: nothing is recorded yet: python -m bench check --record", style="red")
        return _worst_status(Status.INCONCLUSIVE, _check_instructions())
    recorded = msgspec.json.decode(RECORDED.read_bytes(), type=Recorded).ratios

    runs, failures = _measure(err, steps)
    found = verdicts(runs, failures, recorded, missing)
    doubtful = [name for name, verdict in found.items() if verdict.word in {"worse", "too noisy"}]
    if doubtful:
        # Once more, by themselves: what was an accident does not come again. What then cannot be measured at all has
        # not become better by it.
        again = verdicts(*_measure(err, plan_steps(doubtful)[0]), recorded, missing)
        found |= {name: again[name] for name in doubtful if again[name].word != "not measured"}
    show(out, _table(found))
    counted = _check_instructions()
    status = _worst_status(exit_status(found), counted)
    out.print(
        {
            Status.OK: "kept: no ratio fell by more than 15 %, no operation takes more instructions",
            Status.WORSE: "worse: see above",
            Status.INCONCLUSIVE: "the instructions could not be compared: see above"
            if exit_status(found) == Status.OK
            else "too noisy to say, or not all could be measured and compared: see above",
        }[status]
    )
    return status


def _measure(err: Console, steps: Sequence[Step], retries: int = 1) -> tuple[list[Run], list[Failure]]:
    # What was disturbed is done again while that does not make it longer than half as long again as it has to be.
    time_limit = 1.5 * sum(step.load.expected for step in steps)
    with following(err, steps) as display:
        taken = Runner(retries, time_limit).run(steps, display.before, display.after)
    failures = [failure for each in taken.values() for failure in each.failures]
    for failure in failures:
        err.print(f"failed: {failure.peer}, {failure.load}: {failure.error.splitlines()[0]}", style="red")
    return [run for each in taken.values() for run in each.runs], failures


def _record(out: Console, err: Console) -> int:
    ratios: dict[str, Ratio] = {}
    wanted = {key(comparison, peer): (comparison, peer) for comparison in COMPARISONS for peer in comparison.peers}
    # What was disturbed too often is measured once more.
    for _ in range(2):
        names = wanted.keys() - ratios.keys()
        if not names:
            break
        runs, failures = _measure(err, plan_steps(names, RECORD_REPEAT)[0], retries=2)
        if any(failure.peer == BROKER.name for failure in failures):
            break
        for name in names:
            comparison, peer = wanted[name]
            undisturbed = [pair for pair in make_pairs(runs, comparison, peer) if not pair.disturbed]
            if len(undisturbed) < MIN_PAIRS:
                continue
            conclusive = [pair for pair in undisturbed if pair.conclusive]
            if len(conclusive) < MIN_PAIRS:
                err.print(f"{name}: bound by the load program; a regression may be hidden", style="yellow")
            verdict = judge(conclusive if len(conclusive) >= MIN_PAIRS else undisturbed, None)
            if verdict.measured:
                ratios[name] = verdict.measured
    ordered = {name: ratios[name] for name in wanted if name in ratios}
    show(out, _table({name: Verdict("recorded", ratio) for name, ratio in ordered.items()}))
    if lacking := [name for name in wanted if name not in ratios]:
        err.print(f"bench: nothing was recorded: failed, missing or disturbed: {'; '.join(lacking)}", style="red")
        return Status.INCONCLUSIVE
    made = Recorded(record.now(), record.machine(), dict(record.versions()), ordered)
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    return Status.OK


def _worst_status(*found: Status) -> Status:
    return max(found, key=[Status.OK, Status.INCONCLUSIVE, Status.WORSE].index)


def _check_instructions() -> Status:
    done = subprocess.run(COUNT, cwd=ROOT, check=False)
    return {0: Status.OK, 1: Status.WORSE}.get(done.returncode, Status.INCONCLUSIVE)


def _table(found: Mapping[str, Verdict]) -> Table:
    rows = [
        [
            name,
            times(verdict.measured.ratio) if verdict.measured else "",
            f"±{verdict.measured.spread:.0%}" if verdict.measured else "",
            times(verdict.recorded) if verdict.recorded is not None else "",
            verdict.word,
        ]
        for name, verdict in found.items()
    ]
    return Table(
        "wsbroker's deliveries/s (pipelined: by the server's CPU time)", ["", "ratio", "spread", "recorded", ""], rows
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench check",
        description="Fails (1) if a ratio to a peer is more than 15 % below the recorded one, or an operation takes "
        "more instructions; 2: the machine was too busy to say, or nothing could be compared.",
    )
    parser.add_argument("--record", action="store_true", help=f"record what is measured, in {RECORDED.name}")
    return parser.parse_args(arguments)
