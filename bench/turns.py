"""Plans and runs the measurements. Within a load the peers alternate (A B A B …), so that disturbances of the machine
affect all of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from bench.figures import Run
from bench.measure import Load, MeasureError, Publishing, missing_ability
from bench.peers import Peer
from bench.scenarios import Scenario


@dataclass(frozen=True)
class Step:
    """One measurement to be outcomes."""

    scenario: str
    load: Load
    peer: Peer
    repetition: int = 0


@dataclass(frozen=True)
class Failure:
    """A measurement that could not be outcomes, and why."""

    peer: str
    load: Load
    error: str


@dataclass
class Plan:
    """What is to be measured, in order, and what is not, with the reasons."""

    steps: list[Step] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that cannot run here."""
    unable: dict[str, dict[str, str]] = field(default_factory=dict)
    """Scenario → peer → what it lacks."""

    @property
    def expected(self) -> float:
        """About how long all steps take, in seconds."""
        return sum(step.load.expected for step in self.steps)


@dataclass
class Outcome:
    """What came of the steps of one scenario."""

    runs: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def plan(
    scenarios: Sequence[Scenario],
    peers: Sequence[str] | None = None,
    repeat: int | None = None,
    seconds: float | None = None,
) -> Plan:
    """Lays out the measurements; `peers`, `repeat` and `seconds` go before what the scenarios say."""
    made = Plan()
    for scenario in scenarios:
        present = []
        for peer in scenario.peers:
            if peers and peer.name not in peers:
                continue
            if reason := peer.missing():
                made.missing[peer.name] = reason
            else:
                present.append(peer)
        steps = []
        for own, load in zip(scenario.loads, loads(scenario, seconds), strict=True):
            for peer in present:
                if reason := missing_ability(peer, load):
                    made.unable.setdefault(scenario.name, {})[peer.name] = reason
                    continue
                times = repeat or scenario.repetitions(own, peer)
                steps += [Step(scenario.name, load, peer, number) for number in range(times)]
        # All of a load and then all of the next, unless the loads take turns; the peers always do.
        given = scenario_loads(steps)
        steps.sort(key=lambda step: (0 if scenario.alternate else given.index(step.load), step.repetition))
        made.steps += steps
    return made


def scenario_loads(steps: Sequence[Step]) -> list[Load]:
    """The loads of these steps in their order, each once."""
    return list(dict.fromkeys(step.load for step in steps))


def loads(scenario: Scenario, seconds: float | None) -> list[Load]:
    """The scenario's loads, with another measured time if that is given."""
    if seconds is None:
        return list(scenario.loads)
    return [
        msgspec.structs.replace(load, seconds=seconds) if isinstance(load, Publishing) else load
        for load in scenario.loads
    ]


class Runner:
    """Runs steps, one after the other.

    A run that other programs disturbed is repeated, up to `retries` times, as long as that does not put off the
    end beyond `time_limit` seconds from the start; the one that was disturbed least counts. Tests replace `measure`.
    """

    def __init__(
        self,
        retries: int,
        time_limit: float = float("inf"),
        measure: Callable[[Step], Run] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retries = retries
        self._measure = measure or _measure
        self._clock = clock
        self._end = clock() + time_limit

    def run(
        self,
        steps: Sequence[Step],
        before: Callable[[Step], None] = lambda step: None,
        after: Callable[[Step], None] = lambda step: None,
    ) -> dict[str, Outcome]:
        """Takes all steps; `before` and `after` each is called with it. By scenario. Raises BuildError."""
        outcomes: dict[str, Outcome] = {}
        left = sum(step.load.expected for step in steps)
        for step in steps:
            before(step)
            left -= step.load.expected
            of_scenario = outcomes.setdefault(step.scenario, Outcome())
            try:
                of_scenario.runs.append(self._run_step(step, left))
            except MeasureError as error:
                of_scenario.failures.append(Failure(step.peer.name, step.load, str(error)))
            after(step)
        return outcomes

    def _run_step(self, step: Step, left: float) -> Run:
        run = self._measure(step)
        for _ in range(self._retries):
            if not run.disturbed or self._clock() + step.load.expected + left > self._end:
                break
            run = min(run, self._measure(step), key=lambda either: either.result.other_cpu)
        return run


def _measure(step: Step) -> Run:
    return Run(step.peer.name, step.load, step.load.run(step.peer), step.repetition)
