"""The tables of what may go wrong, and their documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.errors import ERRORS, REFUSALS, CloseCode, CommandError, ConfigError, Problem

PROTOCOL = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")


def rows(*cells: str) -> list[str]:
    """The lines of the documentation that begin with these cells."""
    return [line for line in PROTOCOL.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]


class TestErrors:
    def test_error_is_found_by_its_code(self) -> None:
        assert all(code == error.code for code, error in ERRORS.items())

    def test_error_codes_are_those_of_the_protocol(self) -> None:
        again = {"rate_limited", "unavailable", "draining", "internal"}
        never = {
            "bad_json",
            "bad_command",
            "bad_topic",
            "unauthorized",
            "forbidden",
            "not_subscribed",
            "no_history",
            "no_presence",
            "limit",
        }
        assert {code for code, error in ERRORS.items() if error.retry} == again
        assert {code for code, error in ERRORS.items() if not error.retry} == never

    @pytest.mark.parametrize("code", ERRORS)
    def test_each_error_code_is_documented(self, code: str) -> None:
        error = ERRORS[code]
        (row,) = rows(f"`{code}`", "yes" if error.retry else "no")
        assert error.meaning in row


class TestCommandError:
    def test_command_error_gets_retry_from_the_table(self) -> None:
        assert CommandError("draining", "the broker is shutting down").retry
        assert not CommandError("bad_topic", "a token is empty").retry

    def test_command_error_carries_code_and_message(self) -> None:
        error = CommandError("rate_limited", "too many publishes", retry_after_ms=250)
        assert (error.code, error.message, error.retry_after_ms) == ("rate_limited", "too many publishes", 250)
        assert str(error) == "rate_limited: too many publishes"

    def test_unknown_error_code_is_refused(self) -> None:
        with pytest.raises(KeyError):
            CommandError("oops", "no such code")


class TestConfigError:
    def test_config_error_prints_one_problem_per_line(self) -> None:
        error = ConfigError(["first", "second"])
        assert error.problems == [Problem("first"), Problem("second")]
        assert str(error) == "first\nsecond"


class TestCloseCode:
    def test_close_code_has_number_name_and_meaning(self) -> None:
        assert int(CloseCode.SLOW_CONSUMER) == 4000
        assert CloseCode(4000) is CloseCode.SLOW_CONSUMER
        assert CloseCode.SLOW_CONSUMER.reason == "slow_consumer"

    @pytest.mark.parametrize("code", [code for code in CloseCode if code >= 4000])
    def test_range_of_a_private_close_code_says_whether_to_reconnect(self, code: CloseCode) -> None:
        assert code.reconnect == (code < 4500)

    @pytest.mark.parametrize("code", [code for code in CloseCode if code < 4000])
    def test_standard_close_codes_reconnect_unless_the_client_is_at_fault(self, code: CloseCode) -> None:
        assert code.reconnect == (code in (CloseCode.GOING_AWAY, CloseCode.INTERNAL, CloseCode.TRY_AGAIN))

    @pytest.mark.parametrize("code", CloseCode)
    def test_each_close_code_is_documented(self, code: CloseCode) -> None:
        (row,) = rows(str(int(code)), f"`{code.reason}`", "yes" if code.reconnect else "no")
        assert code.meaning in row

    def test_close_reason_fits_into_a_close_frame(self) -> None:
        # RFC 6455, section 5.5: 125 bytes in a control frame, two of which are the code.
        assert all(len(code.reason.encode()) <= 123 for code in CloseCode)


class TestRefusals:
    def test_refusal_is_found_by_its_status(self) -> None:
        assert all(status == refusal.status for status, refusal in REFUSALS.items())
        assert set(REFUSALS) == {400, 401, 403, 404, 426, 429, 431, 503}

    @pytest.mark.parametrize("status", REFUSALS)
    def test_each_refusal_is_documented(self, status: int) -> None:
        (row,) = rows(str(status))
        assert REFUSALS[status].meaning in row


def test_docs_have_no_unknown_codes() -> None:
    errors = re.findall(r"^\| `(\w+)` \| (?:yes|no) \|", PROTOCOL, re.MULTILINE)
    closes = re.findall(r"^\| (\d{4}) \| `", PROTOCOL, re.MULTILINE)
    refusals = re.findall(r"^\| (\d{3}) \|", PROTOCOL, re.MULTILINE)
    assert errors == list(ERRORS)
    assert [int(code) for code in closes] == list(CloseCode)
    assert [int(status) for status in refusals] == list(REFUSALS)
