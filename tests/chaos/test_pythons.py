"""The client installed by itself, on every CPython that this machine has: it goes through a round of chaos there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.rounds import Model, check, play, subject
from tests.client import model

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def pythons() -> dict[str, str]:
    """Each version that is here: from pyenv, or on the path; the one that runs this is always one of them."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for version in VERSIONS:
        candidates = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), Path(f"/usr/bin/python{version}")]
        for candidate in candidates:
            # Debian's own may lack the modules that make an environment.
            works = (
                candidate.exists()
                and subprocess.run([candidate, "-c", "import ensurepip"], check=False).returncode == 0
            )
            if works and version not in found:
                found[version] = str(candidate)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client as it is distributed: one wheel for all of them."""
    folder = tmp_path_factory.mktemp("wheel")
    run("cp", "-r", str(ROOT / "clients" / "python"), str(folder / "source"))
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "source"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize(("version", "python"), pythons().items())
async def test_client_works_on(version: str, python: str, wheel: Path, tmp_path: Path) -> None:
    run(python, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    own = str(tmp_path / "venv" / "bin" / "python")
    run(*PIP, "--python", own, "install", str(wheel))
    run(own, "-W", "error", "-c", "import wsbroker_client.sync, wsbroker_client.http, wsbroker_client.publisher")
    # The installed client, not that of the checkout: a file has its own folder first on its path.
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nexec {own} -W error {ROOT}/tests/chaos/subject.py\n")
    program.chmod(0o755)
    async with model.running() as broker, subject("python", str(program)) as driven:
        target = Model(broker)
        check(await play(target, driven, 3), target)


def run(*command: str) -> None:
    """Elsewhere: the checkout's own client is not to be found."""
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
