"""clients/js: its own tests in Node, its types, its size, and what `npm pack` puts into the package."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("node")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clients" / "js"
MAX_SIZE = 6000


def npx(*command: str, status: int = 0) -> str:
    done = subprocess.run(["npx", "--no-install", *command], cwd=PACKAGE, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


NODE22 = ROOT / "tests" / "node22" / "node_modules" / ".bin" / "node"


@pytest.mark.parametrize(
    ("node", "file"),
    [("node", "client.test.js"), ("node", "react.test.js"), (str(NODE22), "client.test.js")],
    ids=["client", "react", "client on Node 22"],
)
def test_client_in_node(node: str, file: str) -> None:
    """On Node 20 with the WebSocket of `ws`, on Node 22 with its own."""
    built_in = {"BUILT_IN_WEBSOCKET": "1"} if node == str(NODE22) else {}
    done = subprocess.run(
        [node, f"test/{file}"],
        cwd=PACKAGE,
        env={**os.environ, "PYTHON": sys.executable, **built_in},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass [1-9]", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^# skipped 0$", done.stdout, re.MULTILINE), done.stdout


def test_client_is_small() -> None:
    minified = npx("terser", "wsbroker.js", "--module", "--compress", "passes=3", "--mangle")
    assert len(gzip.compress(minified.encode(), 9)) <= MAX_SIZE


def test_types_are_right(tmp_path: Path) -> None:
    options = ("--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--jsx", "react", "--skipLibCheck")
    npx("tsc", *options, "test/types.ts", "wsbroker.d.ts", "react.d.ts")


def test_package_is_what_its_users_can_resolve() -> None:
    npx("publint", "--strict", "--pack", "npm")
    # There is no CommonJS: an ES module alone is meant.
    npx("attw", "--pack", ".", "--profile", "esm-only")


def test_package_holds_the_client_alone() -> None:
    packed = json.loads(
        subprocess.run(["npm", "pack", "--dry-run", "--json"], cwd=PACKAGE, capture_output=True, check=True).stdout
    )
    names = {file["path"] for file in packed[0]["files"]}
    modules = {f"{name}.{kind}" for name in ("wsbroker", "react") for kind in ("js", "d.ts")}
    assert names == {"package.json", "README.md", "LICENSE", *modules}
