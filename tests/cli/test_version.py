"""`wsbroker version`."""

from __future__ import annotations

import json
from pathlib import Path

from broker import __version__
from tests.fixtures_command import wsbroker

ROOT = Path(__file__).parent.parent.parent


async def test_version_lists_the_dependencies() -> None:
    result = await wsbroker("version")
    assert (result.status, result.err) == (0, "")
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names == [
        "wsbroker",
        "broker._speedups",
        "Python",
        "uvloop",
        "msgspec",
        "orjson",
        "websockets",
        "click",
        "structlog",
        "rich",
    ]
    versions = json.loads((await wsbroker("version", "--json")).out)
    assert versions["wsbroker"] == __version__
    assert list(versions) == names
    assert (await wsbroker("--version")).out == f"wsbroker {__version__}\n"
