"""Imports within `broker` go to lower layers only. LAYERS is the order; a new package needs a place in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "broker"

# From top to bottom. A package may import those of lower layers, and those further right in its own layer.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("daemon",),
    ("admin", "net"),
    ("node", "health"),
    ("interests", "presence", "identities", "recovery"),
    ("session", "hub", "engines"),
    ("auth",),
    ("rules", "rates"),
    ("retention",),
    ("messages", "topics", "identity"),
    ("log", "systemd", "metrics"),
    ("config",),
    ("errors", "overflow", "cores"),
    ("net.addresses", "net.origin"),
    ("_speedups", "__init__"),
)
ORDER = {package: (layer, place) for layer, packages in enumerate(LAYERS) for place, package in enumerate(packages)}

CLIENT = ROOT / "clients" / "python" / "wsbroker_client"
# The client library, from top to bottom.
CLIENT_ORDER = (
    "sync",
    "http",
    "__init__",
    "client",
    "subscription",
    "publisher",
    "connection",
    "stream",
    "machine",
    "subscriptions",
    "requests",
    "reconnection",
    "actions",
    "states",
    "model",
    "wire",
    "errors",
)

# Modules with a place of their own: they import nothing, so that lower layers may use them too.
LEAVES = {"broker.net.addresses", "broker.net.origin"}

# Packages that may import only these.
ONLY = {
    "config": {"errors", "overflow", "net.addresses", "net.origin", "__init__"},
    **{leaf.removeprefix("broker."): set() for leaf in LEAVES},
}
# Only the composition root imports a concrete engine.
ENGINE_PORTS = {"broker.engines", "broker.engines.base"}
COMPOSITION_ROOT = "broker.daemon"
# Beside it, the command that looks after the file of one.
NAMES_ENGINES = {COMPOSITION_ROOT, "broker.cli.store"}


def modules() -> dict[str, Path]:
    """Each module of `broker` by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def package_of(module: str) -> str:
    """The package or top-level module of a module: `broker.net.handshake` → `net`, `broker` → `__init__`."""
    if module in LEAVES:
        return module.removeprefix("broker.")
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, module: str, package: str, known: set[str]) -> set[str]:
    """The modules of `broker` that `source` imports, anywhere in the file, also for types only."""
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


def violations(module: str, imports: set[str]) -> list[str]:
    """The forbidden imports of one module."""
    here = package_of(module)
    if here not in ORDER:
        return [f"{module} is in no layer"]
    wrong = []
    for name in sorted(imports):
        there = package_of(name)
        if there not in ORDER:
            wrong.append(f"{module} imports {name}, which is in no layer")
        elif there != here and ORDER[there] < ORDER[here]:
            wrong.append(f"{module} imports {name}, which is in a higher layer")
        elif there != here and there not in ONLY.get(here, {there}):
            wrong.append(f"{module} imports {name}; {here} may import {', '.join(sorted(ONLY[here]))} alone")
        elif there == "engines" != here and name not in ENGINE_PORTS and module not in NAMES_ENGINES:
            wrong.append(f"{module} names the engine {name}; only {COMPOSITION_ROOT} may")
    return wrong


@pytest.mark.parametrize("module", modules())
def test_imports_go_to_lower_layers_only(module: str) -> None:
    known = modules()
    path = known[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert violations(module, imported(path.read_text(), module, package, set(known))) == []


@pytest.mark.parametrize("path", sorted(CLIENT.glob("*.py")), ids=lambda path: path.stem)
def test_client_imports_go_to_lower_layers_only(path: Path) -> None:
    """The client library stands by itself: it imports nothing of the broker, and its own modules downwards."""
    modules = {f"wsbroker_client.{name}" for name in CLIENT_ORDER}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    assert not {name for name in found if name.split(".")[0] == "broker"}
    below = CLIENT_ORDER[CLIENT_ORDER.index(path.stem) + 1 :]
    assert {name.rpartition(".")[2] for name in found & modules} <= set(below)


def test_only_the_command_line_imports_the_client_library() -> None:
    users = {
        name
        for name, path in modules().items()
        if re.search(r"^\s*(from|import) wsbroker_client", path.read_text(), re.MULTILINE)
    }
    assert users
    assert {package_of(name) for name in users} == {"cli"}


def test_only_two_modules_of_the_client_do_io() -> None:
    """What decides can be tested without a network: it does not even import one."""
    for name in CLIENT_ORDER[CLIENT_ORDER.index("machine") :]:
        source = (CLIENT / f"{name}.py").read_text()
        assert not re.search(r"^\s*(from|import) (asyncio|socket|websockets|threading)", source, re.MULTILINE), name


def test_extension_imports_nothing_of_the_package() -> None:
    sources = [path for path in (ROOT / "_speedups").iterdir() if path.suffix in {".pyx", ".pxi", ".pxd", ".pyi"}]
    assert sources
    for path in sources:
        assert not re.search(r"^\s*(from|import|cimport)\s+broker\b", path.read_text(), re.MULTILINE), path


def test_modules_of_net_import_each_other_without_a_circle() -> None:
    known = modules()
    inside = {name: path for name, path in known.items() if name.startswith("broker.net.")}
    left = {
        name: imported(path.read_text(), name, "broker.net", set(known)) & set(inside) for name, path in inside.items()
    }
    while left:
        free = [name for name, imports in left.items() if not imports & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]


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
        ("broker.config.schema", "from ..hub import Hub"),
        ("broker.node", "from broker.engines.memory import MemoryEngine"),
        ("broker.net.listener", "from broker.utils import helper"),
        ("broker.utils", "from broker.errors import CloseCode"),
        ("broker.config", "from broker.net.limiter import Capacity"),
        ("broker.net.addresses", "from broker.errors import ConfigError"),
    ],
)
def test_import_of_a_higher_layer_is_reported(module: str, source: str) -> None:
    known = {"broker.node", "broker.session", "broker.messages"}
    assert violations(module, imported(source, module, module.rpartition(".")[0], known))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("broker.daemon", "from broker.engines.memory import MemoryEngine"),
        ("broker.engines.memory", "from broker.engines.base import Engine"),
        ("broker.net.listener", "from broker.net.handshake import Handshake, Handshakes"),
        ("broker.session", "from broker.hub import Hub"),
        ("broker.session", "from . import __version__"),
        ("broker.session", "from broker.net.addresses import Peer"),
        ("broker.node", "import asyncio, msgspec\nfrom broker._speedups import LoopContext"),
    ],
)
def test_import_of_a_lower_layer_is_accepted(module: str, source: str) -> None:
    assert violations(module, imported(source, module, module.rpartition(".")[0], {"broker.hub"})) == []
