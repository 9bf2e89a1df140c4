"""Runs the Autobahn suite on the native connection: `python -m tests.conformance.suite [--nginx] [--all | CASES…]`.

The suite's `wstest` is the client; `echo.py` beside this file is the server. With `--nginx` a real nginx stands between
them. The verdict is in the suite's index.json.
Exit status 0 where every case passed, 1 where one failed or the suite could not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tests.conformance.proxy import nginx

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT / ".tools" / "wstest"
REPORTS = ROOT / ".cache" / "conformance"

# Framing, pings, reserved bits, opcodes, fragmentation, UTF-8, closing (1 to 7), sizes (9), and a message sent in many
# pieces (10).
PLAIN = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*")
# Groups 12 and 13 are compression: of JSON, texts and pictures (12), with all that can be agreed to (13). They take
# minutes. By default there are some of them: text and binary, whole and in fragments, with a smaller window.
COMPRESSED = ("12.*", "13.*")
SOME_COMPRESSED = ("12.1.4", "12.1.11", "12.2.3", "13.3.3", "13.5.11", "13.7.3")
CASES = (*PLAIN, *SOME_COMPRESSED)
ALL = (*PLAIN, *COMPRESSED)
COUNTS = {CASES: 301 + len(SOME_COMPRESSED), ALL: 517}

# NON-STRICT is a choice that RFC 6455 leaves open (how soon to fail); INFORMATIONAL is observed, not judged.
PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}

Results = Mapping[str, Mapping[str, str]]


def main() -> int:
    """Installs the suite where it is missing, runs it, prints what failed and a summary; gives the exit status."""
    cases = [word for word in sys.argv[1:] if word != "--nginx"] or list(CASES)
    through_nginx = "--nginx" in sys.argv[1:]
    if cases == ["--all"]:
        cases = list(ALL)
    wstest = subprocess.run(["tools/wstest", str(TOOLS)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if wstest.returncode:
        return 1
    with echo_server() as server, nginx(server) if through_nginx else nullcontext(server) as url:
        results = run(wstest.stdout.strip(), url, cases)
    failures = judge(results, COUNTS.get(tuple(cases)))
    print(*failures, sep="\n", end="\n" if failures else "")
    failed = sum(not passed(result) for result in results.values())
    print(f"conformance: {len(results) - failed} passed, {failed} failed (reports in {REPORTS.relative_to(ROOT)})")
    return 1 if failures else 0


def judge(results: Results, count: int | None) -> list[str]:
    """What is wrong with the results, one line each: cases that failed, and cases that did not run."""
    failures = [
        f"case {case}: behavior {result['behavior']}, close {result['behaviorClose']}"
        for case, result in sorted(results.items(), key=lambda item: [int(part) for part in item[0].split(".")])
        if not passed(result)
    ]
    if count is not None and len(results) != count:
        failures.append(f"{len(results)} cases ran in place of {count}")
    return failures


def passed(result: Mapping[str, str]) -> bool:
    """Whether one case went as it should, to the end of its connection."""
    return result["behavior"] in PASSED and result["behaviorClose"] in PASSED


@contextmanager
def echo_server() -> Iterator[str]:
    """The echo server in a process of its own, as long as the context lasts; gives its URL."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.conformance.echo"]
    with (
        (REPORTS / "echo.log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            if not url:
                sys.exit(f"the echo server did not start: see {log.name}")
            yield url
            if server.poll() is not None:
                sys.exit(f"the echo server ended with {server.returncode} before the suite did: see {log.name}")
        finally:
            server.terminate()


def run(wstest: str, url: str, cases: list[str]) -> Results:
    """Runs the cases; gives each one's result by its number."""
    index = REPORTS / "index.json"
    index.unlink(missing_ok=True)
    spec = REPORTS / "spec.json"
    servers = [{"agent": "wsbroker", "url": url}]
    spec.write_text(json.dumps({"outdir": str(REPORTS), "servers": servers, "cases": cases, "exclude-cases": []}))
    log = REPORTS / "wstest.log"
    with log.open("w") as output:
        subprocess.run([wstest, "-m", "fuzzingclient", "-s", str(spec)], stdout=output, stderr=output, check=False)
    if not index.exists():
        sys.exit(f"wstest wrote no results:\n{log.read_text()[-2000:]}")
    results: Results = json.loads(index.read_text())["wsbroker"]
    return results


if __name__ == "__main__":
    sys.exit(main())
