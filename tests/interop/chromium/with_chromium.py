"""Chromium, without a window: a page from loopback runs the steps of tests/interop/node/steps.mjs."""

from __future__ import annotations

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.fixtures_chromium import ARGUMENTS

STEPS = Path(__file__).parent.parent / "node"

SCRIPT = """async ([url, topic]) => {
    const { run, SUBPROTOCOL } = await import("/steps.mjs");
    await run(() => new WebSocket(url, SUBPROTOCOL), topic, report);
}"""


def main() -> None:
    """Serve the steps, and run them in a page."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Pages, directory=str(STEPS))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            in_page(f"http://127.0.0.1:{server.server_port}/")
        finally:
            server.shutdown()
            thread.join()


def in_page(address: str) -> None:
    """Run the steps in a page from this address."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        print("version", browser.version, flush=True)
        page = browser.new_page()
        page.expose_function("report", partial(print, flush=True))
        page.goto(address)
        page.evaluate(SCRIPT, sys.argv[1:])
        browser.close()


class Pages(SimpleHTTPRequestHandler):
    """The files of a folder, without a log."""

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    main()
