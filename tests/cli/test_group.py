"""Finding the commands, and how the program starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from broker.cli.group import COMMANDS
from tests.cli.commands import commands
from tests.fixtures_command import wsbroker

ROOT = Path(__file__).parent.parent.parent


async def test_help_lists_the_commands() -> None:
    result = await wsbroker("--help")
    assert result.status == 0
    assert all(re.search(rf"^  {name} ", result.out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("group", [[], ["config"]])
async def test_help_does_not_cut_summaries(group: list[str]) -> None:
    shown = " ".join((await wsbroker(*group, "--help")).out.split())
    words = " ".join(["wsbroker", *group])
    for name, command in commands():
        if name.rpartition(" ")[0] == words:
            assert command.help
            summary = " ".join(command.help.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")
            assert f" {name.rpartition(' ')[2]} {summary}" in shown
    assert "..." not in shown.partition("Commands:")[2]


async def test_missing_command_prints_help_and_fails() -> None:
    result = await wsbroker()
    assert result.status == 2
    assert "Usage: wsbroker" in result.err


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["pub"], "Missing argument 'TOPIC'"),
        (["sub"], "Missing argument 'TOPIC...'"),
        (["sub", "t", "--overflow", "none"], "'none' is not one of 'drop_oldest'"),
        (["sub", "t", "--since", "3"], "No such option '--since'"),
        (["pub", "t", "1", "--url", "localhost:8765"], "neither ws://host:port, wss://host:port nor unix:/path"),
        (["pub", "t", "1", "--token", "a b"], "a token is printable ASCII without blanks"),
        (["pub", "t", "1", "--ca", "/none.pem"], "/none.pem cannot be read: No such file or directory"),
        (["sub", "t", "--ca", "pyproject.toml"], "pyproject.toml holds no certificate in PEM format"),
        (["serve", "--log-level", "loud"], "'loud' is not one of 'debug'"),
    ],
)
async def test_invalid_command_line_is_explained(arguments: list[str], wrong: str) -> None:
    result = await wsbroker(*arguments)
    assert (result.status, result.out) == (2, "")
    assert wrong in result.err
    assert re.fullmatch(r"wsbroker: .+; see wsbroker( \w+)? --help\n", result.err)


async def test_invalid_command_line_can_be_explained_in_json() -> None:
    result = await wsbroker("pub", "--json", "--kye", "k", "t")
    assert result.status == 2
    error = json.loads(result.err)
    assert error["error"] == "usage"
    assert "No such option '--kye'" in error["message"]


def test_command_imports_only_what_it_needs() -> None:
    code = "import sys; from broker.cli import main; {}; print(*sys.modules)"
    for run, without in (
        ("main(['--help'])", {"broker.daemon", "wsbroker_client", "broker.config", "msgspec", "asyncio", "structlog"}),
        ("main(['version'])", {"broker.daemon", "wsbroker_client", "broker.config", "asyncio", "uvloop", "structlog"}),
        ("main(['pub', 'bad topic', '1'])", {"broker.daemon", "broker.config", "uvloop", "structlog"}),
        ("main(['sub', 'bad topic'])", {"broker.daemon", "broker.config", "uvloop", "structlog"}),
        ("main(['check'])", {"wsbroker_client"}),
        ("main(['config', 'default'])", {"broker.daemon", "wsbroker_client", "uvloop", "structlog"}),
    ):
        process = subprocess.run(
            [sys.executable, "-c", code.format(run)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert without.isdisjoint(process.stdout.splitlines()[-1].split()), run


@pytest.mark.parametrize(("module", "command"), [("click", "version"), ("uvloop", "serve"), ("asyncio", "sub")])
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_during_imports_is_silent(tmp_path: Path, module: str, command: str, ignored: bool) -> None:
    # In place of the real module, one that is interrupted.
    fake = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('went on', flush=True)\nos._exit(0)\n"
    (tmp_path / f"{module}.py").write_text(fake)
    done = subprocess.run(
        [sys.executable, "-m", "broker", command, *(["t"] if command == "sub" else [])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    assert done.stderr == ""
    # A shell says 130 for it.
    assert (done.returncode, done.stdout) == ((0, "went on\n") if ignored else (-signal.SIGINT, ""))


@pytest.mark.parametrize("arguments", ["version", "pub t 1", "sub t", "serve"])
def test_missing_extension_is_reported_in_one_line(arguments: str) -> None:
    words = arguments.split()
    code = f"import sys; sys.modules['broker._speedups'] = None; import broker.cli; sys.exit(broker.cli.main({words}))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (70, "")
    assert process.stderr.startswith("wsbroker: broker._speedups is not built, or not for this Python: ")
    assert len(process.stderr.splitlines()) == 1


def test_every_command_has_help() -> None:
    for _, command in commands():
        assert command.help
        assert all(isinstance(option, click.Argument) or getattr(option, "help", None) for option in command.params)
