"""A copy of the sources, built with gcc's sanitizers: for `make sanitize` and `make fuzz`.

The copy stands apart, so that the extension of the checkout stays as it is. The build also defines DEBUG_STATES: with
it the native code asserts what it takes for granted, as that a change of state is one of its table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
SOURCES = ("_speedups", "broker", "clients", "tests", "bench", "pyproject.toml", "setup.py", "README.md", "LICENSE")

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
DEBUG = "-DDEBUG_STATES=1"

NATIVE_TESTS = "tests/speedups"


def prepare(copy: Path, **more: str) -> dict[str, str]:
    """Copy the sources and build them; return the environment, with `more` variables, in which Python runs the copy.

    Raises click.ClickException where the build fails, or where Python would import another build.
    """
    copy_sources(copy)
    click.echo(f"building in {copy.relative_to(ROOT)} with sanitizers …")
    flags = {"CFLAGS": f"{SANITIZE} {DEBUG}", "LDFLAGS": SANITIZE}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=copy, env=os.environ | flags, check=False, capture_output=True, text=True)
    if built.returncode != 0:
        raise click.ClickException(f"the build failed:\n{built.stderr[-4000:]}")
    environ = os.environ | {
        "LD_PRELOAD": _library("libasan.so"),
        # Python keeps much until its end on purpose. A fault must end the process, with the report of the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Each object on its own, so that what lies behind it is not one more of Python's own.
        "PYTHONMALLOC": "malloc",
        **more,
    }
    where = [sys.executable, "-c", "import broker._speedups as it; print(it.__file__)"]
    asked = subprocess.run(where, cwd=copy, env=environ, check=False, capture_output=True, text=True)
    if asked.returncode != 0:
        raise click.ClickException(f"the copy cannot be imported:\n{asked.stderr[-4000:]}")
    if not Path(asked.stdout.strip()).is_relative_to(copy):
        raise click.ClickException(f"Python would import {asked.stdout.strip()} instead of the copy")
    return environ


def copy_sources(copy: Path) -> None:
    """Bring a copy up to date. What else is in its folder stays, as the examples that hypothesis keeps."""
    copy.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        target = copy / name
        if target.is_dir():
            shutil.rmtree(target)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "node_modules")
            shutil.copytree(ROOT / name, target, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target)


def run_tests(copy: Path, environ: Mapping[str, str], *arguments: str) -> int:
    """Run pytest in the copy; return the exit status."""
    command = [sys.executable, "-m", "pytest", *arguments]
    # Each test takes as long as it takes. What a sanitizer writes must not be captured, since it ends the process; then
    # the last name is that of the test.
    command += ["-o", "faulthandler_timeout=0", "--capture=sys", "--verbose", "--no-header"]
    return subprocess.run(command, cwd=copy, env=environ, check=False).returncode


def _library(name: str) -> str:
    asked = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return asked.stdout.strip()
