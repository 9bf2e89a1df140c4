"""The code blocks of the docs, and what their marker comments say about how to run them.

A marker is an HTML comment that readers do not see. It stands on the line above the block:

    <!-- snippet: background until="ready" -->

| marker | means |
|---|---|
| `background`, `until=REGEX` | the shell command keeps running; the next step waits until its output matches |
| `status=N` | the exit status (0 if left out) |
| `file=PATH` | the block is written to this file, and not run |
| `output` | every line of the block is printed by a program of this page; `…` stands for anything |
| `context=main`, `events`, `http`, `server` or `location` | where in nginx.conf the block belongs |
| `shows=REGEX` | what the page of a `js` block must show |
| `checked=TEST` | another test checks the block |
| `skip=REASON` | the block cannot run in a test |

These markers stand alone, without a block:

| marker | means |
|---|---|
| `setup=COMMAND` | runs a shell command that readers do not need |
| `subscribed=N` | waits until the broker has N subscriptions |
| `open=URL`, `click=SELECTOR`, `shows=REGEX` | opens a page in Chromium, clicks, and waits until it shows a text |
| `stop`, `stop=TEXT` | ends the programs in the background: all, or the last one whose command contains the text |
"""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "examples/README.md"]
LANGUAGES = {"sh", "python", "js", "jsx", "html", "toml", "nginx", "ini", "json", "yaml", "text", "mermaid"}
ALONE = {"setup", "subscribed", "open", "stop"}
KNOWN = {"background", "until", "status", "file", "output", "context", "shows", "click", "checked", "skip"} | ALONE

PART = re.compile(
    r"^ *<!-- snippet: (?P<marker>.*?) -->\n|^(?P<indent> *)```(?P<language>\S*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Step:
    """A block, or a marker that stands alone."""

    line: int
    language: str
    code: str
    marker: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the process that runs it."""
        return asdict(self)


def read(page: Path) -> list[Step]:
    """All steps of a page. Raises ValueError for a marker that means nothing."""
    text = page.read_text(encoding="utf-8")
    steps: list[Step] = []
    marker: dict[str, str] = {}
    end = -1
    for found in PART.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        if found["marker"] is not None:
            marker = _marker(found["marker"])
            if unknown := marker.keys() - KNOWN:
                raise ValueError(f"{page.name}:{line}: no such marker: {', '.join(unknown)}")
            if marker.keys() & ALONE:
                steps.append(Step(line, "", "", marker))
                marker = {}
            end = found.end()
        else:
            if marker and end != found.start():
                raise ValueError(f"{page.name}:{line}: a marker must stand right above its block")
            code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
            steps.append(Step(line, found["language"], code, marker))
            marker = {}
    return steps


def _marker(text: str) -> dict[str, str]:
    words = [word.partition("=") for word in shlex.split(text)]
    return {name: value for name, _, value in words}
