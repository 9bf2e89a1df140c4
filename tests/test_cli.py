"""The command line: what each command says, and the exit status of each end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click
import pytest
from websockets.asyncio.server import ServerConnection

from broker import __version__, cli
from broker.client import DEFAULT_URL, CommandRefused
from broker.config import default_toml, load, schema
from broker.errors import ERRORS, CloseCode
from broker.messages import ErrorAnswer
from tests.client.fake import FakeBroker, closing, refusing, running, saying
from tests.fixtures_command import Result, finish, start, wsbroker

ROOT = Path(__file__).parent.parent


# What several commands share


def test_duplicated_constants_are_equal() -> None:
    assert cli.URL == DEFAULT_URL


def test_every_exit_status_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [(str(int(status)), status.meaning) for status in cli.Status]


async def test_help_lists_the_commands() -> None:
    result = await wsbroker("--help")
    assert result.status == 0
    assert all(re.search(rf"^  {name} ", result.out, re.MULTILINE) for name in cli.wsbroker.commands)


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
        (["sub", "t", "--last", "3"], "No such option '--last'"),
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


async def test_invalid_command_line_can_be_explained_in_json() -> None:
    result = await wsbroker("pub", "--json", "--kye", "k", "t")
    assert result.status == 2
    error = json.loads(result.err)
    assert error["error"] == "usage"
    assert "No such option '--kye'" in error["message"]


async def test_a_key_that_is_not_utf8_is_refused() -> None:
    result = await wsbroker("pub", "t", "1", "--key", b"\xff".decode("utf-8", "surrogateescape"))
    assert result.status == 2
    assert "--key: it is not UTF-8" in result.err


@pytest.mark.parametrize("arguments", [["config", "default"], ["config", "schema"], ["version"], ["check"]])
async def test_closed_pipe_is_silent_and_a_full_disk_is_reported(arguments: list[str]) -> None:
    source, closed = os.pipe()
    os.close(source)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with start(*arguments, stdout=closed) as process:
            assert await finish(process) == Result(141, "", "")
        async with start(*arguments, stdout=full) as process:
            assert await finish(process) == Result(74, "", "wsbroker: cannot write: No space left on device\n")
    finally:
        os.close(closed)
        os.close(full)


def test_command_imports_only_what_it_needs() -> None:
    code = "import sys; from broker.cli import main; {}; print(*sys.modules)"
    for run, without in (
        ("main(['version'])", {"broker.daemon", "broker.client", "broker.config", "asyncio", "uvloop", "structlog"}),
        ("main(['pub', 'bad topic', '1'])", {"broker.daemon", "broker.config", "uvloop", "structlog"}),
        ("main(['sub', 'bad topic'])", {"broker.daemon", "broker.config", "uvloop", "structlog"}),
        ("main(['check'])", {"broker.client"}),
        ("main(['config', 'default'])", {"broker.daemon", "broker.client", "uvloop", "structlog"}),
    ):
        process = subprocess.run(
            [sys.executable, "-c", code.format(run)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert without.isdisjoint(process.stdout.splitlines()[-1].split()), run


# serve


async def test_serve_accepts_addresses_and_log_format(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"]
    listen = [word for address in addresses for word in ("--listen", address)]
    async with start("serve", *listen, "--log-format", "json", "--log-level", "debug") as process:
        assert process.stderr is not None
        entries: list[dict[str, Any]] = []
        while not entries or entries[-1]["event"] != "ready":
            entries.append(json.loads(await process.stderr.readline()))
        assert [entry["address"] for entry in entries if entry["event"] == "listening"] == addresses
        for address in addresses:
            assert await wsbroker("pub", "t", "1", "--url", address) == Result(0, "", "")
        process.send_signal(signal.SIGINT)
        assert (await finish(process)).status == 0


@pytest.mark.parametrize("command", ["serve", "check"])
async def test_every_mistake_in_the_configuration_is_reported(command: str, tmp_path: Path) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text("[limits]\nmax_sise = 1\nmax_queue = 0\n")
    environ = {"WSBROKER_LOG__LEVEL": "loud"}
    result = await wsbroker(command, "--config", str(file), environ=environ)
    assert (result.status, result.out) == (78, "")
    lines = result.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("wsbroker: ") for line in lines)
    for key in ("limits.max_sise", "limits.max_queue", "log.level"):
        assert key in result.err


async def test_serve_reports_mistakes_in_its_log_format() -> None:
    result = await wsbroker("serve", "--listen", "nowhere", "--log-format", "json")
    assert result.status == 78
    error = json.loads(result.err)
    assert error["event"] == "cannot start"
    assert "server.listen" in error["problem"]


async def test_serve_does_not_start_where_it_cannot_listen(tmp_path: Path) -> None:
    result = await wsbroker("serve", "--listen", f"unix:{tmp_path}/no/such/folder")
    assert result.status == 1
    assert len(result.err.splitlines()) == 1


# check and config


async def test_check_accepts_a_valid_configuration() -> None:
    result = await wsbroker("check", environ={"WSBROKER_SERVER__LISTEN": "127.0.0.1:1,unix:/run/x"})
    assert result == Result(0, "The configuration is good: serve listens on 127.0.0.1:1, unix:/run/x.\n", "")


def few_files() -> None:
    """So many open files may a process have, and no more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


@pytest.mark.parametrize("command", [["check"], ["serve", "--listen", "127.0.0.1:0"]])
def test_check_reports_too_many_connections_like_serve(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "broker", *command],
        cwd=ROOT,
        env={**os.environ, "WSBROKER_LIMITS__MAX_CONNECTIONS": "1000"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=few_files,
    )
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("wsbroker: limits.max_connections: 1000 do not fit into the limit of 256 open files")
    assert done.stderr.count("\n") == 1


# The start


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


# check and config, in other forms


async def test_check_reports_in_json() -> None:
    result = await wsbroker("check", "--json", environ={"WSBROKER_LIMITS__MAX_SIZE": "x", "WSBROKER_LOG__LEVEL": "y"})
    errors = [json.loads(line) for line in result.err.splitlines()]
    assert [error["error"] for error in errors] == ["config", "config"]
    assert "limits.max_size" in errors[0]["message"]


async def test_missing_configuration_file_is_a_mistake(tmp_path: Path) -> None:
    result = await wsbroker("check", "--config", str(tmp_path / "none.toml"))
    assert result.status == 78
    assert "none.toml" in result.err


async def test_default_configuration_file_is_valid(tmp_path: Path) -> None:
    result = await wsbroker("config", "default")
    assert result == Result(0, default_toml(), "")
    file = tmp_path / "wsbroker.toml"
    file.write_text(result.out)
    assert load(file, {}, {}) == load(None, {}, {})


async def test_the_schema_is_one_json_document() -> None:
    result = await wsbroker("config", "schema")
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out) == schema()


# version


async def test_version_lists_the_dependencies() -> None:
    result = await wsbroker("version")
    assert (result.status, result.err) == (0, "")
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names == [
        "wsbroker",
        "broker._speedups",
        "Python",
        "uvloop",
        "msgspec",
        "websockets",
        "click",
        "structlog",
        "rich",
    ]
    versions = json.loads((await wsbroker("version", "--json")).out)
    assert versions["wsbroker"] == __version__
    assert list(versions) == names
    assert (await wsbroker("--version")).out == f"wsbroker {__version__}\n"


@pytest.mark.parametrize("arguments", ["version", "pub t 1", "sub t", "serve"])
def test_missing_extension_is_reported_in_one_line(arguments: str) -> None:
    words = arguments.split()
    code = f"import sys; sys.modules['broker._speedups'] = None; import broker.cli; sys.exit(broker.cli.main({words}))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (70, "")
    assert process.stderr.startswith("wsbroker: broker._speedups is not built, or not for this Python: ")
    assert len(process.stderr.splitlines()) == 1


# pub and sub: every way in which they end, but for what the tests of the client have


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["pub", "a..b", "1"], "bad_topic: `a..b`: a token is empty; tokens are joined by single dots"),
        (["pub", "a.*", "1"], "bad_topic: `a.*`: `*` and `>` are for subscriptions, a topic holds neither"),
        (["sub", "a", ">.b"], "bad_topic: `>.b`: `>` must be the last token"),
        (["pub", "t", "hello"], "bad_json: not valid JSON (with --text, DATA is a plain string)"),
        (["pub", "t", ""], "bad_json: not valid JSON (with --text, DATA is a plain string)"),
        (["pub", "t", '1,"topic":"u"'], "bad_json: not one JSON value (with --text, DATA is a plain string)"),
        (["pub", "t", "\udcff", "--text"], "bad_json: the text is not UTF-8: invalid start byte"),
    ],
)
async def test_invalid_data_is_refused_without_connecting(arguments: list[str], wrong: str) -> None:
    assert await wsbroker(*arguments, "--url", "unix:/nowhere") == Result(65, "", f"wsbroker: {wrong}\n")


async def test_connect_to_an_unused_address_has_its_exit_status() -> None:
    result = await wsbroker("pub", "t", "1", "--url", "unix:/nowhere")
    assert result == Result(69, "", "wsbroker: cannot connect to unix:/nowhere: No such file or directory\n")
    result = await wsbroker("sub", "t", "--url", "unix:/nowhere", "--json")
    message = "cannot connect to unix:/nowhere: No such file or directory"
    assert json.loads(result.err) == {"error": "unreachable", "message": message, "retry": False}


async def test_connect_to_another_server_has_its_exit_status() -> None:
    async with running(saying(b"hello")) as fake:
        result = await wsbroker("sub", "t", "--url", fake.url, "--json")
        assert (result.status, json.loads(result.err)["error"]) == (76, "not_a_broker")


@pytest.mark.parametrize(("status", "ends"), [(400, 69), (401, 77), (403, 77), (404, 69), (426, 69), (503, 75)])
async def test_a_refusal_has_its_exit_status(status: int, ends: int) -> None:
    refuse = refusing(HTTPStatus(status), "so be it", Retry_After="4")
    async with running(process_request=refuse) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url, "--json")
    assert result.status == ends
    message = f"{fake.url} refused the connection: HTTP {status}: so be it"
    retry = status == 503
    assert json.loads(result.err) == {
        "error": "refused", "message": message, "retry": retry, "status": status, "retry_after": 4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        (CloseCode.NORMAL, 69),
        (CloseCode.GOING_AWAY, 75),
        (CloseCode.TOO_BIG, 69),
        (CloseCode.SLOW_CONSUMER, 75),
        (CloseCode.UNAUTHORIZED, 77),
        (CloseCode.EXPIRED, 77),
        (CloseCode.BAD_COMMANDS, 69),
        (CloseCode.DISCONNECTED, 77),
    ],
)
async def test_a_close_has_its_exit_status(code: CloseCode, ends: int) -> None:
    async with running(closing(code, code.reason)) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url)
    closed = f"the broker closed the connection: {code:d} {code.reason} ({code.meaning})"
    assert result == Result(ends, "", f"wsbroker: {closed}\n")


@pytest.mark.parametrize("code", list(ERRORS))
def test_an_error_has_its_exit_status(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = CommandRefused(ErrorAnswer(code=code, message="why", retry=ERRORS[code].retry, retry_after_ms=7))
    status = cli.Report(as_json=False).command_error(error)
    assert capsys.readouterr().err == f"wsbroker: {code}: why\n"
    expected = {"unauthorized": 77, "forbidden": 77}.get(code, 65)
    assert status == (75 if error.retry else expected)


async def test_lost_connection_has_its_exit_status() -> None:
    async def cut(fake: FakeBroker, connection: ServerConnection) -> None:
        async for _ in fake.commands(connection):
            connection.transport.abort()

    async with running(cut) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url, "--json")
        assert result.status == 75
        assert json.loads(result.err)["code"] == 1006


async def test_control_characters_from_the_server_are_not_printed() -> None:
    async with running(closing(4999, "\x1b[31mred\x07")) as fake:
        result = await wsbroker("pub", "t", "1", "--url", fake.url)
    assert result.err == "wsbroker: the broker closed the connection: 4999 �[31mred�\n"


async def test_commands_work_with_closed_standard_streams() -> None:
    async with running() as fake:
        for redirect, arguments, status in (
            ("<&-", "pub t", 66),
            (">&-", "sub t", 74),
            (">&-", "version", 74),
            ("<&- >&- 2>&-", "pub t 1", 0),
        ):
            command = f"WSBROKER_URL={fake.url} {sys.executable} -m broker {arguments} {redirect}"
            process = await asyncio.create_subprocess_shell(
                command, cwd=ROOT, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            _, err = await process.communicate()
            assert process.returncode == status
            assert b"Traceback" not in err


def test_every_command_has_help() -> None:
    def commands(group: click.Group) -> list[click.Command]:
        nested = [commands(command) for command in group.commands.values() if isinstance(command, click.Group)]
        return [*group.commands.values(), *(command for inner in nested for command in inner)]

    for command in commands(cli.wsbroker):
        assert command.help
        assert all(isinstance(option, click.Argument) or getattr(option, "help", None) for option in command.params)
