"""Every command and option is in the docs, and what the docs name exists.

The tables of settings, error codes, close codes and exit statuses are compared with the code by the tests of `config`,
`errors` and `cli`.
"""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from broker import __version__
from broker.config.describe import schema
from tests.cli.commands import commands

ROOT = Path(__file__).parent.parent
COMMANDS = ROOT / "docs" / "commands.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])


def sections(document: Path) -> dict[str, str]:
    """The text under each heading."""
    parts = re.split(r"^#+ +(.+)$", document.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code(document: Path) -> str:
    """What a document shows as code, in blocks or in a line."""
    return "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", document.read_text(), re.MULTILINE | re.DOTALL))


def test_each_command_is_documented() -> None:
    documented = {heading for heading in sections(COMMANDS) if heading.startswith("wsbroker ")}
    assert documented == {words for words, _ in commands()}


@pytest.mark.parametrize(("words", "command"), list(commands()))
def test_each_option_is_documented_with_its_command(words: str, command: click.Command) -> None:
    documented = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections(COMMANDS)[words]))
    assert documented == {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--") and name != "--help"
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_settings_in_the_docs_exist(document: Path) -> None:
    shown = code(document)
    named = set(re.findall(r"\bwsbroker ([a-z]+)\b", shown))
    assert named <= {words.split()[1] for words, _ in commands()}

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?<!token )(?<!key )\bmake ([a-z-]+)\b", shown)) <= targets

    definitions = schema()["$defs"]
    settings = {f"{name.lower()}.{key}" for name, struct in definitions.items() for key in struct["properties"]}
    assert set(re.findall(r"\b(?:server|limits|log)\.[a-z_]+\b(?=`)", shown)) <= settings

    variables = {f"WSBROKER_{setting.upper().replace('.', '__')}" for setting in settings}
    variables |= {
        str(option.envvar) for _, command in commands() for option in command.params if option.envvar is not None
    }
    assert {name.removesuffix("_FILE") for name in re.findall(r"\bWSBROKER_[A-Z_]+[A-Z]\b", shown)} <= variables


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_the_docs_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        if anchor:
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections(linked)}
            assert anchor in slugs, target


def test_changelog_has_this_version() -> None:
    assert any(heading.startswith(f"[{__version__}]") for heading in sections(ROOT / "CHANGELOG.md"))
