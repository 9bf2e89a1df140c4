"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.config import sources


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the configuration of the machine that it runs on."""
    path = tmp_path / "etc" / "wsbroker.toml"
    monkeypatch.setattr(sources, "DEFAULT_FILE", path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "wsbroker.toml"
