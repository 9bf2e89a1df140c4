"""The limit of connections. What it does to real connections is tested with the handshake and the listener."""

from __future__ import annotations

import pytest

from broker.errors import ConfigError
from broker.net.limiter import RESERVED_FDS, Capacity
from tests.net.harness import harness, request


@pytest.mark.parametrize("files", [96, 256, 1024, 20_000, 1 << 20])
def test_capacity_fits_into_the_limit_of_open_files(files: int) -> None:
    capacity = Capacity.of(files, None)
    assert capacity.connections >= files * 2 // 5
    reserve = files - capacity.connections - capacity.extra
    assert reserve == min(RESERVED_FDS, files * 3 // 8)
    # Some 18 are of the process itself.
    assert 20 + capacity.admin + capacity.accepts_per_turn <= reserve


async def test_refused_connection_takes_no_capacity() -> None:
    async with harness(capacity=Capacity(2, 10)) as opened:
        await opened.upgrade(request())
        for _ in range(3):
            client = await opened.connect()
            client.send(request("GET /elsewhere HTTP/1.1"))
            assert (await client.head()).startswith(b"HTTP/1.1 404 ")
        assert opened.limiter.connections == 4
        lacks = [opened.limiter.unavailable_reason]
        await opened.upgrade(request())
        lacks.append(opened.limiter.unavailable_reason)
        opened.limiter.memory_pressure = True
        assert [*lacks, opened.limiter.unavailable_reason] == [None, "full", "memory"]


def test_max_connections_is_enforced() -> None:
    assert Capacity.of(1024, 10).connections == 10


def test_max_connections_over_the_descriptor_limit_is_a_mistake() -> None:
    most = Capacity.of(1024, None).connections
    assert Capacity.of(1024, most).connections == most
    with pytest.raises(ConfigError, match=rf"limits\.max_connections.*1024.*at most {most}"):
        Capacity.of(1024, most + 1)


def test_low_descriptor_limit_leaves_capacity_for_clients() -> None:
    assert Capacity.of(64, None) == Capacity(connections=16, extra=16, admin=5, accepts_per_turn=2)


def test_descriptor_limit_without_capacity_for_clients_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"limits\.max_connections.*48 open files"):
        Capacity.of(48, None)
    with pytest.raises(ConfigError, match=r"limits\.max_connections.*48 open files"):
        Capacity.of(48, 1)
