"""Every code block of README.md, CONTRIBUTING.md, docs/ and examples/README.md runs, or says why it cannot."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.snippets import LANGUAGES, PAGES, ROOT, Step, read

pytestmark = pytest.mark.needs("snippets", "chromium", "docs", "nginx", "openssl")

SKIPPED = 30
"""Blocks with `skip`. Keep it small: a block that runs cannot become wrong unnoticed."""

NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
PASSIVE = {"skip", "checked"}


@functools.cache
def isolated() -> tuple[str, ...]:
    """The command that gives a page its namespaces; empty if this system allows none."""
    overlay = 'd=$(mktemp -d) && mount -t tmpfs tmpfs "$d" && mkdir "$d/u" "$d/w" && mount -t overlay overlay '
    overlay += '-o "lowerdir=/opt,upperdir=$d/u,workdir=$d/w" /opt && ip link set lo up'
    for user in ((), ("--map-root-user",)):
        command = (*NAMESPACES, *user)
        if subprocess.run([*command, "sh", "-c", overlay], capture_output=True, check=False).returncode == 0:
            return command
    return ()


def runs(step: Step) -> bool:
    """Whether there is something to do."""
    return not PASSIVE & step.marker.keys() and step.language != "mermaid"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_has_a_language_and_a_known_marker(page: Path) -> None:
    for step in read(page):
        where = f"{page.name}:{step.line}"
        if not step.language and step.marker:
            continue
        assert step.language in LANGUAGES, where
        if step.language in ("text", "ini"):
            assert {"output", "checked", "skip", "file"} & step.marker.keys(), where
        if step.language == "html":
            assert {"file", "skip"} & step.marker.keys(), where
        if checked := step.marker.get("checked"):
            assert (ROOT / checked).is_file(), where
        if "skip" in step.marker:
            assert len(step.marker["skip"].split()) >= 3, f"{where}: a reason, please"


def test_number_of_blocks_that_do_not_run() -> None:
    skipped = [
        f"{page.name}:{step.line}: {step.marker['skip']}"
        for page in PAGES
        for step in read(page)
        if "skip" in step.marker
    ]
    assert len(skipped) == SKIPPED, "\n".join(skipped)


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, read(page)))], ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    command = isolated()
    if not command:
        if os.environ.get("CI"):
            pytest.fail("this system allows no namespaces")
        pytest.skip("this system allows no namespaces")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"page": str(page), "steps": [step.as_dict() for step in read(page) if runs(step)]}))
    # Neither settings of a broker, nor what `make test ARGS=…` hands on to each `make` that a page runs.
    foreign = ("WSBROKER_", "MAKE", "MFLAGS", "ARGS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    programs = f"{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run(
        [*command, sys.executable, str(Path(__file__).with_name("sandbox.py")), str(plan)],
        env={**environ, "PATH": programs, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
