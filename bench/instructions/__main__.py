"""The command line: python -m bench.instructions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.instructions import record
from bench.instructions.cases import CASES
from bench.instructions.count import CountError, count
from bench.instructions.record import RECORDED, TOLERANCE, Comparison, Record
from bench.native import BuildError

# The exit status where there is nothing to compare, or nothing to count with; 1 is for what has grown.
INCONCLUSIVE = 2


def main() -> int:
    options = _parse()
    cases = [case for case in CASES if not options.case or case.name in options.case]
    now = Record(record.made_with(), count(cases, options.keep))
    before = record.load()
    print(record.show({case.name: case.about for case in cases}, before, now))
    if options.json:
        record.save(now, options.json)
    if options.record:
        # Of some cases alone: the others stay as they were, if they are comparable.
        if before is not None and options.case and before.made_with != now.made_with:
            print("recorded with other tools than here: record all cases", file=sys.stderr)
            return 1
        kept = before.costs if before is not None and options.case else {}
        record.save(Record(now.made_with, {**kept, **now.costs}), RECORDED)
        return 0
    if not options.check:
        return 0
    if before is None:
        print("nothing is recorded: python -m bench.instructions --record", file=sys.stderr)
        return INCONCLUSIVE
    if options.case:
        before = Record(before.made_with, {name: before.costs[name] for name in before.costs if name in options.case})
    return verdict(record.compare(before, now))


def verdict(comparison: Comparison) -> int:
    """Says what a comparison means, and returns the exit status."""
    if comparison.foreign:
        print(f"not comparable: {comparison.foreign}", file=sys.stderr)
        return INCONCLUSIVE
    if comparison.unknown:
        print(f"recorded and counted cases differ ({', '.join(comparison.unknown)}): record them", file=sys.stderr)
    if comparison.shrunk:
        print(f"cheaper than recorded: {', '.join(comparison.shrunk)}; record it, so that it stays so")
    if comparison.grown:
        print(f"grown beyond tolerance ({TOLERANCE:.0%}): {', '.join(comparison.grown)}", file=sys.stderr)
    return 1 if comparison.grown or comparison.unknown else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.instructions", description="Counts the instructions of the data path, under callgrind."
    )
    parser.add_argument("case", nargs="*", help=f"only these: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--check", action="store_true", help="fail if a case has grown since it was recorded")
    parser.add_argument("--record", action="store_true", help="record the counts in bench/instructions/recorded.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the counts and what they were made with")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for callgrind's files (see callgrind_annotate)")
    options = parser.parse_args()
    if unknown := {*options.case} - {case.name for case in CASES}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CountError, BuildError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(INCONCLUSIVE)
    except KeyboardInterrupt:
        sys.exit(130)
