"""Answers in JSON of the admin listener."""

from __future__ import annotations

from typing import Final

import msgspec
import orjson
from aiohttp import web

NO_STORE: Final = {"Cache-Control": "no-store"}


def respond(content: object, status: int = 200) -> web.Response:
    """Make an answer of JSON; `content` may hold Structs."""
    body = orjson.dumps(content, default=msgspec.structs.asdict)
    return web.Response(body=body, status=status, headers={**NO_STORE, "Content-Type": "application/json"})
