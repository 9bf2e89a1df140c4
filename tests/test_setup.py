"""`tools/setup`: when it does what, with programs in place of Python that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CLIENT = "clients/python/pyproject.toml"
# Stands for Python and pip, and writes down how it was called.
PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *"-m venv"*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


class Checkout:
    """A checkout with nothing in it but what the setup looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder.parent / "calls"

    def setup(self, for_whom: str) -> str:
        """Run it, and give what it did: `venv`, `install`, `build`, `mkdocs`."""
        self.calls.write_text("")
        python = self.folder.parent / "python"
        environ = {**os.environ, "PYTHON": str(python), "CC": "true", "CALLS": str(self.calls)}
        subprocess.run([self.folder / "tools" / "setup", for_whom], env=environ, check=True, capture_output=True)
        words = {"-m venv": "venv", "--editable .": "install", "build_ext": "build", "--requirement": "mkdocs"}
        calls = self.calls.read_text().splitlines()
        return " ".join(done for call in calls for word, done in words.items() if word in call)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout that was just cloned."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    folder = tmp_path / "one"
    for name in ("tools/setup", "tools/packages", "tools/site/requirements.txt", "pyproject.toml", "setup.py", CLIENT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    # The assets of the site are there, with their checksums.
    asset = folder / ".tools" / "site" / "mermaid.min.js"
    asset.parent.mkdir(parents=True)
    asset.write_text("")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (folder / "tools/site/assets.sha256").write_text(f"{empty}  .tools/site/mermaid.min.js\n")
    for name in ("_speedups/speedups.pyx", "bench/load/load.c", "broker/_speedups.x.so", "broker/_load.x.so"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return Checkout(folder)


def age(path: Path, seconds: int) -> None:
    """Make a file older."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_setup_does_only_missing_steps(checkout: Checkout) -> None:
    assert checkout.setup("run") == "venv install"
    assert checkout.setup("run") == ""
    assert checkout.setup("dev") == "install"
    assert checkout.setup("dev") == ""
    assert checkout.setup("run") == ""


def test_client_of_a_checkout_is_its_sources(checkout: Checkout) -> None:
    checkout.setup("run")
    calls = checkout.calls.read_text().splitlines()
    places = [number for number, call in enumerate(calls) if "--editable ." in call or "--editable clients" in call]
    assert "--editable clients/python" in calls[places[-1]]
    assert len(places) == 2
    checkout.setup("run")
    age(checkout.folder / ".venv" / ".installed-run", 10)
    assert checkout.setup("run") == "install"


def test_docs_need_mkdocs_but_not_the_broker(checkout: Checkout) -> None:
    assert checkout.setup("docs") == "venv mkdocs"
    assert checkout.setup("docs") == ""
    assert checkout.setup("run") == "install"
    assert checkout.setup("docs") == ""


def test_dev_dependencies_include_bench_dependencies(checkout: Checkout) -> None:
    assert checkout.setup("bench") == "venv install"
    assert checkout.setup("dev") == "install"
    other = Checkout(checkout.folder.parent / "two")
    shutil.copytree(checkout.folder, other.folder)
    assert other.setup("dev") == "venv install"
    assert other.setup("bench") == ""


def test_setup_repeats_steps_older_than_their_sources(checkout: Checkout) -> None:
    checkout.setup("run")
    age(checkout.folder / ".venv" / ".built", 10)
    assert checkout.setup("run") == "build"
    age(checkout.folder / ".venv" / ".installed-run", 10)
    assert checkout.setup("run") == "install"
    assert checkout.setup("run") == ""


@pytest.mark.parametrize("for_whom", ["run", "dev"])
@pytest.mark.parametrize("way", ["copied", "moved"])
def test_the_environment_of_another_checkout_is_not_used(checkout: Checkout, way: str, for_whom: str) -> None:
    checkout.setup("dev")
    folder = checkout.folder.parent / "two"
    if way == "copied":
        subprocess.run(["cp", "-a", checkout.folder, folder], check=True)
    else:
        checkout.folder.rename(folder)
    other = Checkout(folder)
    (folder / ".venv" / "left-over").touch()
    assert other.setup(for_whom) == "venv install"
    assert not (folder / ".venv" / "left-over").exists()
    assert other.setup(for_whom) == ""
    if way == "copied":
        assert checkout.setup(for_whom) == ""


def test_checkout_reached_by_a_symlink_keeps_its_environment(checkout: Checkout) -> None:
    checkout.setup("run")
    link = checkout.folder.parent / "link"
    link.symlink_to(checkout.folder)
    assert Checkout(link).setup("run") == ""
