"""Tokens and keys are in no log, no metric, no answer and no process title, at the most talkative level of the log."""

from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from broker.auth.api_keys import hash_key, make_key
from tests.admin.test_server import get
from tests.fixtures_command import wsbroker
from tests.fixtures_daemon import launched

SECRET = "5e1d2c3b4a59687f0e1d2c3b4a59687f5e1d2c3b4a59687f"
CONFIG = """
[auth]
required = true
algorithms = ["HS256"]
secret = "{secret}"
[log]
level = "debug"
[[keys]]
name = "shop"
hash = "{hash}"
roles = ["admin"]
[[roles]]
name = "user"
publish = [">"]
"""


def token(**claims: object) -> str:
    return jwt.encode({"sub": "alice", "roles": ["user"], "exp": time.time() + 60, **claims}, SECRET)


async def test_nothing_that_is_secret_leaves_the_broker(tmp_path: Path) -> None:
    key = make_key()
    good, expired, forged = token(), token(exp=1), jwt.encode({"sub": "alice"}, "x" * 32)
    said = ""
    config = CONFIG.format(secret=SECRET, hash=hash_key(key))
    arguments = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    async with launched(*arguments, folder=tmp_path, config=config) as daemon:
        await daemon.started()
        for shown in (good, expired, forged, key, "wsb_wrong-key", "not.a.token"):
            for options in (
                {"additional_headers": {"Authorization": f"Bearer {shown}"}},
                {"subprotocols": ["wsbroker.v1", f"bearer.{shown}"]},
            ):
                try:
                    async with connect(daemon.url, proxy=None, **options) as client:
                        said += str(await client.recv())
                except InvalidStatus as refused:
                    said += str(refused.response)
            async with connect(f"{daemon.url}?token={shown}", proxy=None) as client:
                said += str(await client.recv())
                await client.send(f'{{"op":"auth","id":1,"token":"{shown}"}}')
                said += str(await client.recv())
                await client.send(f'{{"op":"publish","topic":"{shown}"}}')
                said += str(await client.recv()) if shown in (expired, forged) else ""
        said += (await get(daemon.admin, "/metrics")).body
        said += (await get(daemon.admin, "/v1/sessions", Authorization=f"Bearer {key}")).body
        said += (await get(daemon.admin, "/v1/sessions", Authorization=f"Bearer {good}")).body
        for name in ("cmdline", "comm", "status"):
            said += Path(f"/proc/{daemon.process.pid}/{name}").read_text()  # noqa: ASYNC240 -- it is no disk
        daemon.configure(config.replace('secret = "', 'secret = "short').replace(SECRET, ""))
        daemon.process.send_signal(1)
        await daemon.until("reload failed")
        daemon.process.terminate()
        assert await daemon.ended() == 0
    said += daemon.said
    assert "welcome" in said
    assert "the token has expired" in said
    parts = [part for shown in (good, expired, forged, key) for part in shown.split(".")[1:] or [shown]]
    for secret in (*parts, SECRET, "wrong-key"):
        assert secret not in said


async def test_secret_is_in_no_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'[auth]\nsecret = ["{SECRET}"]\nalgorithms = ["HS256"]\n')
    for arguments in (("check",), ("serve",)):
        result = await wsbroker(*arguments, "--config", str(tmp_path / "c.toml"))
        assert result.status == 78
        assert SECRET not in result.out + result.err


pytestmark = pytest.mark.filterwarnings("default::jwt.warnings.InsecureKeyLengthWarning")
