"""`make test ARGS=one_file` installs only what this file needs, so each test must declare its needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import PACKAGES

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in ROOT.glob("tests/**/test_*.py") if path != Path(__file__))

# What the text of a test file has that needs a program.
SIGNS = {
    "nginx": r'"nginx", "-p"',
    "node": r'which\("node"\)|"npx"|chaos\.rounds import .*SUBJECTS',
    "openssl": r'make_pair\(|"openssl"|openssl req',
    "peers": r"PEERS\[name\]\.missing\(\)",
    "systemd": r'"systemd-(socket-activate|analyze|sysusers)"',
    "valgrind": r"missing_tool\(\) is None",
}


def needs(*arguments: str) -> set[str]:
    command = [sys.executable, "-m", "tests.needs", "--list", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tests/test_topics.py"], set()),
        (["tests/browser/test_busy.py"], {"chromium"}),
        (["tests/test_nginx.py", "-x", "-n", "2"], {"nginx", "openssl"}),
        (["tests/node/test_ws.py", "-k", "compression"], {"node"}),
        (["tests/no_such_file.py"], set()),
    ],
)
def test_needs_are_those_of_the_collected_tests(arguments: list[str], expected: set[str]) -> None:
    assert needs(*arguments) == expected


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_needs_are_declared(file: Path) -> None:
    text = file.read_text()
    declared = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"mark\.needs\(([^)]*)\)", text))))
    assert declared <= PACKAGES.keys()
    assert {name for name, sign in SIGNS.items() if re.search(sign, text)} <= declared
