"""The command line: `python -m bench` measures everything, `python -m bench SCENARIO…` a part of it.

`python -m bench report` makes the figures of docs/benchmarks.md from the saved runs, `python -m bench check` compares a
short part with what is recorded, `python -m bench durable` measures acknowledged publishes.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import check, durable, goals, record, report, tables
from bench.figures import remarks
from bench.measure import raise_open_files
from bench.native import BuildError
from bench.peers import PEERS
from bench.scenarios import SCENARIOS
from bench.terminal import console, following, show
from bench.turns import Outcome, Plan, Runner, plan

# Everything is to take less than this. Runs are repeated because of disturbances only while there is time.
WHOLE = 14 * 60.0


def main() -> int:
    """Does what the command line says; the exit status."""
    raise_open_files()
    # So that the server under test is stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["report"]:
            return report.main(arguments[1:])
        if arguments[:1] == ["check"]:
            return check.main(arguments[1:])
        if arguments[:1] == ["durable"]:
            return durable.main(arguments[1:])
        return _measure(arguments)
    except BuildError as error:
        print(f"bench: {error}", file=sys.stderr)
        return check.Status.INCONCLUSIVE if arguments[:1] == ["check"] else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _measure(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    scenarios = [SCENARIOS[name] for name in options.scenario or SCENARIOS]
    planned = plan(scenarios, options.peer, options.repeat, options.seconds)
    out, err = console(), console(stderr=True)
    if options.list:
        _list(planned, out)
        return 0
    for name, reason in planned.missing.items():
        err.print(f"missing: {name} ({reason})", style="yellow", soft_wrap=True)
    runner = Runner(options.retries, WHOLE)
    with following(err, planned.steps) as display:
        outcomes = runner.run(planned.steps, display.before, display.after)
    command = shlex.join(["python", "-m", "bench", *arguments])
    for scenario in scenarios:
        found = outcomes.get(scenario.name, Outcome())
        made = record.Record(
            scenario.name,
            command,
            record.now(),
            record.machine(),
            dict(record.versions()),
            planned.missing,
            planned.unable.get(scenario.name, {}),
            [record.Failed(each.peer, each.load, each.error) for each in found.failures],
            found.runs,
        )
        if file := _file(options, scenario.name):
            record.save(made, file)
        _show(out, made)
    reached = goals.table({name: found.runs for name, found in outcomes.items()}, all_of_them=not options.scenario)
    if reached.rows:
        show(out, reached)
    failures = [failure for found in outcomes.values() for failure in found.failures]
    for failure in failures:
        err.print(f"failed: {failure.peer}, {failure.load}: {failure.error.splitlines()[0]}", style="red")
    return 1 if failures else 0


def _show(out: Console, made: record.Record) -> None:
    scenario = SCENARIOS[made.scenario]
    out.rule(scenario.title, align="left")
    for load in tables.measured_loads(made.runs):
        show(out, tables.of_load(scenario, made.runs, load, names_only=True))
    for line in [
        *(f"{PEERS[name].title} {lack}." for name, lack in made.unable.items()),
        *scenario.remarks(made.runs),
        *remarks(made.runs),
    ]:
        out.print(line)
    out.print()


def _file(options: argparse.Namespace, scenario: str) -> Path | None:
    if options.json is None:
        # A part of the peers must not take the place of the whole.
        return None if options.peer else record.RESULTS / f"{scenario}.json"
    given: Path = options.json
    return given if len(options.scenario) == 1 else given / f"{scenario}.json"


def _list(planned: Plan, out: Console) -> None:
    rows = []
    for scenario in SCENARIOS.values():
        steps = [step for step in planned.steps if step.scenario == scenario.name]
        if steps:
            peers = ", ".join(dict.fromkeys(step.peer.name for step in steps))
            rows.append([scenario.name, f"{len(steps)}", f"{sum(step.load.expected for step in steps):.0f} s", peers])
    table = tables.Table(f"{planned.expected / 60:.1f} minutes", ["scenario", "runs", "takes about", "peers"], rows)
    show(out, table)
    for name, reason in planned.missing.items():
        out.print(f"missing: {name} ({reason})", soft_wrap=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures the broker beside its peers. See docs/benchmarks.md.",
        epilog="python -m bench report: the figures of docs/benchmarks.md. python -m bench check: the guard.",
    )
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help=f"one of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="only this one; repeatable. Saves nothing")
    parser.add_argument("--repeat", type=_positive, help="repetitions of each measurement")
    parser.add_argument("--seconds", type=float, help="of each run that publishes, after its warm-up")
    parser.add_argument(
        "--retries", type=int, default=2, help="repeat a run so often if others disturb it (default %(default)s)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="for the runs (default bench/results/SCENARIO.json); a folder if there are several scenarios",
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured, and how long it takes")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.scenario if name not in SCENARIOS]:
        parser.error(f"there is no scenario {', '.join(unknown)}; choose from {', '.join(SCENARIOS)}")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
