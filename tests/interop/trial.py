"""One library against one broker: its program runs, and what it reports is compared with what passed on the wire."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.interop.kits import ROOT
from tests.interop.libraries import STEPS, Library
from tests.interop.relay import CLOSE, CONTINUATION, Conversation, Frame, header, relay

SUBPROTOCOL = "wsbroker.v1"
EXTENSION = "permessage-deflate"
NORMAL = (1000).to_bytes(2)
"""The payload of a close frame with code 1000 and no reason."""

PATIENCE = 60.0
"""Seconds that a program may take. It gives up by itself much earlier."""


@dataclass
class Outcome:
    """How the steps of one program went."""

    version: str = ""
    passed: dict[str, str] = field(default_factory=dict)
    """Steps that went well, with a note: the close code."""
    failed: dict[str, str] = field(default_factory=dict)
    """Steps that did not, with the reason."""
    request: str = ""
    """The head of the request, as it was sent."""


def try_library(library: Library, command: list[str], url: str, *, compression: bool) -> Outcome:
    """Run the program of a library against the broker at `url`, which compresses or not."""
    topic = "interop." + library.program.partition(".")[0].lower()
    with relay(url) as between:
        output = report(command, between.url, topic)
    outcome = read(library, output)
    if len(between.conversations) != 1:
        outcome.failed.setdefault("connect", f"{len(between.conversations)} connections in place of one")
        return outcome
    conversation = between.conversations[0]
    outcome.request = conversation.request
    for step, fault in faults(library, conversation, compression):
        if step in outcome.passed:
            del outcome.passed[step]
            outcome.failed[step] = fault
    return outcome


def report(command: list[str], url: str, topic: str) -> list[str]:
    """Run a program; gives the lines that it printed, and one more if it failed."""
    try:
        done = subprocess.run(
            [*command, url, topic], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return ["failed program: it did not end"]
    lines = done.stdout.splitlines()
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing on standard error"]
        lines.append(f"failed program: exit status {done.returncode}: {last[0]}")
    return lines


def read(library: Library, lines: list[str]) -> Outcome:
    """What a program reported. A step without a line has failed."""
    outcome = Outcome()
    for line in lines:
        match line.split(" ", 2):
            case ["version", *words]:
                outcome.version = " ".join(words)
            case ["ok", step, *note]:
                outcome.passed[step] = "".join(note).strip()
            case ["failed", step, reason]:
                outcome.failed[step.rstrip(":")] = reason
            case _:
                outcome.failed["program"] = f"it printed {line!r}"
    for step in STEPS:
        if step not in library.cannot and step not in outcome.passed and step not in outcome.failed:
            outcome.failed[step] = "not reached"
    if library.shows_code and outcome.passed.get("close", "1000") != "1000":
        outcome.failed["close"] = f"the library shows {outcome.passed.pop('close') or 'no code'}"
    return outcome


def faults(library: Library, conversation: Conversation, compression: bool) -> Iterator[tuple[str, str]]:
    """What the wire tells against the steps: (step, reason)."""
    response = conversation.response
    if header(response, "Sec-WebSocket-Protocol") != SUBPROTOCOL:
        yield "connect", f"the response has no subprotocol:\n{response}"
    extensions = header(response, "Sec-WebSocket-Extensions") or ""
    agreed = extensions.startswith(EXTENSION)
    if agreed != (compression and library.compresses):
        yield "connect", f"compression was {'agreed' if agreed else 'not agreed'}:\n{response}"
    sent, received = conversation.sent, conversation.received
    compressed = any(frame.compressed for frame in received)
    if compressed != agreed and "large" not in library.cannot:
        yield "large", f"the broker's frames are {'compressed' if compressed else 'not compressed'}"
    if not any(frame.opcode == CONTINUATION for frame in sent):
        yield "fragments", "no fragments were sent"
    for name, code in {"the client": close_code(sent), "the broker": close_code(received)}.items():
        if code != NORMAL:
            yield "close", f"{name} sent {'no close frame' if code is None else f'the close frame {code!r}'}"


def close_code(frames: list[Frame]) -> bytes | None:
    """The code of the close frame, as its bytes."""
    return next((frame.payload[:2] for frame in frames if frame.opcode == CLOSE), None)
