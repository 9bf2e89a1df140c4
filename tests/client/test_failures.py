"""What a failure knows."""

from __future__ import annotations

import pytest

from broker.client import CommandRefused, Refused
from broker.errors import CommandError
from broker.messages import ErrorAnswer


def test_refused_command_is_a_command_error_with_the_message_of_the_broker() -> None:
    answer = ErrorAnswer(id=1, code="rate_limited", message="slow down", retry=True, retry_after_ms=250)
    error = CommandRefused(answer)
    assert isinstance(error, CommandError)
    assert str(error) == "rate_limited: slow down"
    assert (error.code, error.message, error.retry, error.retry_after_ms) == ("rate_limited", "slow down", True, 250)


def test_unknown_error_code_is_passed_on() -> None:
    assert CommandRefused(ErrorAnswer(code="of_tomorrow", message="?", retry=True)).retry


@pytest.mark.parametrize(("status", "retry"), [(401, False), (404, False), (503, True)])
def test_only_refusals_of_a_full_broker_are_retried_soon(status: int, retry: bool) -> None:
    assert Refused("no", status=status).retry is retry
