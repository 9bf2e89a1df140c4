"""The guard: what it calls worse, and what too noisy to say."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench import check
from bench.check import Pair, Ratio, Status, Verdict
from bench.figures import Run
from bench.measure import Published
from bench.peers import BROKER, FLOOR, NATS
from bench.turns import Failure, Step
from tests.bench.made_up import published


def conclusive(*ratios: float) -> list[Pair]:
    return [Pair(ratio) for ratio in ratios]


def disturbed(*ratios: float) -> list[Pair]:
    return [Pair(ratio, disturbed=True) for ratio in ratios]


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        (conclusive(1.0, 1.0, 1.0), "kept"),
        (conclusive(0.85, 0.85, 0.85), "kept"),
        (conclusive(3.0, 3.0, 3.0), "kept"),
        (conclusive(0.84, 0.84, 0.84), "worse"),
        (conclusive(0.5, 0.6, 0.8), "worse"),
        (conclusive(0.5, 0.6, 0.9), "too noisy"),  # they do not agree
        (conclusive(0.5), "too noisy"),
        (disturbed(0.5, 0.5, 0.5), "too noisy"),
        (disturbed(1.0, 1.0, 1.0), "kept"),
        ([Pair(0.5, bound=True)] * 3, "too noisy"),
        ([*conclusive(1.0, 1.0), Pair(0.5, bound=True)], "kept"),
        ([*conclusive(0.95, 0.95), *disturbed(0.1)], "kept"),
        ([*conclusive(0.5, 0.5), *disturbed(1.0)], "worse"),
        ([*conclusive(0.5), *disturbed(0.5, 0.5)], "too noisy"),
        ([], "not measured"),
    ],
)
def test_ratio_that_fell_by_more_than_15_percent_is_worse(pairs: Sequence[Pair], word: str) -> None:
    assert check.judge(pairs, 1.0).word == word


def test_scenario_without_a_record_is_not_judged() -> None:
    assert check.judge(conclusive(0.1, 0.1), None).word == "not recorded"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["kept", "kept"], Status.OK),
        (["kept", "missing"], Status.OK),
        (["missing"], Status.INCONCLUSIVE),
        (["kept", "not measured"], Status.INCONCLUSIVE),
        (["kept", "not recorded"], Status.INCONCLUSIVE),
        (["kept", "failed"], Status.WORSE),
        (["kept", "worse", "too noisy"], Status.WORSE),
        (["kept", "too noisy"], Status.INCONCLUSIVE),
        (["not measured", "not recorded"], Status.INCONCLUSIVE),
    ],
)
def test_status_is_that_of_the_worst_verdict(words: list[str], status: Status) -> None:
    assert check.exit_status({str(number): Verdict(word) for number, word in enumerate(words)}) == status  # type: ignore[arg-type]


def made_up(rates: dict[str, float], other_cpu: float = 0.0) -> list[Run]:
    """Three runs of each load of the comparison."""
    return [
        published(peer.name, rates[peer.name], load, other_cpu=other_cpu, repetition=repetition)
        for _, load, others, _ in check.COMPARISONS
        for repetition in range(3)
        for peer in (BROKER, *others)
    ]


# The command that really counts.
COUNT = check.COUNT
RATES = {"wsbroker": 1000.0, "floor": 1000.0, "socketify": 500.0, "nats": 250.0}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Run]]:
    """What the next measurements give, in order. A measurement with a rate of 0 fails. Nothing is recorded yet, and no
    operation takes more instructions."""
    given: list[list[Run]] = []

    def take(_: object, steps: Sequence[Step], retries: int = 1) -> tuple[list[Run], list[Failure]]:
        wanted = {(step.load, step.peer.name) for step in steps}
        runs = [run for run in given.pop(0) if (run.load, run.peer) in wanted]
        failed = [run for run in runs if isinstance(run.result, Published) and not run.result.deliveries]
        return [run for run in runs if run not in failed], [
            Failure(run.peer, run.load, "no delivery") for run in failed
        ]

    monkeypatch.setattr(check, "_measure", take)
    monkeypatch.setattr(check, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(check, "COUNT", (sys.executable, "-c", "raise SystemExit(0)"))
    return given


def test_record_is_saved_and_compared(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up({**RATES, "wsbroker": 900.0})]
    assert check.main(["--record"]) == Status.OK
    recorded = msgspec.json.decode(check.RECORDED.read_bytes(), type=check.Recorded)
    assert recorded.ratios["onetoone: 1,000 subscribers, 1,000 topics, window 256, 128 B: of nats"] == Ratio(4.0, 0.0)
    assert len(recorded.ratios) == sum(len(comparison.peers) for comparison in check.COMPARISONS)
    assert check.main([]) == Status.OK


def test_worse_scenario_is_measured_again_and_reported(
    bench: list[list[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    bench += [made_up(RATES), made_up({**RATES, "nats": 500.0}), made_up({**RATES, "nats": 400.0})]
    check.main(["--record"])
    assert check.main([]) == Status.WORSE
    assert bench == []
    worse = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("worse")]
    assert len(worse) == len([1 for comparison in check.COMPARISONS if NATS in comparison.peers])
    assert all("of nats" in line for line in worse)


def test_single_outlier_does_not_fail_the_check(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up({**RATES, "nats": 500.0}), made_up(RATES)]
    check.main(["--record"])
    assert check.main([]) == Status.OK


@pytest.mark.parametrize("runs_that_fail", [1, 3])
def test_failing_broker_is_worse(bench: list[list[Run]], runs_that_fail: int) -> None:
    """Whether it does so each time or once, and although all else is as it was."""
    runs = made_up(RATES)
    mine = [run for run in runs if run.load == check.COMPARISONS[-1][1] and run.peer == BROKER.name]
    for run in mine[:runs_that_fail]:
        runs[runs.index(run)] = published(run.peer, 0.0, run.load, repetition=run.repetition)
    bench += [made_up(RATES), runs]
    check.main(["--record"])
    assert check.main([]) == Status.WORSE


def test_failing_peer_makes_the_check_inconclusive(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up({**RATES, "nats": 0.0})]
    check.main(["--record"])
    assert check.main([]) == Status.INCONCLUSIVE


def test_failed_repetition_does_not_clear_a_worse_result(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up({**RATES, "nats": 500.0}), made_up({**RATES, "nats": 0.0})]
    check.main(["--record"])
    assert check.main([]) == Status.WORSE


def test_missing_recorded_ratio_makes_the_check_inconclusive(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up(RATES)]
    check.main(["--record"])
    check.RECORDED.write_text(check.RECORDED.read_text().replace("window 256", "window 255"))
    assert check.main([]) == Status.INCONCLUSIVE


def test_unavailable_peer_does_not_fail_the_check(bench: list[list[Run]], monkeypatch: pytest.MonkeyPatch) -> None:
    bench += [made_up(RATES), made_up(RATES)]
    check.main(["--record"])
    gone = replace(NATS, missing=lambda: "gone")
    absent = [
        comparison._replace(peers=tuple(gone if peer is NATS else peer for peer in comparison.peers))
        for comparison in check.COMPARISONS
    ]
    monkeypatch.setattr(check, "COMPARISONS", absent)
    assert check.main([]) == Status.OK


def test_busy_machine_is_told_from_a_slow_broker(bench: list[list[Run]]) -> None:
    slow = made_up({**RATES, "wsbroker": 100.0}, other_cpu=0.5)
    bench += [made_up(RATES), slow, slow]
    check.main(["--record"])
    assert check.main([]) == Status.INCONCLUSIVE


@pytest.mark.parametrize("bound", [BROKER.name, NATS.name])
def test_saturated_load_program_marks_the_pair_as_bound(bound: str) -> None:
    comparison = check.COMPARISONS[0]
    runs = [
        published(name, 100.0, comparison.load, load_cpu=0.95 if name == bound else 0.5)
        for name in (BROKER.name, NATS.name)
    ]
    assert check.make_pairs(runs, comparison, NATS) == [Pair(1.0, bound=True)]


def test_cpu_time_is_compared_where_server_and_load_alternate() -> None:
    comparison = check.COMPARISONS[-1]
    mine, other = (published(name, rate, comparison.load) for name, rate in (("wsbroker", 100.0), ("floor", 300.0)))
    slower = replace_result(mine, server_us_per_delivery=0.8)
    assert [pair.ratio for pair in check.make_pairs([slower, other], comparison, FLOOR)] == [0.5]


def replace_result(run: Run, **fields: float) -> Run:
    return msgspec.structs.replace(run, result=msgspec.structs.replace(run.result, **fields))


@pytest.mark.parametrize(
    ("second", "recorded"), [(made_up(RATES), True), (made_up(RATES, other_cpu=0.5), False)], ids=["conclusive", "busy"]
)
def test_disturbed_run_is_repeated_before_recording(bench: list[list[Run]], second: list[Run], recorded: bool) -> None:
    first = made_up(RATES)
    # One of three pairs with socketify is left undisturbed, and two of all others.
    first = [
        replace_result(run, other_cpu=0.5) if run.repetition > (0 if run.peer == "socketify" else 1) else run
        for run in first
    ]
    bench += [first, second]
    assert check.main(["--record"]) == (Status.OK if recorded else Status.INCONCLUSIVE)
    assert check.RECORDED.exists() == recorded
    assert bench == []


def test_result_bounded_by_the_load_program_is_recorded_with_a_warning(
    bench: list[list[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    bench += [[replace_result(run, load_cpu=0.95) for run in made_up(RATES)]]
    assert check.main(["--record"]) == Status.OK
    assert "bound by the load program" in capsys.readouterr().err


def test_nothing_is_recorded_on_a_busy_machine(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES, other_cpu=0.5), made_up(RATES, other_cpu=0.5)]
    assert check.main(["--record"]) == Status.INCONCLUSIVE
    assert not check.RECORDED.exists()


def test_check_without_a_record_measures_nothing(bench: list[list[Run]]) -> None:
    assert check.main([]) == Status.INCONCLUSIVE


@pytest.mark.parametrize("status", list(Status))
def test_more_instructions_are_worse(bench: list[list[Run]], monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    monkeypatch.setattr(check, "COUNT", (sys.executable, "-c", f"raise SystemExit({int(status)})"))
    bench += [made_up(RATES), made_up(RATES)]
    check.main(["--record"])
    assert check.main([]) == status


def test_instructions_are_not_judged_without_valgrind(
    bench: list[list[Run]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    bench += [made_up(RATES), made_up(RATES)]
    check.main(["--record"])
    monkeypatch.setattr(check, "COUNT", ("/usr/bin/env", f"PATH={tmp_path}", *COUNT))
    assert check.main([]) == Status.INCONCLUSIVE
    said = capfd.readouterr()
    assert "valgrind" in said.err
    assert "the instructions could not be compared" in said.out


def test_check_takes_at_most_ninety_seconds() -> None:
    steps, _ = check.plan_steps()
    # The instructions take some 15 seconds.
    assert sum(step.load.expected for step in steps) <= 60, "it leaves time to measure some of it once more"
