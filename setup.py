"""Builds the native data path, broker._speedups, and the load program behind `wsbroker bench`, broker._load.

It also says what the package depends on, since that is not the same in a checkout and elsewhere. Everything else about
the package is in pyproject.toml.

The build fails with one line where something is missing: there is no slower implementation to fall back on, and a
traceback does not help to install a compiler.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = Path("_speedups")
LOAD = Path("bench", "load")
STUB = Path("broker", "_speedups.pyi")
# A machine without one of these usually has none of them, so every message names all.
ADVICE = "install a compiler and Python's headers (Debian: apt install gcc libc6-dev python3-dev)"


# The lower bounds are the versions that the tests run on.
REQUIREMENTS = [
    "aiohttp>=3.14.5",
    "click>=8.5",
    "cryptography>=50.0",
    "idna>=3.20",
    "msgspec>=0.22",
    "orjson>=3.11",
    "prometheus-client>=0.26",
    "PyJWT>=2.15",
    "rich>=15.0",
    "structlog>=26.1",
    "uvloop>=0.23",
    "websockets>=17.4",
]


def client_requirement() -> str:
    """The client library, of which the command line is made: a distribution of its own, of the same version.

    A checkout has it as a folder, so that `pip install .` works where no index has it. An sdist (which has PKG-INFO)
    and the wheel that is built from it name the version alone.
    """
    root = Path(__file__).resolve().parent
    if (root / "PKG-INFO").exists():
        (version,) = re.findall(r'^__version__ = "(.+)"$', (root / "broker" / "__init__.py").read_text(), re.MULTILINE)
        return f"wsbroker-client=={version}"
    return f"wsbroker-client @ {(root / 'clients' / 'python').as_uri()}"


class BuildSpeedups(build_ext):
    """build_ext that also installs the stub, and reports a failed build in one line."""

    def initialize_options(self) -> None:
        """Writes the generated C outside the source folder."""
        super().initialize_options()
        self.cython_c_in_temp = True

    def run(self) -> None:
        """Builds the extension and puts its stub beside it: in the wheel, or in broker/ for a build in place."""
        super().run()
        for target in [self._stub(), STUB] if self.inplace else [self._stub()]:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCES / "speedups.pyi", target)

    def build_extensions(self) -> None:
        """Compiles. A failure raises SystemExit: any other exception becomes a traceback in an editable build."""
        compiler = self.compiler.compiler_so[0]
        if importlib.util.find_spec("Cython") is None:
            sys.exit("wsbroker: building needs Cython 3.1 or later: use `pip install .`, or `pip install Cython` first")
        if shutil.which(compiler) is None:
            sys.exit(f"wsbroker: building needs a C compiler, and there is no `{compiler}`: {ADVICE}")
        if not any(Path(folder, "Python.h").is_file() for folder in self.compiler.include_dirs):
            sys.exit(f"wsbroker: building needs Python.h, which is not there: {ADVICE}")
        from Cython.Compiler.Errors import CompileError

        try:
            super().build_extensions()
        except (BaseError, CCompilerError, CompileError) as error:
            sys.exit(f"wsbroker: the extension could not be built: {error}")

    def get_outputs(self) -> list[str]:
        """The files made, which setuptools records as installed."""
        return [*super().get_outputs(), *([] if self.inplace else [str(self._stub())])]

    def get_output_mapping(self) -> dict[str, str]:
        """Each file of a wheel → the file that replaces it in a build in place."""
        return super().get_output_mapping() | ({str(self._stub()): str(STUB)} if self.inplace else {})

    def _stub(self) -> Path:
        return Path(self.build_lib) / STUB


setup(
    install_requires=[*REQUIREMENTS, client_requirement()],
    ext_modules=[
        Extension(
            "broker._speedups",
            [str(SOURCES / "speedups.pyx")],
            # The includes are part of one compilation unit: a change in any of them rebuilds the module.
            depends=sorted(str(path) for pattern in ("*.pxi", "*.h") for path in SOURCES.glob(pattern)),
            include_dirs=[str(SOURCES)],
            # What is built here may run on another machine of the same architecture: no -march=native.
            extra_compile_args=["-O3", "-fvisibility=hidden"],
        ),
        Extension(
            "broker._load",
            sorted(map(str, LOAD.glob("*.c"))),
            depends=sorted(map(str, LOAD.glob("*.h"))),
            extra_compile_args=["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fvisibility=hidden"],
            libraries=["dl"],
        ),
    ],
    cmdclass={"build_ext": BuildSpeedups},
)
