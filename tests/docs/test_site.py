"""The docs as a site: it builds without a warning, needs nothing from elsewhere, and a dead link fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("docs", "examples", "tools/site", "nginx", "systemd", ".tools/site", "clients/js/comparison")

pytestmark = pytest.mark.needs("docs")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", "site"],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the site, and the site in `site`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name)
    for file in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"]:
        shutil.copy(file, folder)
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site(checkout: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"CONTRIBUTING", "CHANGELOG", "examples/index"}
    assert [name for name in pages if not (checkout / "site" / f"{name}.html").is_file()] == []


def test_site_loads_nothing_from_elsewhere(checkout: Path) -> None:
    for page in (checkout / "site").rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\"\s>]+)", text)
        loaded += [
            url
            for tag in re.findall(r"<link\b[^>]*>", text)
            if "stylesheet" in tag or "icon" in tag or "preconnect" in tag
            for url in re.findall(r"href=\"?([^\"\s>]+)", tag)
        ]
        assert loaded
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page


def test_pages_with_diagrams_load_the_local_mermaid(checkout: Path) -> None:
    for page in (checkout / "site").rglob("*.html"):
        text = page.read_text()
        assert ("assets/mermaid.min.js" in text) == ('class="mermaid"' in text), page
    assert "assets/mermaid.min.js" in (checkout / "site" / "architecture.html").read_text()


def test_tables_of_settings_are_marked_for_the_style_sheet(checkout: Path) -> None:
    assert (checkout / "site" / "configuration.html").read_text().count("<table data-settings") == 7
    assert "[data-settings]" in (checkout / "site" / "assets" / "site.css").read_text()


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[x](no-such-page.md)", "no-such-page.md"),
        ("[x](protocol.md#no-such-heading)", "no-such-heading"),
        ("[x](../nginx/no-such-file.conf)", "no-such-file.conf"),
    ],
)
def test_dead_link_fails_the_build(checkout: Path, tmp_path: Path, link: str, problem: str) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    page = folder / "docs" / "logs.md"
    page.write_text(f"{page.read_text()}\n{link}\n")
    done = build(folder)
    assert done.returncode != 0
    assert problem in done.stderr
