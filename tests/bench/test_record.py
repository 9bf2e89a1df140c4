"""What is kept of a measurement can be read again."""

from pathlib import Path

from bench import record
from bench.figures import Run
from bench.measure import Publishing
from tests.bench.made_up import OPENING, opened, published


def made(scenario: str, *runs: Run) -> record.Record:
    """A record of these runs."""
    return record.Record(
        scenario,
        f"python -m bench {scenario}",
        record.now(),
        record.machine(),
        dict(record.versions()),
        {"nats": "there is no nats-server"},
        {"floor": "has no TLS"},
        [record.Failed("redis", OPENING, "it broke")],
        list(runs),
    )


def test_record_round_trips(tmp_path: Path) -> None:
    file = tmp_path / "results" / "mixed.json"
    load = Publishing(subscribers=3, rate=20.0, transport="tls", sample=0.1)
    saved = made("mixed", published("wsbroker", 1.0, load, samples=((0.1, 5), (0.2, 6))), opened("floor", 100.0))
    record.save(saved, file)
    assert record.load(file) == saved
    assert record.load_all(file.parent) == {"mixed": saved}


def test_each_run_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "fanout.json"
    record.save(made("fanout", published("wsbroker", 1.0), published("floor", 2.0)), file)
    assert [line.split(",")[0].strip() for line in file.read_text().splitlines() if "deliveries" in line] == [
        '{"peer":"wsbroker"',
        '{"peer":"floor"',
    ]


def test_record_without_runs_is_valid(tmp_path: Path) -> None:
    record.save(made("fanout"), tmp_path / "fanout.json")
    assert record.load(tmp_path / "fanout.json").runs == []


def test_recorded_ratios_of_the_check_are_not_read_as_a_scenario(tmp_path: Path) -> None:
    (tmp_path / "recorded.json").write_text("{}")
    assert record.load_all(tmp_path) == {}


def test_the_machine_and_the_versions_are_described() -> None:
    machine, versions = record.machine(), record.versions()
    assert machine["cpu"]
    assert int(machine["cores"]) >= 1
    assert {"wsbroker", "websockets", "picows", "socketify", "nats", "nchan", "redis", "uvloop"} <= set(versions)
