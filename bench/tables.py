"""The tables of the terminal and of the report, from the same cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import Run, figure, ratio, times
from bench.measure import Load
from bench.peers import BROKER, PEERS
from bench.scenarios import Scenario

RATIO = "wsbroker ÷ it"


@dataclass(frozen=True)
class Table:
    """Headings and rows of the same length; the first column is text, the others are figures."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def measured_loads(runs: Sequence[Run]) -> list[Load]:
    """The loads that there are runs of, in their order."""
    return list(dict.fromkeys(run.load for run in runs))


def of_load(scenario: Scenario, runs: Sequence[Run], load: Load, names_only: bool = False) -> Table:
    """A row for each peer: the medians of the scenario's columns, the spread of what is compared, and how many times
    the broker's figure is that of this peer. `names_only`: without the peers' long names."""
    rows = []
    for name, title in _peers(runs, load):
        compared = figure(runs, load, name, scenario.compared)
        cells = [figure(runs, load, name, column.value) for column in scenario.columns]
        against = ratio(runs, load, BROKER.name, name, scenario.compared)
        rows.append(
            [
                name if names_only else title,
                *(
                    column.write(cell.median) if cell else ""
                    for column, cell in zip(scenario.columns, cells, strict=True)
                ),
                f"±{compared.spread:.0%}" if compared else "",
                times(against.median) if against and name != BROKER.name else "",
            ]
        )
    return Table(str(load), ["", *(column.heading for column in scenario.columns), "spread", RATIO], rows)


def matrix(scenario: Scenario, runs: Sequence[Run], loads: Sequence[Load], headings: Sequence[str]) -> Table:
    """A row for each peer, a column for each load: what is compared, and in brackets how many times the broker's
    figure is that of this peer."""
    column = next(column for column in scenario.columns if column.value is scenario.compared)
    rows = []
    for name, title in dict.fromkeys(peer for load in loads for peer in _peers(runs, load)):
        cells = []
        for load in loads:
            found = figure(runs, load, name, scenario.compared)
            against = ratio(runs, load, BROKER.name, name, scenario.compared) if name != BROKER.name else None
            cells.append(
                "" if not found else column.write(found.median) + (f" ({times(against.median)})" if against else "")
            )
        rows.append([title, *cells])
    return Table(scenario.title, ["", *headings], rows)


def _peers(runs: Sequence[Run], load: Load) -> list[tuple[str, str]]:
    present = {run.peer for run in runs if run.load == load}
    return [(name, peer.title) for name, peer in PEERS.items() if name in present]


def markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = [
        "| " + " | ".join(table.headings) + " |",
        "|---|" + "---:|" * (len(table.headings) - 1),
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    return "\n".join(lines)
