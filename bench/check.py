"""The guard: measures a short part, and compares its ratios with those that are recorded in the repository.

Ratios to other servers hold from machine to machine and from hour to hour, where rates do not. A ratio that falls more
than `TOLERANCE` below its record fails the check; where the machine was too busy to tell, that is said instead.
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
from bench.measure import ROOT, Load, Published, unable
from bench.peers import BROKER, FLOOR, NATS, SOCKETIFY, Peer
from bench.scenarios import fanout
from bench.scenarios.base import deliveries
from bench.scenarios.onetoone import ONETOONE, PIPELINED
from bench.tables import Table
from bench.terminal import console, following, show
from bench.turns import Failure, Step, Turns

RECORDED = record.RESULTS / "recorded.json"
COUNT = (sys.executable, "-m", "bench.instructions", "--check")
TOLERANCE = 0.15
# Repetitions: of a check, and of what is recorded.
REPEAT = 3
RECORD_REPEAT = 5
# So many undisturbed pairs are a ratio.
ENOUGH = 2


def deliveries_per_cpu(result: Published) -> float:
    """Deliveries in a second of the server's CPU time: for a load in which server and load program wait for each other,
    so that the rate hides half of what the server loses."""
    return 1e6 / result.server_us_per_delivery if result.server_us_per_delivery else 0.0


class Part(NamedTuple):
    """What is measured, against whom, and by what it is compared."""

    scenario: str
    load: Load
    peers: tuple[Peer, ...]
    compared: Value = deliveries


PART = (
    Part("fanout", fanout.at(1), (FLOOR, SOCKETIFY, NATS)),
    Part("fanout", fanout.at(16), (FLOOR, SOCKETIFY)),
    Part("onetoone", ONETOONE.loads[0], (NATS,)),
    Part("pipelined", PIPELINED.loads[0], (FLOOR,), deliveries_per_cpu),
)


class Status(IntEnum):
    """Exit statuses."""

    KEPT = 0
    WORSE = 1
    CANNOT_SAY = 2


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
    def quiet(self) -> bool:
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

    Pairs that are not quiet count only where there are no others. What lies below the bound is called worse if at least
    two quiet pairs say so, and all of them; otherwise it was too noisy to say.
    """
    if not found:
        return Verdict("not measured", recorded=recorded)
    quiet = [pair.ratio for pair in found if pair.quiet]
    values = quiet or [pair.ratio for pair in found]
    median = statistics.median(values)
    measured = Ratio(median, (max(values) - min(values)) / 2 / median if median else 0.0)
    if recorded is None:
        return Verdict("not recorded", measured)
    bound = recorded * (1 - TOLERANCE)
    if median >= bound:
        return Verdict("kept", measured, recorded)
    if len(quiet) < 2 or max(quiet) >= bound:
        return Verdict("too noisy", measured, recorded)
    return Verdict("worse", measured, recorded)


def key(part: Part, peer: Peer) -> str:
    """By what a ratio is recorded."""
    return f"{part.scenario}: {part.load}: of {peer.name}"


def pairs_of(runs: Sequence[Run], part: Part, peer: Peer) -> list[Pair]:
    """The broker's runs and the peer's, one by one as they took turns."""
    compared = part.compared
    return [
        Pair(
            compared(one.result) / compared(other.result),
            disturbed=one.disturbed or other.disturbed,
            bound=one.load_bound or other.load_bound,
        )
        for one, other in pairs(runs, part.load, BROKER.name, peer.name)
        if compared(other.result)
    ]


def verdicts(
    runs: Sequence[Run],
    failures: Sequence[Failure],
    recorded: Mapping[str, Ratio],
    missing: Collection[str] = (),
) -> dict[str, Verdict]:
    """One for each ratio of the part; `missing` are the names of those who cannot run here."""
    found = {}
    for part in PART:
        failed = any(failure.load == part.load and failure.peer == BROKER.name for failure in failures)
        for peer in part.peers:
            name = key(part, peer)
            known = recorded[name].ratio if name in recorded else None
            if failed:
                # Whatever else came of it: a broker that loses events or connections is no broker.
                found[name] = Verdict("failed", recorded=known)
            elif peer.name in missing or BROKER.name in missing:
                found[name] = Verdict("missing", recorded=known)
            else:
                found[name] = judge(pairs_of(runs, part, peer), known)
    return found


def status_of(found: Mapping[str, Verdict]) -> Status:
    """The exit status that these verdicts make: only what was compared and found no worse is kept."""
    words = {verdict.word for verdict in found.values()}
    if words & {"worse", "failed"}:
        return Status.WORSE
    return Status.KEPT if "kept" in words and words <= {"kept", "missing"} else Status.CANNOT_SAY


def steps_of(names: Collection[str] | None = None, repeat: int = REPEAT) -> tuple[list[Step], dict[str, str]]:
    """The measurements for these ratios (default: for all), and the peers that cannot run, with the reason."""
    steps: list[Step] = []
    missing = {}
    for part in PART:
        wanted = [peer for peer in part.peers if names is None or key(part, peer) in names]
        present = []
        for peer in (BROKER, *wanted) if wanted else ():
            if reason := peer.missing() or unable(peer, part.load):
                missing[peer.name] = reason
            else:
                present.append(peer)
        steps += [Step(part.scenario, part.load, peer, number) for number in range(repeat) for peer in present]
    return steps, missing


def main(arguments: Sequence[str]) -> int:
    """Checks, or records; the exit status."""
    options = _parse(arguments)
    out, err = console(), console(stderr=True)
    steps, missing = steps_of()
    for name, reason in missing.items():
        err.print(f"missing: {name} ({reason}); its ratios are not checked", style="yellow")
    if options.record:
        return _record(out, err)
    if not RECORDED.exists():
        err.print("bench: nothing is recorded yet: python -m bench check --record", style="red")
        return _worst(Status.CANNOT_SAY, _check_instructions())
    recorded = msgspec.json.decode(RECORDED.read_bytes(), type=Recorded).ratios

    runs, failures = _take(err, steps)
    found = verdicts(runs, failures, recorded, missing)
    doubtful = [name for name, verdict in found.items() if verdict.word in {"worse", "too noisy"}]
    if doubtful:
        # Once more, by themselves: what was an accident does not come again. What then cannot be measured at all has
        # not become better by it.
        again = verdicts(*_take(err, steps_of(doubtful)[0]), recorded, missing)
        found |= {name: again[name] for name in doubtful if again[name].word != "not measured"}
    show(out, _table(found))
    counted = _check_instructions()
    status = _worst(status_of(found), counted)
    out.print(
        {
            Status.KEPT: "kept: no ratio fell by more than 15 %, no operation takes more instructions",
            Status.WORSE: "worse: see above",
            Status.CANNOT_SAY: "the instructions could not be compared: see above"
            if status_of(found) == Status.KEPT
            else "too noisy to say, or not all could be measured and compared: see above",
        }[status]
    )
    return status


def _take(err: Console, steps: Sequence[Step], retries: int = 1) -> tuple[list[Run], list[Failure]]:
    # What was disturbed is done again while that does not make it longer than half as long again as it has to be.
    patience = 1.5 * sum(step.load.expected for step in steps)
    with following(err, steps) as display:
        taken = Turns(retries, patience).take(steps, display.before, display.after)
    failures = [failure for each in taken.values() for failure in each.failures]
    for failure in failures:
        err.print(f"failed: {failure.peer}, {failure.load}: {failure.error.splitlines()[0]}", style="red")
    return [run for each in taken.values() for run in each.runs], failures


def _record(out: Console, err: Console) -> int:
    ratios: dict[str, Ratio] = {}
    wanted = {key(part, peer): (part, peer) for part in PART for peer in part.peers}
    # What was disturbed too often is measured once more.
    for _ in range(2):
        names = wanted.keys() - ratios.keys()
        if not names:
            break
        runs, failures = _take(err, steps_of(names, RECORD_REPEAT)[0], retries=2)
        if any(failure.peer == BROKER.name for failure in failures):
            break
        for name in names:
            part, peer = wanted[name]
            undisturbed = [pair for pair in pairs_of(runs, part, peer) if not pair.disturbed]
            if len(undisturbed) < ENOUGH:
                continue
            quiet = [pair for pair in undisturbed if pair.quiet]
            if len(quiet) < ENOUGH:
                err.print(f"{name}: bound by the load program; dropped_events will be seen late", style="yellow")
            verdict = judge(quiet if len(quiet) >= ENOUGH else undisturbed, None)
            if verdict.measured:
                ratios[name] = verdict.measured
    ordered = {name: ratios[name] for name in wanted if name in ratios}
    show(out, _table({name: Verdict("recorded", ratio) for name, ratio in ordered.items()}))
    if lacking := [name for name in wanted if name not in ratios]:
        err.print(f"bench: nothing was recorded: failed, missing or disturbed: {'; '.join(lacking)}", style="red")
        return Status.CANNOT_SAY
    made = Recorded(record.now(), record.machine(), dict(record.versions()), ordered)
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    return Status.KEPT


def _worst(*found: Status) -> Status:
    return max(found, key=[Status.KEPT, Status.CANNOT_SAY, Status.WORSE].index)


def _check_instructions() -> Status:
    done = subprocess.run(COUNT, cwd=ROOT, check=False)
    return {0: Status.KEPT, 1: Status.WORSE}.get(done.returncode, Status.CANNOT_SAY)


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
