"""What the broker is to reach: ratios to its peers, both sides in one run, and a few figures of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from bench.figures import Figure, Run, duration, figure, ratio, size, times
from bench.measure import Load, Opening, Published, Publishing
from bench.peers import BROKER, FLOOR, NATS, PEERS, SOCKETIFY
from bench.scenarios import SCENARIOS, fanout, stalled
from bench.scenarios.base import deliveries
from bench.scenarios.connections import CONNECT, IDLE
from bench.scenarios.onetoone import ONETOONE, PIPELINED
from bench.tables import Table

Runs = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Goal:
    """One line of the table: what is measured, and what would do."""

    text: str
    at_least: float
    aim: float
    measure: Callable[[Runs], Figure | None]
    """From the runs of all scenarios; None where something is lacking."""
    write: Callable[[float], str] = times
    less_is_better: bool = False

    def reached(self, value: float) -> str:
        """In words: "aim", "at least", "no"."""
        for word, bound in (("aim", self.aim), ("at least", self.at_least)):
            if value <= bound if self.less_is_better else value >= bound:
                return word
        return "no"


def _against(scenario: str, load: Load, peer: str) -> Callable[[Runs], Figure | None]:
    return lambda runs: ratio(runs.get(scenario, ()), load, BROKER.name, peer, deliveries)


def _against_best(scenario: str, load: Load) -> Callable[[Runs], Figure | None]:
    def measured(runs: Runs) -> Figure | None:
        others = [name for name, peer in PEERS.items() if peer.websocket and name != BROKER.name]
        found = [ratio(runs.get(scenario, ()), load, BROKER.name, name, deliveries) for name in others]
        return min((each for each in found if each), key=lambda each: each.median, default=None)

    return measured


def _of_broker(scenario: str, load: Load, value: Callable[..., float]) -> Callable[[Runs], Figure | None]:
    return lambda runs: figure(runs.get(scenario, ()), load, BROKER.name, value)


def _beside_stalled(runs: Runs) -> Figure | None:
    found = runs.get("stalled", ())
    p99 = [
        figure(found, load, BROKER.name, lambda result: result.delivery_us.p99)
        for load in (stalled.WITH, stalled.WITHOUT)
    ]
    with_stalled, without = p99
    if with_stalled is None or without is None or not without.median:
        return None
    return Figure(with_stalled.median / without.median, max(with_stalled.spread, without.spread))


def _against_bound(runs: Runs) -> Figure | None:
    shares = [
        stalled.growth(run.result) / stalled.bound(run.result)
        for run in runs.get("flood", ())
        if run.peer == BROKER.name and isinstance(run.result, Published)
    ]
    return Figure.of(shares) if shares else None


def _fanout(window: int) -> Publishing:
    return fanout.at(window)


def _opening(loads: Sequence[Load]) -> Opening:
    return next(load for load in loads if isinstance(load, Opening))


GOALS = (
    Goal("fan-out to 1,000, window 1: of the C floor", 0.90, 0.97, _against("fanout", _fanout(1), FLOOR.name)),
    *(
        Goal(
            f"fan-out to 1,000, window {window}: of the C floor (batching)",
            0.75,
            0.95,
            _against("fanout", _fanout(window), FLOOR.name),
        )
        for window in (16, 64)
    ),
    *(
        Goal(
            f"fan-out to 1,000, window {window}: against uWebSockets through socketify",
            1.0,
            1.25,
            _against("fanout", _fanout(window), SOCKETIFY.name),
        )
        for window in fanout.WINDOWS
    ),
    *(
        Goal(
            f"fan-out to 1,000, window {window}: against nats-server over WebSocket",
            1.5,
            2.5,
            _against("fanout", _fanout(window), NATS.name),
        )
        for window in fanout.WINDOWS
    ),
    Goal("one to one, 1,000 topics: against the best peer", 1.3, 1.8, _against_best("onetoone", ONETOONE.loads[0])),
    Goal(
        "one to one, one topic, pipelined: against nats-server",
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
        "p99 of healthy subscribers with 10 % stalled: against none stalled",
        1.2,
        1.05,
        _beside_stalled,
        less_is_better=True,
    ),
    Goal(
        "growth of RSS in a flood at 100 stalled subscribers: of what the limits allow",
        1.0,
        1.0,
        _against_bound,
        less_is_better=True,
    ),
)

WORDS = {"aim": "aim", "at least": "yes", "no": "**no**"}


def table(runs: Runs, all_of_them: bool = True) -> Table:
    """The goals with what was measured; those that were not are marked so, or left out."""
    rows = []
    runs = {name: _as_laid_out(name, found) for name, found in runs.items()}
    for goal in GOALS:
        found = goal.measure(runs)
        if found is None and not all_of_them:
            continue
        measured = f"{goal.write(found.median)} ±{found.spread:.0%}" if found else "not measured"
        reached = WORDS[goal.reached(found.median)] if found else ""
        rows.append([goal.text, goal.write(goal.at_least), goal.write(goal.aim), measured, reached])
    return Table("What to reach", ["", "at least", "aim", "measured", "reached"], rows)


def _as_laid_out(scenario: str, runs: Sequence[Run]) -> list[Run]:
    """The runs under the scenario's own loads, also where they lasted longer or shorter."""
    own = {_without_seconds(load): load for load in SCENARIOS[scenario].loads}
    return [msgspec.structs.replace(run, load=own.get(_without_seconds(run.load), run.load)) for run in runs]


def _without_seconds(load: Load) -> Load:
    return msgspec.structs.replace(load, seconds=0.0) if isinstance(load, Publishing) else load
