"""A chat room: `TOKEN_SECRET=… python -m examples.chat`.

    chat.say.NAME  page → program   {"text": …}                          only the identity NAME may publish there
    chat.lobby     program → pages  {"name": …, "text": …, "at": …}      kept, with presence

A page gets a token from this program, for the name that it asks for, and the broker believes the token. So a name in
the room is the identity of a page, and nobody can speak under another one. A site with a login hands out its users'
names instead.
"""

from __future__ import annotations

import os
import re
import sys
import time
from urllib.parse import parse_qs, urlsplit

import jwt

from examples.link import client_of
from examples.pages import Files, main
from wsbroker_client import ClientError

NAME = re.compile(r"[\w-]{1,20}")
MAX_TEXT = 500
"""Characters of what is said."""
TOKEN_LASTS = 900
"""Seconds."""


def make_token(name: str, role: str) -> str:
    """A token for the broker, which has the same secret."""
    claims = {"sub": name, "roles": [role], "exp": int(time.time()) + TOKEN_LASTS}
    return jwt.encode(claims, os.environ["TOKEN_SECRET"], "HS256")


class Site(Files):
    """The page, and the tokens for it."""

    def do_POST(self) -> None:  # noqa: N802 -- the name that http.server looks for
        """`/token?name=…`: a token for this name. A real site looks at its session here, not at what the page says."""
        address = urlsplit(self.path)
        name = parse_qs(address.query).get("name", [""])[0]
        if address.path != "/token" or not NAME.fullmatch(name) or name == HOST:
            self.send_error(400)
            return
        body = make_token(name, "guest").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HOST = "host"
"""The name of this program."""


async def program(broker: str) -> None:
    """Puts what pages say into the room, over as many connections as it takes."""
    async with client_of(broker, lambda: make_token(HOST, "host")) as client:
        try:
            async for event in client.subscribe("chat.say.*", overflow="drop_oldest"):
                match event.data:
                    case {"text": str(text)} if text.strip():
                        name = event.topic.rpartition(".")[2]
                        said = {"name": name, "text": text.strip()[:MAX_TEXT], "at": int(time.time() * 1000)}
                        await client.publish("chat.lobby", said, reliable=True)
        except ClientError as failure:
            raise SystemExit(str(failure)) from None


if __name__ == "__main__":
    if "TOKEN_SECRET" not in os.environ:
        sys.exit("TOKEN_SECRET is needed: the secret of the broker, as in examples/chat/README.md")
    main("chat", 8006, program, Site)
