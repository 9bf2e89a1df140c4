"""The guard: what it calls worse, and what too noisy to say."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from bench import check
from bench.check import Pair, Ratio, Status, Verdict
from bench.figures import Run
from bench.peers import BROKER, NATS
from bench.turns import Step
from tests.bench.made_up import published


def quiet(*ratios: float) -> list[Pair]:
    return [Pair(ratio, quiet=True) for ratio in ratios]


def disturbed(*ratios: float) -> list[Pair]:
    return [Pair(ratio, quiet=False) for ratio in ratios]


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        (quiet(1.0, 1.0, 1.0), "kept"),
        (quiet(0.85, 0.85, 0.85), "kept"),
        (quiet(3.0, 3.0, 3.0), "kept"),
        (quiet(0.84, 0.84, 0.84), "worse"),
        (quiet(0.5, 0.6, 0.8), "worse"),
        (quiet(0.5, 0.6, 0.9), "too noisy"),  # they do not agree
        (quiet(0.5), "too noisy"),
        (disturbed(0.5, 0.5, 0.5), "too noisy"),
        (disturbed(1.0, 1.0, 1.0), "kept"),
        ([*quiet(0.95, 0.95), *disturbed(0.1)], "kept"),
        ([*quiet(0.5, 0.5), *disturbed(1.0)], "worse"),
        ([*quiet(0.5), *disturbed(0.5, 0.5)], "too noisy"),
        ([], "not measured"),
    ],
)
def test_what_fell_by_more_than_15_percent_is_worse(pairs: Sequence[Pair], word: str) -> None:
    assert check.judge(pairs, 1.0).word == word


def test_what_was_never_recorded_is_not_judged() -> None:
    assert check.judge(quiet(0.1, 0.1), None).word == "not recorded"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["kept", "kept"], Status.KEPT),
        (["kept", "not measured"], Status.KEPT),
        (["kept", "worse", "too noisy"], Status.WORSE),
        (["kept", "too noisy"], Status.CANNOT_SAY),
        (["not measured", "not recorded"], Status.CANNOT_SAY),
    ],
)
def test_the_status_is_that_of_the_worst(words: list[str], status: Status) -> None:
    assert check.status_of({str(number): Verdict(word) for number, word in enumerate(words)}) == status  # type: ignore[arg-type]


def made_up(rates: dict[str, float], other_cpu: float = 0.0) -> list[Run]:
    """Three runs of each load of the part."""
    return [
        published(peer.name, rates[peer.name], load, other_cpu=other_cpu)
        for _, load, others in check.PART
        for _ in range(3)
        for peer in (BROKER, *others)
    ]


RATES = {"wsbroker": 1000.0, "floor": 1000.0, "socketify": 500.0, "nats": 250.0}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Run]]:
    """What the next measurements give, in order; nothing is recorded yet, and there are no counts of instructions."""
    given: list[list[Run]] = []

    def take(_: object, steps: Sequence[Step]) -> list[Run]:
        wanted = {(step.load, step.peer.name) for step in steps}
        return [run for run in given.pop(0) if (run.load, run.peer) in wanted]

    monkeypatch.setattr(check, "_take", take)
    monkeypatch.setattr(check, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(check, "INSTRUCTIONS", tmp_path / "instructions")
    return given


def test_what_was_recorded_is_kept(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up({**RATES, "wsbroker": 900.0})]
    assert check.main(["--record"]) == Status.KEPT
    recorded = msgspec.json.decode(check.RECORDED.read_bytes(), type=check.Recorded)
    assert recorded.ratios["onetoone: 1,000 subscribers, 1,000 topics, window 256, 128 B: of nats"] == Ratio(4.0, 0.0)
    assert len(recorded.ratios) == sum(len(others) for _, _, others in check.PART)
    assert check.main([]) == Status.KEPT


def test_what_is_worse_is_measured_once_more_and_named(
    bench: list[list[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    bench += [made_up(RATES), made_up({**RATES, "nats": 500.0}), made_up({**RATES, "nats": 400.0})]
    check.main(["--record"])
    assert check.main([]) == Status.WORSE
    assert bench == []
    worse = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("worse")]
    assert len(worse) == len([1 for _, _, others in check.PART if NATS in others])
    assert all("of nats" in line for line in worse)


def test_an_accident_does_not_come_twice(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES), made_up({**RATES, "nats": 500.0}), made_up(RATES)]
    check.main(["--record"])
    assert check.main([]) == Status.KEPT


def test_a_busy_machine_is_not_mistaken_for_a_slow_broker(bench: list[list[Run]]) -> None:
    slow = made_up({**RATES, "wsbroker": 100.0}, other_cpu=0.5)
    bench += [made_up(RATES), slow, slow]
    check.main(["--record"])
    assert check.main([]) == Status.CANNOT_SAY


def test_nothing_is_recorded_on_a_busy_machine(bench: list[list[Run]]) -> None:
    bench += [made_up(RATES, other_cpu=0.5)]
    assert check.main(["--record"]) == Status.CANNOT_SAY
    assert not check.RECORDED.exists()


def test_without_a_record_nothing_is_measured(bench: list[list[Run]]) -> None:
    assert check.main([]) == Status.CANNOT_SAY


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("raise SystemExit(0)", Status.KEPT),
        ("raise SystemExit(1)", Status.WORSE),
        ("raise SystemExit(2)", Status.CANNOT_SAY),
    ],
)
def test_more_instructions_are_worse(
    bench: list[list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, status: Status
) -> None:
    package = tmp_path / "bench" / "instructions"
    package.mkdir(parents=True)
    (tmp_path / "bench" / "__init__.py").touch()
    (package / "__main__.py").write_text(f"import sys\nassert sys.argv[1:] == ['--check']\n{program}\n")
    monkeypatch.setattr(check, "INSTRUCTIONS", package)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    bench += [made_up(RATES), made_up(RATES)]
    check.main(["--record"])
    assert check.main([]) == status


def test_the_part_takes_no_more_than_ninety_seconds() -> None:
    steps, _ = check.steps_of()
    assert sum(step.load.expected for step in steps) <= 65, "it leaves time to measure some of it once more"
