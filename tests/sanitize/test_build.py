"""The copy of the sources that `make sanitize` and `make fuzz` build; the builds themselves would take minutes."""

from __future__ import annotations

from pathlib import Path

from tests.sanitize.build import NATIVE_TESTS, SOURCES, copy_sources


def test_a_copy_has_all_that_the_build_and_the_native_tests_need(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(SOURCES)
    assert (tmp_path / "_speedups" / "speedups.pyx").exists()
    assert (tmp_path / "bench" / "load").is_dir()
    assert list((tmp_path / NATIVE_TESTS).glob("test_*.py"))


def test_a_copy_has_no_build_of_the_checkout(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    assert not list(tmp_path.rglob("*.so"))


def test_a_copy_is_brought_up_to_date_and_keeps_the_examples_of_hypothesis(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    (tmp_path / "tests" / "stale.py").touch()
    (tmp_path / ".hypothesis").mkdir()
    copy_sources(tmp_path)
    assert not (tmp_path / "tests" / "stale.py").exists()
    assert (tmp_path / ".hypothesis").exists()
