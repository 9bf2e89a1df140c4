"""What the broker is to reach: ratios to its peers, both sides in one run, and a few figures of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from bench.figures import Figure, Run, duration, pairs, size, times
from bench.measure import Load, Opening, Published, Publishing
from bench.peers import BROKER, FLOOR, NATS, PEERS, SOCKETIFY
from bench.scenarios import SCENARIOS, fanout, stalled
from bench.scenarios.base import deliveries, delivery_p99
from bench.scenarios.connections import CONNECT, IDLE
from bench.scenarios.onetoone import ONETOONE, PIPELINED
from bench.tables import Table

Runs = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Found:
    """What was measured for a goal: the value of each repetition, and the runs that they come from."""

    values: Sequence[float]
    runs: Sequence[Run]

    @property
    def figure(self) -> Figure:
        """Their median and spread."""
        return Figure.of(self.values)


Measure = Callable[[Runs], Found | None]


@dataclass(frozen=True)
class Goal:
    """One line of the table: what is measured, and what would do. `{seconds}` in the text is how long a run lasted."""

    text: str
    at_least: float
    aim: float
    measure: Measure
    """From the runs of all scenarios; None where something is lacking."""
    write: Callable[[float], str] = times
    less_is_better: bool = False

    def reached(self, value: float) -> str:
        """In words: "aim", "at least", "no"."""
        for word, bound in (("aim", self.aim), ("at least", self.at_least)):
            if value <= bound if self.less_is_better else value >= bound:
                return word
        return "no"


def _against(scenario: str, load: Load, peer: str) -> Measure:
    return lambda runs: _compared(pairs(runs.get(scenario, ()), load, BROKER.name, peer), deliveries)


def _compared(found: Sequence[tuple[Run, Run]], value: Callable[..., float]) -> Found | None:
    """How many times the value of the others ours is, pair by pair."""
    usable = [(mine, others) for mine, others in found if value(others.result)]
    values = [value(mine.result) / value(others.result) for mine, others in usable]
    return Found(values, [run for pair in usable for run in pair]) if values else None


def _against_best(scenario: str, load: Load) -> Measure:
    def measured(runs: Runs) -> Found | None:
        others = [name for name, peer in PEERS.items() if peer.websocket and name != BROKER.name]
        found = [_against(scenario, load, name)(runs) for name in others]
        return min((each for each in found if each), key=lambda each: each.figure.median, default=None)

    return measured


def _of_broker(scenario: str, load: Load, value: Callable[..., float]) -> Measure:
    def measured(runs: Runs) -> Found | None:
        found = [run for run in runs.get(scenario, ()) if run.peer == BROKER.name and run.load == load]
        return Found([value(run.result) for run in found], found) if found else None

    return measured


def _beside_stalled(runs: Runs) -> Found | None:
    # What was not sent in time is in no latency: such a run says nothing about them.
    found = [
        run
        for run in runs.get("stalled", ())
        if run.peer == BROKER.name and isinstance(run.result, Published) and not run.result.unsent
    ]
    alone = {run.repetition: run for run in found if run.load == stalled.WITHOUT}
    beside = {run.repetition: run for run in found if run.load == stalled.WITH}
    both = [(beside[number], alone[number]) for number in beside if number in alone]
    return _compared(both, delivery_p99)


def _grown(most: Callable[[Published], float]) -> Measure:
    """By what share of what is allowed the broker grew in the flood."""

    def measured(runs: Runs) -> Found | None:
        found = [run for run in runs.get("flood", ()) if run.peer == BROKER.name]
        shares = [stalled.growth(run.result) / most(run.result) for run in found if isinstance(run.result, Published)]
        return Found(shares, found) if shares else None

    return measured


def _fanout(window: int) -> Publishing:
    return fanout.at(window)


def _opening(loads: Sequence[Load]) -> Opening:
    return next(load for load in loads if isinstance(load, Opening))


GOALS = (
    Goal("fan-out to 1,000, window 1: share of the C floor", 0.90, 0.97, _against("fanout", _fanout(1), FLOOR.name)),
    *(
        Goal(
            f"fan-out to 1,000, window {window}: share of the C floor (batching)",
            0.75,
            0.95,
            _against("fanout", _fanout(window), FLOOR.name),
        )
        for window in (16, 64)
    ),
    *(
        Goal(
            f"fan-out to 1,000, window {window}: ratio to uWebSockets through socketify",
            1.0,
            1.25,
            _against("fanout", _fanout(window), SOCKETIFY.name),
        )
        for window in fanout.WINDOWS
    ),
    *(
        Goal(
            f"fan-out to 1,000, window {window}: ratio to nats-server over WebSocket",
            1.5,
            2.5,
            _against("fanout", _fanout(window), NATS.name),
        )
        for window in fanout.WINDOWS
    ),
    Goal("one to one, 1,000 topics: ratio to the best peer", 1.3, 1.8, _against_best("onetoone", ONETOONE.loads[0])),
    Goal(
        "one to one, one topic, pipelined: ratio to nats-server",
        0.7,
        1.2,
        _against("pipelined", PIPELINED.loads[0], NATS.name),
    ),
    Goal(
        "idle connection, RSS",
        3000,
        1500,
        _of_broker("idle", _opening(IDLE.loads), IDLE.compared),
        size,
        less_is_better=True,
    ),
    Goal(
        "connect with handshake, server CPU",
        130,
        90,
        _of_broker("connect", _opening(CONNECT.loads), CONNECT.compared),
        duration,
        less_is_better=True,
    ),
    Goal(
        "p99 of healthy subscribers beside 10 % stalled ones: ratio to p99 without stalled ones",
        1.2,
        1.05,
        _beside_stalled,
        less_is_better=True,
    ),
    Goal(
        "memory growth in a flood of {seconds} s with 100 stalled subscribers: share of what the limits allow",
        1.0,
        1.0,
        _grown(stalled.bound),
        less_is_better=True,
    ),
    Goal(
        "the same memory growth: share of what the limits allow if all subscribers share the stored events",
        1.0,
        1.0,
        _grown(stalled.shared),
        less_is_better=True,
    ),
)

WORDS = {"aim": "aim", "at least": "yes", "no": "**no**"}


def table(runs: Runs, all_of_them: bool = True) -> Table:
    """The goals with what was measured, and what there is to say about it; those that were not measured are marked so,
    or left out."""
    rows = []
    runs = {name: _as_laid_out(name, found) for name, found in runs.items()}
    for goal in GOALS:
        found = goal.measure(runs)
        if found is None and not all_of_them:
            continue
        measured, reached, notes = "not measured", "", ""
        if found:
            measured = f"{goal.write(found.figure.median)} ±{found.figure.spread:.0%}"
            reached = WORDS[goal.reached(found.figure.median)]
            notes = "; ".join(_notes(goal, found))
        text = goal.text.replace("{seconds}", _seconds(found))
        rows.append([text, goal.write(goal.at_least), goal.write(goal.aim), measured, reached, notes])
    return Table("What to reach", ["", "at least", "aim", "measured", "reached", "remarks"], rows)


def _notes(goal: Goal, found: Found) -> list[str]:
    """Why the verdict is to be taken with care, in few words."""
    low, high = WORDS[goal.reached(min(found.values))], WORDS[goal.reached(max(found.values))]
    notes = [f"unsure: {low} to {high}"] if low != high else []
    for text, chosen in (
        ("load bound", [run.load_bound for run in found.runs]),
        ("server waited", [run.waited > 0 for run in found.runs]),
        ("queueing", [run.queueing for run in found.runs]),
        ("disturbed", [run.disturbed for run in found.runs]),
    ):
        if any(chosen):
            notes.append(f"{text} {sum(chosen)}/{len(chosen)}")
    return notes


def _seconds(found: Found | None) -> str:
    lengths = {run.result.seconds for run in found.runs} if found else set()
    return (
        " to ".join(dict.fromkeys(f"{round(length, 1):g}" for length in (min(lengths), max(lengths))))
        if lengths
        else "some"
    )


def _as_laid_out(scenario: str, runs: Sequence[Run]) -> list[Run]:
    """The runs under the scenario's own loads, also where they lasted longer or shorter."""
    own = {_without_seconds(load): load for load in SCENARIOS[scenario].loads}
    return [msgspec.structs.replace(run, load=own.get(_without_seconds(run.load), run.load)) for run in runs]


def _without_seconds(load: Load) -> Load:
    return msgspec.structs.replace(load, seconds=0.0) if isinstance(load, Publishing) else load
