"""The figures of docs/benchmarks.md, made from the saved runs: `python -m bench report`.

Only what stands between the two markers is replaced; the prose around is written by hand.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import goals, record, tables
from bench.figures import remarks
from bench.measure import ROOT
from bench.peers import PEERS
from bench.scenarios import SCENARIOS, Scenario

DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- figures: made by `python -m bench report`, do not edit -->"
END = "<!-- end of figures -->"
# With more loads than this, one table shows what is compared, instead of one for each load.
TABLES = 3


def main(arguments: Sequence[str]) -> int:
    """Writes the figures and the plots; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the runs (default %(default)s)")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="to write them into (default %(default)s)")
    options = parser.parse_args(arguments)
    write(record.load_all(options.results), options.document)
    return 0


def write(records: Mapping[str, record.Record], document: Path) -> None:
    """Puts the figures of these records into the document, and their plots into a folder beside it.

    Raises ValueError if the document has no markers.
    """
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no markers for the figures")
    folder = document.parent / document.stem
    for old in folder.glob("*.svg"):
        old.unlink()
    document.write_text(f"{before}{BEGIN}\n\n{figures(records, folder)}\n\n{END}{after}")


def figures(records: Mapping[str, record.Record], folder: Path) -> str:
    """All figures in Markdown. The plots go to the folder, which lies beside the document."""
    if not records:
        return "Nothing has been measured yet."
    parts = ["### Machine and versions", *_machine(records), "### What to reach"]
    parts.append(tables.markdown(goals.table({name: found.runs for name, found in records.items()})))
    for name, scenario in SCENARIOS.items():
        parts.append(f"### {scenario.title}")
        parts += _scenario(scenario, records[name], folder) if name in records else ["Not measured."]
    return "\n\n".join(parts)


def _machine(records: Mapping[str, record.Record]) -> list[str]:
    parts: list[str] = []
    groups: dict[str, list[str]] = {}
    for name, found in records.items():
        described = {key: str(value) for key, value in found.machine.items()}
        described |= {key: value for key, value in found.versions.items() if key != "wsbroker"}
        groups.setdefault(", ".join(f"{key} {value}" for key, value in described.items()), []).append(name)
    for text, names in groups.items():
        which = "" if len(groups) == 1 else f" ({', '.join(names)})"
        parts.append(f"{text}.{which}")
    missing = {peer: reason for found in records.values() for peer, reason in found.missing.items()}
    if missing:
        parts.append("\n".join(f"- missing: `{peer}` ({reason})" for peer, reason in missing.items()))
    return parts


def _scenario(scenario: Scenario, found: record.Record, folder: Path) -> list[str]:
    # Imported here: a measurement needs no matplotlib.
    from bench import plots

    repeats = sorted({_repetitions(found, load) for load in tables.measured_loads(found.runs)})
    times = " to ".join(dict.fromkeys([str(repeats[0]), str(repeats[-1])])) if repeats else "0"
    noun = "repetition" if times == "1" else "repetitions"
    parts = [
        scenario.text,
        f"`{command(found)}`, {times} {noun}, {found.when[:10]}, wsbroker {found.versions.get('wsbroker', 'unknown')}:",
    ]
    drawn = [(plot, plots.draw(scenario, plot, found.runs, folder)) for plot in scenario.plots]
    parts += [
        f"![{scenario.title}: {plot.axis}, {plot.title}]({folder.name}/{file.name})" for plot, file in drawn if file
    ]
    loads = tables.measured_loads(found.runs)
    if len(loads) > TABLES:
        matrix = tables.matrix(scenario, found.runs, loads, [_short(str(load)) for load in loads])
        parts.append(f"In brackets: {tables.RATIO}.\n\n{tables.markdown(matrix)}")
    else:
        for load in loads:
            table = tables.of_load(scenario, found.runs, load)
            parts.append(f"{table.title[:1].upper()}{table.title[1:]}:\n\n{tables.markdown(table)}")
    notes = [f"{PEERS[name].title} {reason}." for name, reason in found.unable.items()]
    notes += scenario.remarks(found.runs)
    notes += [f"{PEERS[each.peer].title} failed at {each.load}: {each.error.splitlines()[0]}" for each in found.failed]
    notes += remarks(found.runs)
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return parts


def command(found: record.Record) -> str:
    """The command that measures this scenario as it was measured, also where it was one of several."""
    words = shlex.split(found.command)
    options = [word for word in words[3:] if word not in SCENARIOS]
    return shlex.join([*words[:3], found.scenario, *options])


def _repetitions(found: record.Record, load: object) -> int:
    runs = [run.peer for run in found.runs if run.load == load]
    return max(runs.count(peer) for peer in runs)


def _short(text: str) -> str:
    return text.replace(" subscribers", "").replace(" subscriber", "").replace("window ", "w ")
