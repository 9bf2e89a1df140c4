"""Fuzzes the parsers, and tries the properties of the native code while sanitizers watch every byte that it touches.

First each parser of bytes from strangers (targets.py) is fuzzed for `--each` minutes, guided by coverage, with atheris.

`python -m tests.fuzz --minutes 10` copies the sources to build/fuzz, builds the extension there with gcc's address and
undefined behaviour sanitizers (see tests/sanitize/build.py), and runs the tests of the native code in rounds, with
more examples than otherwise and a new seed each, until the time is over. A failure ends it. Hypothesis keeps what fails
a test in build/fuzz/.hypothesis and tries it first the next time; a report of a sanitizer ends the process, and comes
again with `--seed` and the seed that was said. Exit status 0: nothing was found.
"""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import time

import click

from tests.fuzz.targets import TARGETS
from tests.sanitize.build import NATIVE_TESTS, ROOT, prepare, run_tests

COPY = ROOT / "build" / "fuzz"

TIMES = 3
"""How many times the examples of a normal test run there are in one round."""


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--minutes", type=click.FloatRange(min=0), default=10, show_default=True, help="How long to try.")
@click.option("--each", type=click.FloatRange(min=0), default=10, show_default=True, help="Minutes for each parser.")
@click.option("--seed", type=int, help="The seed of the first round, to repeat it.")
@click.argument("tests", nargs=-1)
def main(minutes: float, each: float, seed: int | None, tests: tuple[str, ...]) -> None:
    """TESTS are the tests to run, by default the parsers and then all of the native code."""
    if not tests and seed is None and each:
        fuzz_parsers(each)
    chosen = tests or (NATIVE_TESTS,)
    environ = prepare(COPY, FUZZ_TIMES=str(TIMES))
    until = time.monotonic() + minutes * 60
    while True:
        seed = random.randrange(2**32) if seed is None else seed
        click.echo(f"seed {seed}, {(until - time.monotonic()) / 60:.1f} minutes left")
        status = run_tests(COPY, environ, "-x", f"--hypothesis-seed={seed}", *chosen)
        if status != 0 or time.monotonic() > until:
            sys.exit(status)
        seed = None


def fuzz_parsers(minutes: float) -> None:
    """Fuzz what parses bytes of strangers, each parser for so many minutes. Exits at the first finding."""
    if importlib.util.find_spec("atheris") is None:
        click.echo("atheris is not installed: the parsers are not fuzzed")
        return
    for name in TARGETS:
        found = COPY.parent / "fuzz-corpus" / name
        found.mkdir(parents=True, exist_ok=True)
        click.echo(f"{name}, {minutes:g} minutes")
        options = [f"-max_total_time={minutes * 60:.0f}", "-timeout=10", f"-artifact_prefix={found.parent}/{name}-"]
        folders = [str(found), str(ROOT / "tests" / "fuzz" / "corpus" / name)]
        command = [sys.executable, "-m", "tests.fuzz.run_target", name, *options, "-print_final_stats=1", *folders]
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            sys.exit(status)


if __name__ == "__main__":
    main()
