"""The programs that some tests need beside Python: `python -m tests.needs [PYTEST ARGUMENTS]` installs them.

Without arguments it installs all of them, with arguments only what the tests need that pytest collects for these. A
test declares its needs with a marker (`pytest.mark.needs("nginx")`); the fixture `browser` stands for chromium.
`--list` as the first argument prints the names in place of installing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NCHAN = "/usr/lib/nginx/modules/ngx_nchan_module.so"

# Pairs for tools/packages: a command and its Debian package.
PACKAGES = {
    "chromium": ("chromium=chromium",),
    "node": ("node=nodejs", "npm=npm"),
    "nginx": ("nginx=nginx-light", "curl=curl"),
    "openssl": ("openssl=openssl",),
    "peers": (
        "nats-server=nats-server",
        "nginx=nginx-light",
        f"{next(map(str, Path('/usr').glob('lib*/nginx/modules/ngx_nchan_module.so')), NCHAN)}=libnginx-mod-nchan",
        "redis-server=redis-server",
        "openssl=openssl",
    ),
    "snippets": ("unshare=util-linux", "ip=iproute2", "curl=curl", "jq=jq"),
    "systemd": ("systemd-socket-activate=systemd",),
    "valgrind": ("valgrind=valgrind",),
    "docs": (),
}
NODE_MODULES = ("tests/node/node_modules", "tests/node22/node_modules", "clients/js/node_modules")
# What is installed in the checkout after that.
COMMANDS = {
    "node": ("make", "--no-print-directory", *NODE_MODULES),
    "docs": ("tools/setup", "docs"),
}


def of_item(item: pytest.Item) -> set[str]:
    """What one test needs. Raises KeyError for a name that is not in the table."""
    names = {name for marker in item.iter_markers("needs") for name in marker.args}
    if "browser" in getattr(item, "fixturenames", ()):
        names.add("chromium")
    for name in names:
        PACKAGES[name]
    return names


def of_tests(arguments: Iterable[str]) -> set[str]:
    """What the tests need that pytest collects for these arguments. It reports mistakes in them when it runs."""
    names: set[str] = set()

    class Collector:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            names.update(name for item in session.items for name in of_item(item))

    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        pytest.main([*arguments, "-n0", "--collect-only", "-q"], plugins=[Collector()])
    return names


def install(names: Iterable[str]) -> int:
    """Installs what is missing; the exit status."""
    wanted = sorted(names)
    commands = [("tools/packages", *dict.fromkeys(pair for name in wanted for pair in PACKAGES[name]))]
    commands += [COMMANDS[name] for name in wanted if name in COMMANDS]
    return max(subprocess.run(command, cwd=ROOT, check=False).returncode for command in commands)


def main(arguments: list[str]) -> int:
    """The exit status."""
    if arguments[:1] == ["--list"]:
        sys.stdout.write("".join(f"{name}\n" for name in sorted(of_tests(arguments[1:]))))
        return 0
    return install(of_tests(arguments) if arguments else PACKAGES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
