"""The verdict on the Autobahn suite: what counts as passed, and that nothing is passed over."""

from __future__ import annotations

import pytest

from tests.conformance.proxy import SITE, websocket_location
from tests.conformance.suite import judge

OK = {"behavior": "OK", "behaviorClose": "OK"}


@pytest.mark.parametrize("behavior", ["OK", "NON-STRICT", "INFORMATIONAL"])
def test_informational_and_non_strict_results_pass(behavior: str) -> None:
    assert judge({"1.1.1": {"behavior": behavior, "behaviorClose": behavior}}, 1) == []


@pytest.mark.parametrize("behavior", ["FAILED", "UNIMPLEMENTED", "WRONG CODE", "UNCLEAN", "FAILED BY CLIENT"])
def test_other_results_fail(behavior: str) -> None:
    assert judge({"1.1.1": OK | {"behavior": behavior}}, 1) == [f"case 1.1.1: behavior {behavior}, close OK"]
    assert judge({"1.1.1": OK | {"behaviorClose": behavior}}, 1) == [f"case 1.1.1: behavior OK, close {behavior}"]


def test_failures_are_listed_in_the_order_of_the_suite() -> None:
    bad = OK | {"behavior": "FAILED"}
    lines = judge({"10.1.1": bad, "9.2.1": bad, "1.1.1": OK}, 3)
    assert [line.split(":")[0] for line in lines] == ["case 9.2.1", "case 10.1.1"]


def test_case_that_did_not_run_fails() -> None:
    assert judge({"1.1.1": OK}, 301) == ["1 cases ran in place of 301"]
    assert judge({}, 301) == ["0 cases ran in place of 301"]


def test_proxy_has_the_location_of_the_site_without_its_limits() -> None:
    location = websocket_location(SITE.read_text())
    assert location.split()[:6] == ["location", "=", "/ws", "{", "proxy_pass", "http://wsbroker/;"]
    assert "proxy_set_header Upgrade" in location
    assert "limit_" not in location
