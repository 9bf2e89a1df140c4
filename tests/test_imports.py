"""Imports within the package go down only. The table below is the order; a new room takes a place in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "broker"

# From the top to the bottom. A room may import what lies in a lower row, and what stands further right in its own.
ROWS = (
    ("__main__",),
    ("cli",),
    ("client",),
    ("daemon",),
    ("admin", "net"),
    ("node", "health"),
    ("session", "hub", "auth", "engines"),
    ("rules",),
    ("messages", "topics"),
    ("log", "systemd", "metrics"),
    ("config",),
    ("errors", "overflow"),
    ("_speedups", "__init__"),
)
ORDER = {room: (row, place) for row, rooms in enumerate(ROWS) for place, room in enumerate(rooms)}

# Stricter than the order.
ONLY = {
    "client": {"messages", "topics", "config", "errors", "overflow", "__init__"},
    "config": {"errors", "overflow", "__init__"},
}
# A concrete engine is named where the process is put together, and nowhere else.
NOT_AN_ENGINE = {"broker.engines", "broker.engines.base"}
NAMES_ENGINES = "broker.daemon"
READ_BY = {"client": {"cli"}}


def modules() -> dict[str, Path]:
    """Each module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The room that a module belongs to: `broker.net.handshake` → `net`, `broker` itself → `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, module: str, package: str, known: set[str]) -> set[str]:
    """The modules of this package that `source` imports, wherever in the file, also for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            # `from broker import config` imports broker.config; `from broker import __version__` imports broker.
            submodules = {f"{base}.{alias.name}" for alias in node.names} & (known | {"broker._speedups"})
            found |= submodules or {base}
    return {name for name in found if name.split(".")[0] == "broker"} - {module}


def offences(module: str, imports: set[str]) -> list[str]:
    """What is wrong about the imports of one module."""
    here = room(module)
    if here not in ORDER:
        return [f"{module} has no place in the order of the harness"]
    wrong = []
    for name in sorted(imports):
        there = room(name)
        if there not in ORDER:
            wrong.append(f"{module} imports {name}, which has no place in the order of the harness")
        elif there != here and ORDER[there] < ORDER[here]:
            wrong.append(f"{module} imports {name}, which lies above it")
        elif there != here and there not in ONLY.get(here, {there}):
            wrong.append(f"{module} imports {name}; {here} may import {', '.join(sorted(ONLY[here]))} alone")
        elif here not in READ_BY.get(there, {here}) and there != here:
            wrong.append(f"{module} imports {name}, which is for {', '.join(READ_BY[there])} alone")
        elif there == "engines" and name not in NOT_AN_ENGINE and module != NAMES_ENGINES:
            wrong.append(f"{module} names the engine {name}; only {NAMES_ENGINES} may")
    return wrong


@pytest.mark.parametrize("module", modules())
def test_imports_go_to_lower_layers_only(module: str) -> None:
    known = modules()
    path = known[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert offences(module, imported(path.read_text(), module, package, set(known))) == []


def test_extension_imports_nothing_of_the_package() -> None:
    sources = [path for path in (ROOT / "_speedups").iterdir() if path.suffix in {".pyx", ".pxi", ".pxd", ".pyi"}]
    assert sources
    for path in sources:
        assert not re.search(r"^\s*(from|import|cimport)\s+broker\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("broker.hub", "import broker.node"),
        ("broker.hub", "from broker import node"),
        ("broker.hub", "from broker.session import Session"),
        ("broker.topics", "def match():\n    from broker.messages import decode"),
        ("broker.messages", "if TYPE_CHECKING:\n    from .session import Session"),
        ("broker.config", "from broker.topics import check_topic"),
        ("broker.errors", "from broker.config import Config"),
        ("broker.client.connection", "from broker.node import Node"),
        ("broker.client.connection", "from ..hub import Hub"),
        ("broker.node", "from broker.client import connect"),
        ("broker.node", "from broker.engines.memory import MemoryEngine"),
        ("broker.net.listener", "from broker.utils import helper"),
        ("broker.utils", "from broker.errors import CloseCode"),
    ],
)
def test_import_of_a_higher_layer_is_reported(module: str, source: str) -> None:
    known = {"broker.node", "broker.session", "broker.messages"}
    assert offences(module, imported(source, module, module.rpartition(".")[0], known))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("broker.cli", "from broker.client import connect"),
        ("broker.daemon", "from broker.engines.memory import MemoryEngine"),
        ("broker.engines.memory", "from broker.engines.base import Engine"),
        ("broker.net.listener", "from broker.net.handshake import ConnectionLimiter, Handshake"),
        ("broker.session", "from broker.hub import Hub"),
        ("broker.session", "from . import __version__"),
        ("broker.node", "import asyncio, msgspec\nfrom broker._speedups import LoopContext"),
    ],
)
def test_import_of_a_lower_layer_is_accepted(module: str, source: str) -> None:
    assert offences(module, imported(source, module, module.rpartition(".")[0], {"broker.hub"})) == []
