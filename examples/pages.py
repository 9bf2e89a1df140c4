"""How an example's program is started: its options, its page over HTTP on loopback, its end.

Only `main` is for the programs. The page finds the broker by itself, or in its address, after `?broker=`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

EXAMPLES = Path(__file__).parent
CLIENT = EXAMPLES.parent / "clients" / "js" / "wsbroker.js"

# Where `wsbroker serve` listens by default, and where a page looks for it that is not told otherwise.
BROKER = "ws://127.0.0.1:8765/"


def main(
    name: str, port: int, program: Callable[[str], Coroutine[Any, Any, None]], files: type[Files] | None = None
) -> None:
    """Serves the page of the example `name` on `port` and runs `program(url of the broker)` until INT or TERM.

    `files` answers the requests of the page where files are not enough.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}")
    parser.add_argument("--broker", default=BROKER, type=url, help="where the broker is (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="of the page; 0 for any (default: %(default)s)")
    options = parser.parse_args()
    try:
        pages = Pages(options.port, files)
    except OSError as error:
        parser.exit(1, f"cannot serve the page on port {options.port}: {error.strerror}\n")
    with pages as actual:
        question = "" if options.broker == BROKER else f"?broker={quote(options.broker, safe=':/')}"
        print(f"open http://127.0.0.1:{actual}/{name}/{question}", flush=True)
        asyncio.run(until_signal(program(options.broker)))


def url(text: str) -> str:
    """An address of a WebSocket."""
    if not text.startswith(("ws://", "wss://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with ws:// or wss://")
    return text


class Pages:
    """This folder over HTTP on loopback, from a thread, inside of the block. Gives the port; `port` 0 takes any.

    Raises OSError where the port cannot be had.
    """

    def __init__(self, port: int, files: type[Files] | None = None) -> None:
        handler = partial(files or Files, directory=str(EXAMPLES))
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> int:
        self._thread.start()
        return self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Files(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each on the terminal."""

    # The browser runs a module only if it comes as JavaScript, whatever this machine's own table of types says.
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}  # noqa: RUF012

    def translate_path(self, path: str) -> str:
        """Every page finds the client beside this folder's own files."""
        return str(CLIENT) if path == "/wsbroker.js" else super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


async def until_signal(program: Coroutine[Any, Any, None]) -> None:
    """Runs a program until it ends, or until INT or TERM ends it."""
    task = asyncio.ensure_future(program)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
