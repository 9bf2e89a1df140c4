"""Tries the properties of the native code on ever more examples, while the sanitizers watch every byte that it touches.

`python -m tests.fuzz --minutes 10` copies the sources to build/fuzz, builds the extension there with gcc's address and
undefined behaviour sanitizers (see tests/sanitize/build.py), and runs the tests of the native code in rounds, with
more examples than otherwise and a new seed each, until the time is over. A failure ends it. Hypothesis keeps what fails
a test in build/fuzz/.hypothesis and tries it first the next time; a report of a sanitizer ends the process, and comes
again with `--seed` and the seed that was said. Exit status 0: nothing was found.
"""

from __future__ import annotations

import random
import sys
import time

import click

from tests.sanitize.build import NATIVE_TESTS, ROOT, prepare, run_tests

COPY = ROOT / "build" / "fuzz"

TIMES = 3
"""How many times the examples of a normal test run there are in one round."""


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--minutes", type=click.FloatRange(min=0), default=10, show_default=True, help="How long to try.")
@click.option("--seed", type=int, help="The seed of the first round, to repeat it.")
@click.argument("tests", nargs=-1)
def main(minutes: float, seed: int | None, tests: tuple[str, ...]) -> None:
    """TESTS are the tests to run, by default all of the native code."""
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


if __name__ == "__main__":
    main()
