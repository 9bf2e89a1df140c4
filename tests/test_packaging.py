"""What is built and installed, tried as a user would: in copies of the source and in fresh environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import broker

ROOT = Path(__file__).parent.parent
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
    """The folder with the sdist, and with the wheel that was built from the sdist."""
    run(sys.executable, "-m", "build", "--quiet", cwd=clone, env={"CC": str(compiler)})
    return clone / "dist"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh virtual environment's folder of programs."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    return tmp_path / "venv" / "bin"


def test_the_sdist_holds_the_sources_and_nothing_built(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "_speedups").iterdir() if path.suffix != ".c"}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "bench" / "load").iterdir()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "broker").rglob("*.py")}
    others = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", "broker/py.typed"}
    assert sources | modules | others <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "node_modules" in name]
    assert not {"_speedups/speedups.c", "broker/_speedups.pyi"} & names


def test_the_wheel_holds_the_package_alone(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        stub = archive.read("broker/_speedups.pyi")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "broker").rglob("*.py")}
    extensions = {name for name in names if name.endswith(".so")}
    assert sorted(name.partition(".")[0] for name in extensions) == ["broker/_load", "broker/_speedups"]
    assert stub == (ROOT / "_speedups" / "speedups.pyi").read_bytes()
    info = {name for name in names if name.startswith(f"wsbroker-{broker.__version__}.dist-info/")}
    assert names == modules | extensions | info | {"broker/_speedups.pyi", "broker/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_extension_runs_on_every_machine_of_the_architecture(distributions: Path, compiler: Path) -> None:
    assert distributions.exists()
    calls = compiler.with_name("calls").read_text()
    assert " -O3 " in calls
    assert "-march=" not in calls
    assert "-mtune=native" not in calls


def test_an_installed_wsbroker_runs(clone: Path, compiler: Path, environment: Path, tmp_path: Path) -> None:
    run(environment / "pip", "install", "--quiet", ".", cwd=clone, env={"CC": str(compiler)})
    shown = run(environment / "wsbroker", "version", cwd=tmp_path)
    assert broker.__version__ in shown.stdout
    where = run(environment / "python", "-c", "import broker._speedups as s; print(s.__file__)", cwd=tmp_path).stdout
    assert Path(where).is_relative_to(environment.parent)
    run(environment / "python", "-c", "import broker._load", cwd=tmp_path)


def test_an_editable_install_is_the_checkout(clone: Path, compiler: Path, environment: Path, tmp_path: Path) -> None:
    run(environment / "pip", "install", "--quiet", "--editable", ".", cwd=clone, env={"CC": str(compiler)})
    where = run(environment / "python", "-c", "import broker._speedups as s; print(s.__file__)", cwd=tmp_path).stdout
    assert Path(where).parent == clone / "broker"
    assert (clone / "broker" / "_speedups.pyi").read_bytes() == (clone / "_speedups" / "speedups.pyi").read_bytes()
    # A plain path: type checkers follow it, and do not follow an import hook.
    (link,) = environment.parent.glob("lib/*/site-packages/__editable__*.pth")
    assert link.read_text().strip() == str(clone)


@pytest.mark.parametrize("command", [["build_ext"], ["build_ext", "--inplace"]])
def test_without_a_compiler_the_build_says_so_in_one_line(clone: Path, tmp_path: Path, command: list[str]) -> None:
    options = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    failed = run(sys.executable, "setup.py", "--quiet", *command, *options, cwd=clone, env={"PATH": ""}, status=1)
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1
    assert "needs a C compiler" in failed.stderr
    assert "apt install gcc" in failed.stderr


@pytest.mark.parametrize("how", [[], ["--editable"]])
def test_without_a_compiler_pip_shows_that_line_and_no_traceback(clone: Path, tmp_path: Path, how: list[str]) -> None:
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
    *command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end and shows its output where its exit status is not the one expected."""
    # What the environment says about the compiler or the path of modules is not what these tests are about.
    environ = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "CC", "CFLAGS"}}
    environ.update(env or {})
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done
