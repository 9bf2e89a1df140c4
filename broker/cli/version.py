"""`wsbroker version`: the versions of what it is made of."""

from __future__ import annotations

from pathlib import Path

import click

from broker import __version__
from broker.cli.options import json_option
from broker.cli.report import EXTENSION, print_text, to_json


@click.command("version")
@json_option
def command(as_json: bool) -> int:
    """Print the versions of the broker, its extension and its main dependencies."""
    import importlib
    import importlib.metadata
    import platform

    extension = importlib.import_module(EXTENSION)
    found = {
        "wsbroker": __version__,
        EXTENSION: f"built as {Path(str(extension.__file__)).name}",
        "Python": platform.python_version(),
    }
    for name in ("uvloop", "msgspec", "orjson", "websockets", "click", "structlog", "rich"):
        found[name] = importlib.metadata.version(name)
    width = max(map(len, found))
    lines = to_json(found) if as_json else "\n".join(f"{name:{width}}  {text}" for name, text in found.items())
    return print_text(lines + "\n", as_json)
