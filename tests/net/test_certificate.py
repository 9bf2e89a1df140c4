"""When a certificate is valid, and whether its files were replaced."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest

from broker.config import Server
from broker.net.certificate import DAY, CertificateMonitor, check_validity, read_validity
from tests.fixtures_certificates import make_pair

pytestmark = pytest.mark.needs("openssl")


@pytest.mark.parametrize("kind", ["ec", "rsa"])
@pytest.mark.parametrize("days", [2, 20_000])  # as UTCTime and, from 2050 on, as GeneralizedTime
def test_validity_is_read(tmp_path: Path, kind: str, days: int) -> None:
    found = read_validity(str(make_pair(tmp_path, kind=kind, days=days).certificate))
    assert found is not None
    assert abs(found.begin - time.time()) < 120
    assert found.end - found.begin == days * DAY


def test_a_file_without_a_certificate_has_no_validity(tmp_path: Path) -> None:
    assert read_validity(str(tmp_path / "none")) is None
    (tmp_path / "some").write_text(ssl.DER_cert_to_PEM_cert(b"nonsense"))
    assert read_validity(str(tmp_path / "some")) is None


def test_expired_and_future_certificates_are_mistakes(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    server = Server(certificate=str(pair.certificate), key=str(pair.key))
    now = time.time()
    assert check_validity(server, now + 60) == []
    (late,) = check_validity(server, now + 3 * DAY)
    assert (late.key, "expired on" in late.message) == ("server.certificate", True)
    (early,) = check_validity(server, now - DAY)
    assert "is not valid before" in early.message


def test_warning_comes_in_the_last_third_and_once_a_day(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair = make_pair(tmp_path)
    monitor = CertificateMonitor(Server(certificate=str(pair.certificate), key=str(pair.key)))
    now = time.time()
    for later, said in ((0.1, ""), (1.5, "expires soon"), (1.6, ""), (2.6, "certificate expired"), (-1, "")):
        monitor.warn(now + later * DAY)
        assert said in (out := capfd.readouterr().out)
        assert bool(said) == bool(out)


def test_replaced_files_are_seen_once_they_rest(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path), make_pair(tmp_path, "other")
    server = Server(certificate=str(pair.certificate), key=str(pair.key))
    monitor = CertificateMonitor(server)
    assert not monitor.is_replaced()
    other.certificate.replace(pair.certificate)
    assert not monitor.is_replaced()
    other.key.replace(pair.key)
    assert [monitor.is_replaced() for _ in range(3)] == [False, True, False]


def test_files_that_are_replaced_while_they_are_loaded_are_loaded_again(tmp_path: Path) -> None:
    pair, other, third = make_pair(tmp_path), make_pair(tmp_path, "other"), make_pair(tmp_path, "third")
    server = Server(certificate=str(pair.certificate), key=str(pair.key))
    monitor = CertificateMonitor(server)
    other.certificate.replace(pair.certificate)
    assert [monitor.is_replaced() for _ in range(2)] == [False, True]
    third.certificate.replace(pair.certificate)
    monitor.use(server)
    assert [monitor.is_replaced() for _ in range(3)] == [False, True, False]
