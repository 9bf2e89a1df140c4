"""A hook of mkdocs: pages and files outside docs/ that the docs link to, local copies of what themes load elsewhere, and
marks for the style sheet.

Links are written for a reader of the repository: `../nginx/wsbroker.conf` in docs/deploy-nginx.md. The site has the linked
file under the same path (`nginx/wsbroker.conf`), and this hook rewrites the link. A folder stands for its README.md.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ("mermaid.min.js", "iframe-worker.js")  # tools/setup docs fetches them
# Pages of the site that lie outside docs/. README.md is not one of them: docs/index.md is the start page.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/**/README.md")))
LINK = re.compile(r"(?<=\]\()(?!#)(?![a-z]+:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, every file that a page links to, and the assets."""
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    for page in [file for file in files if file.is_documentation_page()]:
        for path, _ in LINK.findall(_without_code(page.content_string)):
            target = _target(page.src_uri, path)
            found = ROOT / target
            if not target.startswith("docs/") and found.is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(found)))
    for name in ASSETS:
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / ".tools" / "site" / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links for the site. A link to nothing stays, and mkdocs reports it."""

    def rewrite(match: re.Match[str]) -> str:
        path, anchor = match.groups()
        target = _target(page.file.src_uri, path)
        uri = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + (anchor or "")

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Marks the tables of settings, for site.css: their last column is too long to stand beside the others."""
    return html.replace("<table>\n<thead>\n<tr>\n<th>key</th>", "<table data-settings>\n<thead>\n<tr>\n<th>key</th>")


def _target(page: str, path: str) -> str:
    """The path in the repository of what a page of the site links to."""
    source = page if page in PAGES else f"docs/{page}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def _without_code(text: str) -> str:
    return FENCE.sub("", text)
