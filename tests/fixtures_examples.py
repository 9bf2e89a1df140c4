"""An example's program, run as its README says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from tests.fixtures_broker import Program, start_program

OPEN = re.compile(r"open (?P<address>http://\S+)")
CONNECTED = re.compile(r"connected to ")


@contextlib.contextmanager
def start_example(name: str, broker: str) -> Iterator[Example]:
    """Run `python -m examples.name` against a broker. It is connected; at the end it must exit 0 in peace."""
    with start_program("-m", f"examples.{name}", "--port", "0", "--broker", broker) as program:
        address = program.wait_for(OPEN)["address"]
        program.wait_for(CONNECTED)
        yield Example(program, address)
        if program.running:
            program.terminate()
            assert program.wait() == 0, program.output


class Example:
    """A running example; `address` is that of its page."""

    def __init__(self, program: Program, address: str) -> None:
        self.program = program
        self.address = address
