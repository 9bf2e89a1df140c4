"""Compiles the C floor, when it is missing or older than its source."""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
BUILD = FOLDER / "build"
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror")


class BuildError(Exception):
    """There is no C compiler, or it did not accept the sources; the text says which."""


def c_floor() -> Path:
    """The C floor, ready to run. Raises BuildError."""
    return build("floor", FOLDER / "peers" / "floor.c")


def build(name: str, source: Path, *flags: str) -> Path:
    """Compiles one C file, or all those of a folder, to a program of this name; `flags` are further ones. Raises
    BuildError."""
    program = BUILD / name
    sources = sorted(source.glob("*.c")) if source.is_dir() else [source]
    headers = sorted(source.glob("*.h")) if source.is_dir() else []
    if program.exists() and program.stat().st_mtime > max(file.stat().st_mtime for file in sources + headers):
        return program
    BUILD.mkdir(exist_ok=True)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # Compiled aside and then renamed, so that two benches that start together do not run half a program.
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fresh = Path(folder) / name
        command = [*compiler, *FLAGS, *flags, "-o", str(fresh), *map(str, sources)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise BuildError(f"the bench needs a C compiler; there is no {compiler[0]}") from None
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr}") from None
        fresh.rename(program)
    return program
