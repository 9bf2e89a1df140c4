"""The report: figures and plots from saved runs, put between the markers of the document."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import plots, record, report
from bench.measure import Publishing
from bench.scenarios import SCENARIOS
from tests.bench.made_up import opened, published
from tests.bench.test_record import made

DOCUMENT = f"# Title\n\nBefore.\n\n{report.BEGIN}\n\nfigures of yesteryear\n\n{report.END}\n\nAfter.\n"


@pytest.fixture(scope="module")
def records() -> dict[str, record.Record]:
    """A whole run."""
    found = {}
    for name, scenario in SCENARIOS.items():
        runs = [
            published(peer.name, 100.0 + number, load, samples=((0.1, 50_000_000), (0.2, 51_000_000)))
            if isinstance(load, Publishing)
            else opened(peer.name, 2000.0, load)
            for load in scenario.loads
            for number, peer in enumerate(scenario.peers)
        ]
        found[name] = made(name, *runs)
    return found


@pytest.fixture(scope="module")
def document(records: dict[str, record.Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document with the report of it."""
    file = tmp_path_factory.mktemp("docs") / "benchmarks.md"
    file.write_text(DOCUMENT)
    report.write(records, file)
    return file


def test_text_around_the_tables_is_kept(document: Path) -> None:
    text = document.read_text()
    assert text.startswith("# Title\n\nBefore.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "yesteryear" not in text


def test_report_has_every_scenario_with_its_command(document: Path) -> None:
    text = document.read_text()
    for name, scenario in SCENARIOS.items():
        assert f"### {scenario.title}\n" in text
        assert f"`python -m bench {name}`, 1 repetition, " in text
    assert "| connect with handshake, server CPU | 130 µs | 90 µs | 100 µs ±0% | yes |" in text


def test_report_lists_missing_and_failed_runs(document: Path) -> None:
    text = document.read_text()
    assert "- missing: `nats` (there is no nats-server)" in text
    assert "- C floor, a send per read batch has no TLS." in text
    assert "- Redis pub/sub, no WebSocket failed at 5,000 connections, idle, 64 at a time: it broke" in text


def test_report_names_unreliable_runs(tmp_path: Path) -> None:
    load = SCENARIOS["pipelined"].loads[0]
    runs = [published("wsbroker", 1.0, load, load_cpu=0.95), published("nats", 1.0, load, other_cpu=0.5)]
    text = report.figures({"pipelined": made("pipelined", *runs)}, tmp_path)
    assert "- In 1 of 2 runs the load program was busy for more than 90% of the time: " in text
    assert "- In 1 of 2 runs other programs used more than 10% of a core: " in text


def test_every_plot_is_small_and_shown_in_the_document(document: Path) -> None:
    text, folder = document.read_text(), document.parent / "benchmarks"
    pictures = {file.name for file in folder.iterdir()}
    assert pictures == {f"{name}-{plot.name}.svg" for name, scenario in SCENARIOS.items() for plot in scenario.plots}
    for file in folder.iterdir():
        assert f"](benchmarks/{file.name})" in text
        assert file.stat().st_size < 60_000
        assert ET.fromstring(file.read_text()).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_plot_can_be_read_alone(document: Path) -> None:
    for name, scenario in SCENARIOS.items():
        for plot in scenario.plots:
            svg = (document.parent / "benchmarks" / f"{name}-{plot.name}.svg").read_text()
            assert f">{scenario.title}: {plot.metric}<" in svg
            assert f"{'Lower' if scenario.less_is_better else 'Higher'} is better." in svg
            assert ("C floor, " in svg) == ("C floor: a C program" in svg)
            assert not (plot.kind == "bars" and plot.logarithmic), "a bar has no length on a logarithmic axis"


def test_a_plot_suits_light_and_dark_pages(document: Path) -> None:
    for file in (document.parent / "benchmarks").iterdir():
        svg = file.read_text().lower()
        assert "#ffffff" not in svg
        assert "fill: #000000" not in svg
        assert "stroke: #000000" not in svg


def test_report_is_deterministic(records: dict[str, record.Record], document: Path, tmp_path: Path) -> None:
    again = tmp_path / "benchmarks.md"
    again.write_text(document.read_text())
    report.write(records, again)
    assert again.read_text() == document.read_text()
    for file in (document.parent / "benchmarks").iterdir():
        assert (tmp_path / "benchmarks" / file.name).read_bytes() == file.read_bytes()


def test_obsolete_plots_are_removed(records: dict[str, record.Record], tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text(DOCUMENT)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "old-plot.svg").touch()
    report.write({"pipelined": records["pipelined"]}, file)
    assert [each.name for each in (tmp_path / "benchmarks").iterdir()] == ["pipelined-rate.svg"]
    assert "### Idle connections\n\nNot measured." in file.read_text()


def test_no_plot_is_drawn_without_data(tmp_path: Path) -> None:
    scenario = SCENARIOS["fanout"]
    assert plots.draw(scenario, scenario.plots[0], [], tmp_path) is None


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text("# Title\n")
    with pytest.raises(ValueError, match="no markers"):
        report.write({}, file)
    assert file.read_text() == "# Title\n"


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ("python -m bench", "python -m bench fanout"),
        ("python -m bench fanout idle --repeat 3", "python -m bench fanout --repeat 3"),
    ],
)
def test_command_names_only_the_scenario(measured: str, shown: str) -> None:
    found = record.Record("fanout", measured, "", {}, {}, {}, {}, [], [])
    assert report.command(found) == shown
