"""A FastAPI backend that hands a token for the broker to its page.

`TOKEN_SECRET=… PASSWORD=… python -m examples.tokens.fastapi_app [--port 8005]`
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from pathlib import Path
from typing import Annotated

import jwt
import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

PAGE = Path(__file__).with_name("page.html")
CLIENT = Path(__file__).parents[2] / "clients" / "js" / "wsbroker.js"

app = FastAPI()


def current_user(given: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> str:
    """Who is logged in: here one user, by HTTP Basic. Put your own login in its place."""
    good = secrets.compare_digest(given.password.encode(), os.environ["PASSWORD"].encode())
    if given.username != "alice" or not good:
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
    return given.username


User = Annotated[str, Depends(current_user)]


# These are the five lines.
@app.get("/token")
def token(user: User) -> dict[str, str]:
    """Make a token for whoever is logged in."""
    claims = {"sub": user, "roles": ["user"], "exp": int(time.time()) + 900}
    return {"token": jwt.encode(claims, os.environ["TOKEN_SECRET"], "HS256")}


@app.get("/")
def page(user: User) -> FileResponse:
    """The page."""
    return FileResponse(PAGE)


@app.get("/wsbroker.js")
def client() -> FileResponse:
    """The client that the page uses."""
    return FileResponse(CLIENT, media_type="text/javascript")


def main() -> None:
    """Serve on loopback."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8005)
    port = parser.parse_args().port
    print(f"open http://127.0.0.1:{port}/", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
