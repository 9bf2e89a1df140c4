"""What a failure knows."""

from __future__ import annotations

import pytest

from broker.errors import REFUSALS as BROKERS_REFUSALS
from broker.errors import CloseCode
from wsbroker_client import ClientError, CommandRefused, Refused
from wsbroker_client.errors import CLOSE_CODES, REFUSALS


def test_refused_command_has_the_message_of_the_broker() -> None:
    error = CommandRefused("rate_limited", "slow down", retry=True, retry_after_ms=250)
    assert isinstance(error, ClientError)
    assert str(error) == "rate_limited: slow down"
    assert (error.code, error.message, error.retry, error.retry_after_ms) == ("rate_limited", "slow down", True, 250)


def test_tables_are_those_of_the_broker() -> None:
    assert {code: (each.name, each.meaning, each.reconnect) for code, each in CLOSE_CODES.items()} == {
        int(code): (code.reason, code.meaning, code.reconnect) for code in CloseCode
    }
    assert {status: each.meaning for status, each in BROKERS_REFUSALS.items()} == REFUSALS


@pytest.mark.parametrize(("status", "retry"), [(401, False), (404, False), (503, True)])
def test_only_refusals_of_a_full_broker_are_retried_soon(status: int, retry: bool) -> None:
    assert Refused("no", status=status).retry is retry
