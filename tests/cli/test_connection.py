"""`pub` and `sub`: every way in which a connection ends, but for what the tests of the client have."""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection

from broker.cli.options import URL
from broker.errors import CloseCode
from tests.client.fake import FakeBroker, closing, refusing, running, saying
from tests.fixtures_command import Result, wsbroker
from wsbroker_client import DEFAULT_URL

ROOT = Path(__file__).parent.parent.parent


def test_duplicated_constants_are_equal() -> None:
    assert URL == DEFAULT_URL


async def test_connect_to_an_unused_address_has_its_exit_status() -> None:
    result = await wsbroker("pub", "t", "1", "--url", "unix:/nowhere")
    assert result == Result(69, "", "wsbroker: cannot connect to unix:/nowhere: No such file or directory\n")
    result = await wsbroker("sub", "t", "--url", "unix:/nowhere", "--json")
    message = "cannot connect to unix:/nowhere: No such file or directory"
    assert json.loads(result.err) == {"error": "unreachable", "message": message, "retry": False}


async def test_connect_to_another_server_has_its_exit_status() -> None:
    async with running(saying(b"hello")) as fake:
        result = await wsbroker("sub", "t", "--url", fake.url, "--json")
        assert (result.status, json.loads(result.err)["error"]) == (76, "not_a_broker")


@pytest.mark.parametrize(("status", "ends"), [(400, 69), (401, 77), (403, 77), (404, 69), (426, 69), (503, 75)])
async def test_a_refusal_has_its_exit_status(status: int, ends: int) -> None:
    refuse = refusing(HTTPStatus(status), "so be it", Retry_After="4")
    async with running(process_request=refuse) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url, "--json")
    assert result.status == ends
    message = f"{fake.url} refused the connection: HTTP {status}: so be it"
    retry = status == 503
    assert json.loads(result.err) == {
        "error": "refused", "message": message, "retry": retry, "status": status, "retry_after": 4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        (CloseCode.NORMAL, 69),
        (CloseCode.GOING_AWAY, 75),
        (CloseCode.TOO_BIG, 69),
        (CloseCode.SLOW_CONSUMER, 75),
        (CloseCode.UNAUTHORIZED, 77),
        (CloseCode.EXPIRED, 77),
        (CloseCode.BAD_COMMANDS, 69),
        (CloseCode.DISCONNECTED, 77),
    ],
)
async def test_a_close_has_its_exit_status(code: CloseCode, ends: int) -> None:
    async with running(closing(code, code.reason)) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url)
    closed = f"the broker closed the connection: {code:d} {code.reason} ({code.meaning})"
    assert result == Result(ends, "", f"wsbroker: {closed}\n")


async def test_lost_connection_has_its_exit_status() -> None:
    async def cut(fake: FakeBroker, connection: ServerConnection) -> None:
        async for _ in fake.commands(connection):
            connection.transport.abort()

    async with running(cut) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url, "--json")
        assert result.status == 75
        assert json.loads(result.err)["code"] == 1006


async def test_control_characters_from_the_server_are_not_printed() -> None:
    async with running(closing(4999, "\x1b[31mred\x07")) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url)
    assert result.err == "wsbroker: the broker closed the connection: 4999 �[31mred�\n"
