"""What is built and installed, tried as a user would: in copies of the source and in fresh environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import broker
import wsbroker_client
from tests.fixtures_daemon import is_served

pytestmark = pytest.mark.needs("systemd")

ROOT = Path(__file__).parent.parent
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "broker").rglob("*.py")}
CLIENT = ROOT / "clients" / "python"
# What git ignores, and what is not of the package: a copy is what a clone would be.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "*.so", "speedups.c", "_speedups.pyi", "node_modules", "__pycache__"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as somebody else has it, nothing built."""
    folder = tmp_path_factory.mktemp("clone") / "wsbroker"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    return folder


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C compiler that writes down how it was called, and does not optimise: the tests wait for it many times."""
    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\nexec gcc "$@" -O0\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def distributions(clone: Path, compiler: Path) -> Path:
    """The folder with the sdists of the broker and the client, and with the wheels that were built from the sdists."""
    run(sys.executable, "-m", "build", "--quiet", cwd=clone, env={"CC": str(compiler)})
    run(sys.executable, "-m", "build", "--quiet", "--outdir", "dist", "clients/python", cwd=clone)
    return clone / "dist"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh virtual environment's folder of programs."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    return tmp_path / "venv" / "bin"


def test_the_sdist_holds_the_sources_and_nothing_built(distributions: Path) -> None:
    (sdist,) = distributions.glob("wsbroker-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "_speedups").iterdir() if path.suffix != ".c"}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "bench" / "load").iterdir()}
    modules = MODULES
    others = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", "broker/py.typed"}
    assert sources | modules | others <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "node_modules" in name]
    assert not {"_speedups/speedups.c", "broker/_speedups.pyi"} & names


def test_the_wheel_holds_the_package_alone(distributions: Path) -> None:
    (wheel,) = distributions.glob("wsbroker-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        stub = archive.read("broker/_speedups.pyi")
    modules = MODULES
    extensions = {name for name in names if name.endswith(".so")}
    assert sorted(name.partition(".")[0] for name in extensions) == ["broker/_load", "broker/_speedups"]
    assert stub == (ROOT / "_speedups" / "speedups.pyi").read_bytes()
    info = {name for name in names if name.startswith(f"wsbroker-{broker.__version__}.dist-info/")}
    assert names == modules | extensions | info | {"broker/_speedups.pyi", "broker/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_each_file_belongs_to_one_distribution_and_the_broker_depends_on_its_client(distributions: Path) -> None:
    owned, required = {}, {}
    for name in ("wsbroker", "wsbroker_client"):
        (wheel,) = distributions.glob(f"{name}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = [each for each in archive.namelist() if each.endswith("/METADATA")]
            required[name] = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
            owned[name] = {each for each in archive.namelist() if ".dist-info/" not in each}
    assert owned["wsbroker"] & owned["wsbroker_client"] == set()
    modules = {str(path.relative_to(CLIENT)) for path in (CLIENT / "wsbroker_client").rglob("*.py")}
    assert owned["wsbroker_client"] == modules | {"wsbroker_client/py.typed"}
    # The wheel comes from the sdist. Only in a checkout the requirement is a path.
    assert f"wsbroker-client=={broker.__version__}" in required["wsbroker"]
    assert not [each for each in required["wsbroker"] + required["wsbroker_client"] if "@" in each]
    assert wsbroker_client.__version__ == broker.__version__


def test_the_extension_runs_on_every_machine_of_the_architecture(distributions: Path, compiler: Path) -> None:
    assert distributions.exists()
    calls = compiler.with_name("calls").read_text()
    assert " -O3 " in calls
    assert "-march=" not in calls
    assert "-mtune=native" not in calls


def test_an_installed_wsbroker_runs(distributions: Path, environment: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("wsbroker-*.whl")
    run(environment / "pip", "install", "--quiet", "--find-links", distributions, wheel, cwd=tmp_path)
    shown = run(environment / "wsbroker", "version", cwd=tmp_path)
    assert broker.__version__ in shown.stdout
    where = run(environment / "python", "-c", "import broker._speedups as s; print(s.__file__)", cwd=tmp_path).stdout
    assert Path(where).is_relative_to(environment.parent)
    run(environment / "python", "-c", "import broker._load", cwd=tmp_path)
    where = run(environment / "python", "-c", "import wsbroker_client as c; print(c.__file__)", cwd=tmp_path).stdout
    assert Path(where).is_relative_to(environment.parent)


def test_pip_install_of_a_checkout_brings_the_client(clone: Path, compiler: Path, environment: Path) -> None:
    run(environment / "pip", "install", "--quiet", ".", cwd=clone, env={"CC": str(compiler)})
    assert broker.__version__ in run(environment / "wsbroker", "version", cwd=environment).stdout
    listed = run(environment / "pip", "show", "--files", "wsbroker-client", cwd=environment).stdout
    assert "wsbroker_client/client.py" in listed
    listed = run(environment / "pip", "show", "--files", "wsbroker", cwd=environment).stdout
    assert "wsbroker_client" not in listed.partition("Files:")[2]


def test_an_editable_install_is_the_checkout(clone: Path, compiler: Path, environment: Path, tmp_path: Path) -> None:
    run(environment / "pip", "install", "--quiet", "--editable", ".", cwd=clone, env={"CC": str(compiler)})
    where = run(environment / "python", "-c", "import broker._speedups as s; print(s.__file__)", cwd=tmp_path).stdout
    assert Path(where).parent == clone / "broker"
    assert (clone / "broker" / "_speedups.pyi").read_bytes() == (clone / "_speedups" / "speedups.pyi").read_bytes()
    # A plain path: type checkers follow it, and do not follow an import hook.
    (link,) = environment.parent.glob("lib/*/site-packages/__editable__*.pth")
    assert link.read_text().strip() == str(clone)


# As a service


class Place:
    """Where the service goes: into /opt/wsbroker as it is meant to, where that harms nobody, else into a folder."""

    def __init__(self, folder: Path) -> None:
        python = everybodys_python()
        self.is_real = (
            os.geteuid() == 0
            and python is not None
            and not Path("/run/systemd/system").exists()
            and not any(path.exists() for path in [Path("/opt/wsbroker"), Path("/etc/wsbroker"), *UNITS])
            and run("id", "wsbroker", status=None).returncode != 0
        )
        self.root = Path("/") if self.is_real else folder / "root"
        self.prefix = Path("/opt/wsbroker") if self.is_real else folder / "prefix"
        self.environ = {"PYTHON": python or sys.executable}
        if not self.is_real:
            self.environ |= {"DESTDIR": str(self.root), "PREFIX": str(self.prefix)}
        # As its user, where there is one.
        self.user = ["setpriv", "--reuid=wsbroker", "--regid=wsbroker", "--clear-groups"] if self.is_real else []

    def install(self, wheel: Path) -> None:
        # On a host that has been hardened.
        run(ROOT / "tools" / "install-service", wheel, env=self.environ, umask=0o077)

    def remove(self) -> None:
        if self.is_real:
            shutil.rmtree(self.prefix, ignore_errors=True)
            shutil.rmtree("/etc/wsbroker", ignore_errors=True)
            for path in UNITS:
                path.unlink(missing_ok=True)
            run("userdel", "wsbroker", status=None)


UNITS = [
    Path("/etc/systemd/system/wsbroker.service"),
    Path("/etc/systemd/system/wsbroker.socket"),
    Path("/etc/sysusers.d/wsbroker.conf"),
    Path("/etc/tmpfiles.d/wsbroker.conf"),
]


def everybodys_python() -> str | None:
    """A Python like this one that does not lie in somebody's home, as the user of the service needs it."""
    for candidate in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        code = "import sys, ensurepip; print(sys.version_info[:2])"
        same = shutil.which(candidate) and str(sys.version_info[:2]) in run(candidate, "-c", code, status=None).stdout
        if same and all(path.stat().st_mode & 0o001 for path in Path(candidate).resolve().parents):
            return candidate
    return None


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.remove()


def test_the_wheel_is_installed_as_a_service_upgraded_and_run_by_the_units_command(
    distributions: Path, place: Place, tmp_path: Path
) -> None:
    (wheel,) = distributions.glob("wsbroker-*.whl")
    place.install(wheel)
    (module,) = place.prefix.glob("lib/*/site-packages/broker/errors.py")
    assert "# changed" not in module.read_text()
    # An upgrade, of which pip alone would say that the version is the same.
    changed = tmp_path / "new" / wheel.name
    changed.parent.mkdir()
    for client in distributions.glob("wsbroker_client-*.whl"):
        shutil.copy(client, changed.parent)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(old.getinfo(name), old.read(name) + b"# changed\n" * (name == "broker/errors.py"))
    place.install(changed)
    assert module.read_text().endswith("# changed\n")
    assert not [path for path in place.prefix.rglob("*") if path.is_file() and not path.stat().st_mode & 0o004]
    unit = (place.root / "etc/systemd/system/wsbroker.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert command == f"{place.prefix}/bin/wsbroker serve --listen systemd"
    path = tmp_path / "ws.sock"
    activate = ["systemd-socket-activate", "-l", str(path), "--fdname=ws", "-E", "WSBROKER_SERVER__ADMIN="]
    token = {}
    if place.is_real:  # the installation has made a configuration, and a secret for it
        secret = Path("/etc/wsbroker/secret")
        assert (secret.stat().st_mode & 0o777, secret.group()) == (0o640, "wsbroker")
        made = run(place.prefix / "bin/wsbroker", "token", "make", "--identity", "me", "--role", "backend")
        token = {"WSBROKER_TOKEN": made.stdout.strip()}
    with subprocess.Popen(
        [*activate, *place.user, *command.split()],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not is_served(path):
                assert process.poll() is None
                time.sleep(0.01)
            publish: list[str | Path] = [place.prefix / "bin/wsbroker", "pub", "a", "1", "--url", f"unix:{path}"]
            if place.is_real:
                assert "unauthorized" in run(*publish, status=os.EX_NOPERM).stderr
            assert run(*publish, env=token).stderr == ""
            status = Path(f"/proc/{process.pid}/status").read_text()
            (uid,) = re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE)
            assert (int(uid) != os.geteuid()) == place.is_real
        finally:
            process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert f"address='unix:{path}'" in log
    assert "stopped" in log


# What goes wrong


@pytest.mark.parametrize("command", [["build_ext"], ["build_ext", "--inplace"]])
def test_build_without_a_compiler_fails_with_one_line(clone: Path, tmp_path: Path, command: list[str]) -> None:
    options = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    failed = run(sys.executable, "setup.py", "--quiet", *command, *options, cwd=clone, env={"PATH": ""}, status=1)
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1
    assert "needs a C compiler" in failed.stderr
    assert "apt install gcc" in failed.stderr


@pytest.mark.parametrize("how", [[], ["--editable"]])
def test_pip_without_a_compiler_shows_one_line_and_no_traceback(clone: Path, tmp_path: Path, how: list[str]) -> None:
    options = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path), *how]
    failed = run(sys.executable, "-m", "pip", "install", *options, ".", cwd=clone, env={"PATH": ""}, status=1)
    shown = failed.stdout + failed.stderr
    assert shown.count("needs a C compiler") == 1
    assert "Traceback" not in shown


def test_a_source_that_does_not_compile_ends_the_build_without_a_traceback(clone: Path, tmp_path: Path) -> None:
    broken = tmp_path / "wsbroker"
    shutil.copytree(clone, broken)
    (broken / "_speedups" / "speedups.pyx").write_text("cdef int x = = 1\n")
    failed = run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=broken, status=1)
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("wsbroker: the extension could not be built")


def run(
    *command: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    status: int | None = 0,
    umask: int = -1,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end and shows its output where its exit status is not the one expected, if one is."""
    # What the environment says about the compiler or the path of modules is not what these tests are about.
    environ = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "CC", "CFLAGS"}}
    environ.update(env or {})
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False, umask=umask)
    assert status is None or done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done
