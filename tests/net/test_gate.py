"""Who may come in now. What it does to real connections is tested with the handshake and the listener."""

from __future__ import annotations

import pytest

from broker.errors import ConfigError
from broker.net.gate import RESERVE, Room
from tests.net.house import house, request


@pytest.mark.parametrize("files", [256, 1024, 20_000, 1 << 20])
def test_all_who_are_let_in_or_refused_fit_into_the_limit_of_open_files(files: int) -> None:
    room = Room.of(files, None)
    assert room.connections >= files // 2
    assert room.connections + room.extra + RESERVE == files


async def test_who_reads_why_it_was_refused_takes_nobodys_place() -> None:
    async with house(room=Room(2, 10)) as opened:
        await opened.upgrade(request())
        for _ in range(3):
            client = await opened.connect()
            client.send(request("GET /elsewhere HTTP/1.1"))
            assert (await client.head()).startswith(b"HTTP/1.1 404 ")
        assert opened.gate.connections == 4
        lacks = [opened.gate.lack]
        await opened.upgrade(request())
        lacks.append(opened.gate.lack)
        opened.gate.tight = True
        assert [*lacks, opened.gate.lack] == [None, "full", "memory"]


def test_a_configured_bound_is_kept() -> None:
    assert Room.of(1024, 10).connections == 10


def test_a_bound_that_there_are_no_descriptors_for_is_a_mistake() -> None:
    most = Room.of(1024, None).connections
    assert Room.of(1024, most).connections == most
    with pytest.raises(ConfigError, match=rf"limits\.max_connections.*1024.*at most {most}"):
        Room.of(1024, most + 1)


def test_few_files_are_enough_for_some_clients() -> None:
    assert Room.of(64, None) == Room(connections=16, extra=16)


def test_a_limit_that_leaves_nothing_for_clients_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"limits\.max_connections.*48 open files"):
        Room.of(48, None)
    with pytest.raises(ConfigError, match=r"limits\.max_connections.*48 open files"):
        Room.of(48, 1)
