"""Runs the steps of one page of the docs: `python sandbox.py PLAN`, in namespaces of its own (see test_snippets.py).

The network is empty, so that the default ports are free. The checkout, /etc, /opt and /run are overlays, so that the
snippets may write there. Prints nothing; the result is the exit status, and the reason on standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 100.0
"""Seconds that a step may take. Far more than any needs, also on a busy machine."""

ROOT = Path(__file__).resolve().parent.parent.parent
METRICS = "http://127.0.0.1:8766/metrics"
WRITABLE = (ROOT, Path("/etc"), Path("/opt"))
NGINX = {
    "main": "{}\nevents {{}}\n",
    "events": "events {{ {} }}\n",
    "http": "events {{}}\nhttp {{ {} }}\n",
    "server": "events {{}}\nhttp {{ server {{ listen 127.0.0.1:80; {} }} }}\n",
    "location": "events {{}}\nhttp {{ server {{ listen 127.0.0.1:80; location / {{ {} }} }} }}\n",
}
PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script type="module">
const write = console.log;
console.log = (...words) => {{
  write(...words);
  document.body.append(words.map((word) => typeof word === "string" ? word : JSON.stringify(word)).join(" "), " | ");
}};
{}
</script>"""


class StepError(Exception):
    """A step did not do what the docs say."""


class Program:
    """A shell command, and what it has printed."""

    def __init__(self, code: str, cwd: Path) -> None:
        self.code = code
        self.output = ""
        self.process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait(self) -> int:
        """The exit status. What it leaves in the background may go on printing."""
        status = self.process.wait(PATIENCE)
        self._reader.join(1)
        return status

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Sends SIGTERM to the command and all its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 15)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)


class Runner:
    """The steps of one page, in their order."""

    def __init__(self, page: Path, scratch: Path) -> None:
        self.page = page
        self.cwd = ROOT
        self.scratch = scratch
        self.programs: list[Program] = []

    def run(self, step: dict[str, Any]) -> None:
        """Does one step, or raises StepError."""
        marker, code = step["marker"], step["code"]
        if "stop" in marker:
            named = [each for each in reversed(self.programs) if marker["stop"] in each.code and each.running]
            for program in named[:1] if marker["stop"] else named:
                program.stop()
        elif "subscribed" in marker:
            self.subscribed(int(marker["subscribed"]))
        elif "setup" in marker:
            self.shell(marker["setup"], {})
        elif "open" in marker:
            self.open(marker["open"], marker["shows"], marker.get("click"))
        elif "skip" in marker or "checked" in marker:
            pass
        elif "file" in marker:
            file = self.cwd / marker["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
            if step["language"] == "toml":
                self.toml(file)
        elif "output" in marker:
            self.expect(code)
        else:
            getattr(self, step["language"])(code, marker)

    def sh(self, code: str, marker: dict[str, str]) -> None:
        """Runs a shell snippet: to its end, or in the background."""
        if "background" not in marker:
            self.shell(code, marker)
            return
        program = Program(code, self.cwd)
        self.programs.append(program)
        if "until" in marker:
            self.wait(lambda: re.search(marker["until"], program.output) is not None, program)

    def shell(self, code: str, marker: dict[str, str]) -> None:
        """Runs a shell command to its end."""
        program = Program(code, self.cwd)
        self.programs.append(program)
        try:
            status = program.wait()
        except subprocess.TimeoutExpired:
            raise StepError(f"it does not end:\n{program.output}") from None
        if status != int(marker.get("status", 0)):
            raise StepError(f"exit status {status}:\n{program.output}")

    def python(self, code: str, marker: dict[str, str]) -> None:
        """Runs a Python program to its end."""
        (self.scratch / "snippet.py").write_text(code, encoding="utf-8")
        self.shell(f"{sys.executable} {self.scratch}/snippet.py", marker)

    def js(self, code: str, marker: dict[str, str]) -> None:
        """Runs a JavaScript module in a page that lies beside the document."""
        file = self.page.parent / "snippet.html"
        file.write_text(PAGE.format(code), encoding="utf-8")
        server = Program(f"exec {sys.executable} -m http.server 8099 --bind 127.0.0.1", ROOT)
        self.programs.append(server)
        self.wait(lambda: "Serving" in server.output, server)
        self.open(f"http://127.0.0.1:8099/{file.relative_to(ROOT)}", marker["shows"])
        server.stop()

    def toml(self, file: Path) -> None:
        """Checks a configuration file as `serve` would."""
        self.shell(f"wsbroker check --config {file}", {})

    def nginx(self, code: str, marker: dict[str, str]) -> None:
        """Checks a part of nginx.conf."""
        file = self.scratch / "nginx.conf"
        head = f"pid {self.scratch}/pid; error_log stderr;\n"
        file.write_text(head + NGINX[marker["context"]].format(code), encoding="utf-8")
        self.shell(f"nginx -t -p {self.scratch} -c {file}", {})

    def json(self, code: str, marker: dict[str, str]) -> None:
        """Reads JSON."""
        json.loads(code)

    def yaml(self, code: str, marker: dict[str, str]) -> None:
        """Reads YAML."""
        import yaml  # type: ignore[import-untyped]  # comes with mkdocs

        yaml.safe_load(code)

    def expect(self, code: str) -> None:
        """Waits until a program of this page has printed each of these lines."""
        for line in filter(str.strip, code.splitlines()):
            pattern = ".*".join(re.escape(part) for part in re.split("…", line.rstrip()))
            self.wait(
                lambda pattern=pattern: any(re.search(pattern, each.output) for each in self.programs), None, line
            )

    def subscribed(self, count: int) -> None:
        """Waits until the broker has so many subscriptions."""

        def there() -> bool:
            with urllib.request.urlopen(METRICS, timeout=PATIENCE) as answer:
                return f"\nwsbroker_subscriptions {count}.0\n" in answer.read().decode()

        self.wait(there, None, f"wsbroker_subscriptions {count}")

    def open(self, url: str, shows: str, click: str | None = None) -> None:
        """Opens a page in Chromium, clicks, and waits until it shows a text."""
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
            try:
                page = browser.new_page()
                page.goto(url)
                deadline = time.monotonic() + PATIENCE
                if click:
                    page.click(click)
                while not re.search(shows, text := page.inner_text("body")):
                    if time.monotonic() > deadline:
                        raise StepError(f"the page does not show {shows!r}, but {text!r}")
                    time.sleep(0.05)
            finally:
                browser.close()

    def wait(self, done: Any, program: Program | None, line: str = "") -> None:
        """Waits for output. A program that ends too early is an error."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline or (program is not None and not program.running):
                time.sleep(0.5)  # the rest of its output
                if done():
                    return
                seen = "\n".join(f"$ {each.code.strip()}\n{each.output}" for each in self.programs)
                raise StepError(f"not printed{f': {line}' if line else ''}; the programs printed:\n{seen}")
            time.sleep(0.02)


def isolate(scratch: Path) -> None:
    """Puts overlays over what the snippets may write to."""
    for number, folder in enumerate(WRITABLE):
        upper, work = scratch / f"upper{number}", scratch / f"work{number}"
        upper.mkdir()
        work.mkdir()
        options = f"lowerdir={folder},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(folder)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def main(file: Path) -> None:
    """Runs the plan in this file. Its folder takes what the snippets write."""
    plan = json.loads(file.read_text(encoding="utf-8"))
    isolate(file.parent)
    os.chdir(ROOT)
    runner = Runner(Path(plan["page"]), file.parent)
    try:
        for step in plan["steps"]:
            try:
                runner.run(step)
            except (StepError, OSError, ValueError) as error:
                sys.exit(f"{runner.page.name}:{step['line']}: {error}")
    finally:
        for program in reversed(runner.programs):
            program.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
