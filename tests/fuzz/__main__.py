"""Tries the properties of the native code on ever more examples, while the sanitizers watch every byte that it touches.

`python -m tests.fuzz --minutes 10` copies the sources to build/fuzz, builds the extension there with gcc's address and
undefined behaviour sanitizers, and runs the tests of the native code in rounds, with more examples than otherwise and a
new seed each, until the time is over. A failure ends it. Hypothesis keeps what fails a test in
build/fuzz/.hypothesis and tries it first the next time; a report of a sanitizer ends the process, and comes again with
`--seed` and the seed that was said. Exit status 0: nothing was found.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "fuzz"
SOURCES = ("_speedups", "broker", "tests", "pyproject.toml", "setup.py", "README.md", "LICENSE")

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"

TIMES = 3
"""How many times the examples of a normal test run there are in one round."""


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--minutes", type=click.FloatRange(min=0), default=10, show_default=True, help="How long to try.")
@click.option("--seed", type=int, help="The seed of the first round, to repeat it.")
@click.argument("tests", nargs=-1)
def main(minutes: float, seed: int | None, tests: tuple[str, ...]) -> None:
    """TESTS are the tests to run, by default all of the native code."""
    chosen = tests or ("tests/speedups",)
    environ = prepare()
    until = time.monotonic() + minutes * 60
    while True:
        seed = random.randrange(2**32) if seed is None else seed
        click.echo(f"seed {seed}, {(until - time.monotonic()) / 60:.1f} minutes left")
        status = run(environ, f"--hypothesis-seed={seed}", *chosen)
        if status != 0 or time.monotonic() > until:
            sys.exit(status)
        seed = None


def prepare() -> dict[str, str]:
    """Make the copy and build it; the environment in which Python runs it."""
    COPY.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        target = COPY / name
        if target.is_dir():
            shutil.rmtree(target)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "node_modules"))
        else:
            shutil.copy(ROOT / name, target)
    click.echo("building with sanitizers …")
    flags = {"CFLAGS": SANITIZE, "LDFLAGS": SANITIZE}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=COPY, env=os.environ | flags, check=True, stderr=subprocess.DEVNULL)
    environ = os.environ | {
        "LD_PRELOAD": _library("libasan.so"),
        # Python keeps much until its end on purpose. A fault must end the process, with the report of the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Each object on its own, so that what lies behind it is not one more of Python's own.
        "PYTHONMALLOC": "malloc",
        "FUZZ_TIMES": str(TIMES),
    }
    where = [sys.executable, "-c", "import broker._speedups as it; print(it.__file__)"]
    built = subprocess.run(where, cwd=COPY, env=environ, check=True, capture_output=True, text=True).stdout
    if not Path(built.strip()).is_relative_to(COPY):
        raise click.ClickException(f"Python would import {built.strip()} instead of the copy")
    return environ


def run(environ: dict[str, str], *arguments: str) -> int:
    """Run tests in the copy; the exit status."""
    command = [sys.executable, "-m", "pytest", "-x", *arguments]
    # Each test takes as long as it takes. What a sanitizer writes must not be captured, since it ends the process; then
    # the last name is that of the test.
    command += ["-o", "faulthandler_timeout=0", "--capture=sys", "--verbose", "--no-header"]
    return subprocess.run(command, cwd=COPY, env=environ, check=False).returncode


def _library(name: str) -> str:
    asked = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return asked.stdout.strip()


if __name__ == "__main__":
    main()
