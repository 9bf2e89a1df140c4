"""The units for systemd, as far as they can be tried where systemd is not process 1: with its own programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from broker.auth.configured import load_authenticator, requires_identity
from broker.config import Reading, load
from tests.fixtures_certificates import make_pair, trusting
from tests.test_systemd import activated, bound

pytestmark = pytest.mark.needs("openssl", "systemd")

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "systemd"
INSTALLED = "/opt/wsbroker/bin/wsbroker"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The units, for a broker that is installed."""
    text = (UNITS / "wsbroker.service").read_text()
    assert text.count(INSTALLED) == 1
    ours = Path(sys.executable).parent / "wsbroker"
    assert ours.exists()
    (tmp_path / "wsbroker.service").write_text(text.replace(INSTALLED, str(ours)))
    shutil.copy(UNITS / "wsbroker.socket", tmp_path)
    return tmp_path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("drop_in", [False, True])
def test_systemd_accepts_the_units(folder: Path, drop_in: bool) -> None:
    if drop_in:
        shutil.copytree(UNITS / "wsbroker.service.d", folder / "wsbroker.service.d")
    done = analyze("verify", "--man=no", folder / "wsbroker.service", folder / "wsbroker.socket")
    # Its exit status is 0 also for words that it does not know.
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_accepts_the_units_in_the_docs(folder: Path) -> None:
    text = (ROOT / "docs" / "deploy-systemd.md").read_text()
    admin, local = re.findall(r"```ini\n(.*?)```", text, re.DOTALL)
    (folder / "wsbroker-admin.socket").write_text(admin)
    (folder / "wsbroker.service.d").mkdir()
    (folder / "wsbroker.service.d" / "local.conf").write_text(local)
    units = [folder / name for name in ("wsbroker.service", "wsbroker.socket", "wsbroker-admin.socket")]
    done = analyze("verify", "--man=no", *units)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_unit_key_is_reported(folder: Path) -> None:
    with (folder / "wsbroker.service").open("a") as unit:
        unit.write("\n[Service]\nProtectEverything=yes\n")
    assert "ProtectEverything" in analyze("verify", "--man=no", folder / "wsbroker.service").stderr


def test_service_is_hardened(folder: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=15", folder / "wsbroker.service")
    assert done.returncode == 0, done.stdout


def test_user_and_directory_are_created(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("sysusers", "tmpfiles"):
        (tmp_path / f"usr/lib/{name}.d").mkdir(parents=True)
        shutil.copy(UNITS / f"wsbroker.{name}", tmp_path / f"usr/lib/{name}.d/wsbroker.conf")
    for command in (["systemd-sysusers"], ["systemd-tmpfiles", "--create"]):
        done = subprocess.run([*command, f"--root={tmp_path}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert re.search(
        r"^wsbroker:.*:/nonexistent:/usr/sbin/nologin$", (tmp_path / "etc/passwd").read_text(), re.MULTILINE
    )
    assert (tmp_path / "etc/wsbroker").stat().st_mode & 0o7777 == 0o750


@pytest.mark.parametrize("file", sorted(UNITS.rglob("*.service")) + sorted(UNITS.rglob("*.conf")), ids=lambda p: p.name)
def test_settings_in_the_units_exist(file: Path) -> None:
    found = dict(re.findall(r"^Environment=(WSBROKER_\w+)=(.*)$", file.read_text(), re.MULTILINE))
    reading = Reading(Path(os.devnull), found, {})
    # The file has the keys that a required identity needs.
    assert {problem.key for problem in reading.problems} <= {"auth.required"}
    assert reading.config.server.path == "/"


def test_clients_of_the_service_must_show_a_token(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("c2VjcmV0IG9mIDMyIGJ5dGVzIGF0IGxlYXN0LCByYW5kb20=\n")
    text = (UNITS / "wsbroker.toml").read_text()
    assert text.count("/etc/wsbroker/secret") == 1
    file = tmp_path / "wsbroker.toml"
    unit = (UNITS / "wsbroker.service").read_text()
    environ = dict(re.findall(r"^Environment=(WSBROKER_\w+)=(.*)$", unit, re.MULTILINE))
    for written in (text.replace("/etc/wsbroker/secret", str(secret)), "", "[auth]\nrequired = false\n"):
        file.write_text(written)
        reading = Reading(file, environ, {"server.listen": ["unix:/run/wsbroker/ws.sock"]})
        assert requires_identity(reading.config)
        # Without a key nobody could connect, and the broker says so and does not start.
        assert bool(reading.problems) is ("secret" not in written)
    file.write_text(text.replace("/etc/wsbroker/secret", str(secret)))
    assert load_authenticator(load(file, environ, {}), {}).anonymous is None


async def test_credentials_are_read_from_the_credentials_directory(tmp_path: Path) -> None:
    """A folder that nobody else may read, with files that nobody may write (systemd.exec(5))."""
    text = (UNITS / "wsbroker.service.d" / "credentials.conf").read_text()
    pair = make_pair(tmp_path)
    folder = tmp_path / "credentials"
    folder.mkdir()
    loaded = dict(re.findall(r"^LoadCredential=([\w.]+):.*/(\w+)\.pem$", text, re.MULTILINE))
    assert loaded == {"certificate.pem": "fullchain", "key.pem": "privkey"}
    for name, file in (("certificate.pem", pair.certificate), ("key.pem", pair.key)):
        shutil.copy(file, folder / name)
        (folder / name).chmod(0o400)
    folder.chmod(0o500)
    environ = dict(re.findall(r"^Environment=(WSBROKER_\w+)=(.*)$", text.replace("%d", str(folder)), re.MULTILINE))
    with bound() as tcp:
        async with activated([tcp], "--listen", "systemd", CREDENTIALS_DIRECTORY=str(folder), **environ) as daemon:
            await daemon.started()
            async with connect(f"wss://{daemon.addresses[0]}/", ssl=trusting(pair), proxy=None) as client:
                assert "welcome" in str(await client.recv())


def test_configuration_mistake_prevents_a_restart() -> None:
    text = (UNITS / "wsbroker.service").read_text()
    assert f"RestartPreventExitStatus={os.EX_CONFIG}\n" in text


def test_install_puts_the_files_in_place(tmp_path: Path) -> None:
    environ = {**os.environ, "DESTDIR": str(tmp_path)}
    subprocess.run([ROOT / "tools" / "install-service"], env=environ, check=True)
    installed = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in installed.items()} == {
        "etc/systemd/system/wsbroker.service": (UNITS / "wsbroker.service").read_text(),
        "etc/systemd/system/wsbroker.socket": (UNITS / "wsbroker.socket").read_text(),
        "etc/wsbroker/wsbroker.toml": (UNITS / "wsbroker.toml").read_text(),
        "etc/sysusers.d/wsbroker.conf": (UNITS / "wsbroker.sysusers").read_text(),
        "etc/tmpfiles.d/wsbroker.conf": (UNITS / "wsbroker.tmpfiles").read_text(),
    }
    modes = {name: path.stat().st_mode & 0o777 for name, path in installed.items()}
    assert modes.pop("etc/wsbroker/wsbroker.toml") == 0o640
    assert set(modes.values()) == {0o644}
    installed["etc/wsbroker/wsbroker.toml"].write_text("mine")
    subprocess.run([ROOT / "tools" / "install-service"], env=environ, check=True)
    assert installed["etc/wsbroker/wsbroker.toml"].read_text() == "mine"
