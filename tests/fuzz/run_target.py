"""`python -m tests.fuzz.run_target NAME [options of libFuzzer] [corpus…]` fuzzes one target with atheris."""

from __future__ import annotations

import sys

import atheris

# What parses the bytes is instrumented while it is imported; everything else would only slow the fuzzer down.
with atheris.instrument_imports(include=["broker", "websockets.http11", "websockets.headers", "jwt", "tomllib"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
