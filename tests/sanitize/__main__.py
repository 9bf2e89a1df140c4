"""Runs the tests of the native code once, while the sanitizers watch every byte that it touches.

`python -m tests.sanitize` copies the sources to build/sanitize, builds the extension there with gcc's address and
undefined behaviour sanitizers and with its assertions, and runs the tests of the native code. A report of a sanitizer
ends the process; the last name before it is that of the test. Exit status 0: nothing was found.
"""

from __future__ import annotations

import sys

import click

from tests.sanitize.build import NATIVE_TESTS, ROOT, prepare, run_tests

COPY = ROOT / "build" / "sanitize"


@click.command(
    help=(__doc__ or "").splitlines()[0],
    context_settings={"ignore_unknown_options": True},  # they are pytest's
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(arguments: tuple[str, ...]) -> None:
    """ARGUMENTS are passed to pytest: by default the folder of the native tests."""
    environ = prepare(COPY)
    sys.exit(run_tests(COPY, environ, *(arguments or (NATIVE_TESTS,))))


if __name__ == "__main__":
    main()
