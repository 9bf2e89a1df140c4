"""How the libraries of each language are installed, into build/interop, and their programs started.

A kit takes a library and gives the command of its program, or raises `MissingError` with what to install. Versions are
pinned: in libraries.py for Python, in package-lock.json for Node, in go.mod for Go. Java, Chromium and curl are those
of the system.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from os import environ
from pathlib import Path

from tests.interop.libraries import Library

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "interop"

Command = list[str]


class MissingError(Exception):
    """A tool or a library is not there and could not be installed; says what to install."""


def python(library: Library) -> Command:
    """An environment of its own, in which each library is installed the first time that it is asked for."""
    interpreter = BUILD / "python" / "bin" / "python"
    installed = BUILD / "python" / f"installed-{library.package}"
    if not interpreter.exists():
        execute(sys.executable, "-m", "venv", str(BUILD / "python"))
    if not installed.exists():
        pip = (str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        execute(*pip, library.package)
        installed.touch()
    return python_program(library, str(interpreter))


def python_program(library: Library, interpreter: str = sys.executable) -> Command:
    """The program of a library that an interpreter has."""
    return [interpreter, "-m", f"tests.interop.python.{library.program}"]


def node(library: Library) -> Command:
    """Packages of npm, among them a Node that is new enough to have a WebSocket of its own."""
    folder = BUILD / "node"
    packages("npm=npm")
    shutil.copytree(HERE / "node", folder, dirs_exist_ok=True)
    lock = folder / "package-lock.json"
    installed = folder / "installed"
    if not installed.exists() or installed.read_text() != lock.read_text():
        execute("npm", "ci", "--prefix", str(folder), "--no-audit", "--no-fund", "--loglevel=error")
        installed.write_text(lock.read_text())
    pinned = sorted((folder / "node_modules").glob("node-*/bin/node"))
    interpreter = str(pinned[0]) if pinned else "node"
    version = execute(interpreter, "--version").strip()
    if int(version.lstrip("v").partition(".")[0]) < 22:
        raise MissingError(f"node is {version}: install Node 22 or later")
    return [interpreter, str(folder / library.program)]


def go(library: Library) -> Command:
    """One program with all libraries."""
    packages("go=golang-go")
    program = BUILD / "go" / "interop"
    execute("go", "build", "-C", str(HERE / "go"), "-o", str(program), ".")
    return [str(program), library.program]


def java(library: Library) -> Command:
    """The client of the Java that is there, from 11 on."""
    packages("javac=default-jdk-headless", "java=default-jdk-headless")
    source = HERE / "java" / f"{library.program}.java"
    execute("javac", "-encoding", "UTF-8", "-d", str(BUILD / "java"), str(source))
    return ["java", "-cp", str(BUILD / "java"), library.program]


def curl(library: Library) -> Command:
    """The command that the variable CURL names, or `curl`. Older versions and some builds do not speak WebSocket."""
    name = environ.get("CURL", "curl")
    if shutil.which(name) is None:
        raise MissingError("install curl 8.11 or later, or set CURL to one")
    version = execute(name, "--version")
    if not re.search(r"^Protocols:.* ws\b", version, re.MULTILINE):
        found = " ".join(version.split()[:2])
        raise MissingError(f"{found} has no ws among its protocols: install 8.11 or later, or set CURL to one")
    return [str(HERE / "curl" / library.program)]


def chromium(library: Library) -> Command:
    """Debian's Chromium, driven by the Playwright of this environment."""
    packages("chromium=chromium")
    return [sys.executable, "-m", f"tests.interop.chromium.{library.program}"]


KITS: dict[str, Callable[[Library], Command]] = {
    "python": python,
    "node": node,
    "go": go,
    "java": java,
    "curl": curl,
    "chromium": chromium,
}


def packages(*pairs: str) -> None:
    """Have programs of the system, as tools/packages does."""
    execute(str(ROOT / "tools" / "packages"), *pairs)


def execute(*command: str) -> str:
    """Run a command that installs or builds; gives its output. Raises MissingError with the end of it if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise MissingError(f"{Path(command[0]).name}: {lines[-1].strip()}")
    return done.stdout
