"""Draws the state machines of the native core, from its own tables, into docs/architecture.md.

`.venv/bin/python tools/states.py` writes them between the two marks there. A test fails when they are out of date.
"""

from __future__ import annotations

from pathlib import Path

from broker._speedups import CONNECTION_TRANSITIONS, SUBSCRIPTION_TRANSITIONS

DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- states: made by tools/states.py -->\n", "<!-- end of states -->\n"


def diagram(transitions: dict[str, tuple[str, ...]]) -> str:
    """Give one table as a Mermaid state diagram."""
    first = next(iter(transitions))
    lines = [f"    [*] --> {first}"]
    for state, following in transitions.items():
        lines += [f"    {state} --> {after}" for after in following] or [f"    {state} --> [*]"]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def section() -> str:
    """Give what stands between the marks."""
    return (
        f"A connection:\n\n{diagram(CONNECTION_TRANSITIONS)}\n\n"
        "A subscription (it begins as `live`, `queued`, `barrier` or `no_credit`):\n\n"
        f"{diagram(SUBSCRIPTION_TRANSITIONS)}\n"
    )


def update(text: str) -> str:
    """Return the document with the pictures of today. Raises ValueError if the marks are not there."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:begin] + section() + text[end:]


if __name__ == "__main__":
    DOCUMENT.write_text(update(DOCUMENT.read_text()))
