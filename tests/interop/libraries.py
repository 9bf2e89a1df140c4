"""The client libraries, and what each of them cannot do."""

from __future__ import annotations

from typing import NamedTuple

STEPS = ("connect", "subscribe", "publish", "receive", "large", "fragments", "close")
"""What each program does, in this order. `large` is a message of `max_size` bytes."""


class Library(NamedTuple):
    """One row of the table."""

    name: str
    kit: str
    """How it is installed and run; see kits.py."""
    program: str
    """The program within the kit's folder."""
    compresses: bool
    """Whether it offers permessage-deflate."""
    cannot: frozenset[str] = frozenset()
    """Steps that it has no way to do."""
    shows_code: bool = True
    """Whether it tells the close code that the broker answered."""
    package: str = ""
    """What pip installs, with its version."""


WHOLE = frozenset({"fragments"})
"""A library that makes no fragments."""

LIBRARIES = (
    Library("websockets", "python", "with_websockets", True, package="websockets==17.4"),
    Library("aiohttp", "python", "with_aiohttp", True, WHOLE, package="aiohttp==3.14.5"),
    Library("websocket-client", "python", "with_websocket_client", False, package="websocket-client==1.9.2"),
    Library("httpx-ws", "python", "with_httpx_ws", False, shows_code=False, package="httpx-ws==0.9.0"),
    Library("tornado", "python", "with_tornado", False, WHOLE, package="tornado==6.6.1"),
    Library("picows", "python", "with_picows", False, package="picows==2.3.1"),
    Library("libcurl", "python", "with_pycurl", False, package="pycurl==7.49.0"),
    Library("curl", "curl", "with_curl.sh", False, frozenset(STEPS) - {"connect"}),
    Library("ws", "node", "with_ws.mjs", True),
    Library("undici", "node", "with_undici.mjs", True, WHOLE),
    Library("node", "node", "with_node.mjs", True, WHOLE),
    Library("reconnecting-websocket", "node", "with_reconnecting_websocket.mjs", True, WHOLE),
    Library("gorilla", "go", "gorilla", True),
    Library("coder", "go", "coder", True),
    Library("x/net", "go", "xnet", False, WHOLE, shows_code=False),
    Library("java", "java", "Client", False),
    Library("chromium", "chromium", "with_chromium", True, WHOLE),
)
