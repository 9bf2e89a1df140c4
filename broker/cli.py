"""The command `wsbroker`.

A command does its work and returns its exit status; what goes wrong becomes one line on standard error, never a
traceback. Modules are imported inside the commands, so that each pays for its own alone: `pub` and `sub` run in loops
of shell scripts.
"""

from __future__ import annotations

import enum
import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import click

from broker import __version__

if TYPE_CHECKING:
    from broker.client import ClientError
    from broker.config import Config
    from broker.errors import CommandError, ConfigError
    from broker.overflow import Overflow

URL: Final = "ws://127.0.0.1:8765"
"""Where a broker without any configuration listens. As `broker.client.DEFAULT_URL`, which would have to be imported."""

EXTENSION: Final = "broker._speedups"


class OverflowOption(click.Option):
    """`--overflow`. It looks the policies up when it is used, so that the other commands start without them."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        self.type = click.Choice(_overflows())
        return super().process_value(ctx, value)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        return record and (record[0], f"{record[1].rstrip('.')}: {', '.join(_overflows())}.")


def _overflows() -> tuple[str, ...]:
    from broker.overflow import OVERFLOWS

    return OVERFLOWS


class Status(enum.IntEnum):
    """The exit statuses. From 64 on those of sysexits.h, from 128 on what a shell gives for a signal (128 + number)."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "everything was done"
    INCOMPLETE = 1, "some lines were not published, each was reported; or, from `serve`, it could not start"
    USAGE = 2, "the command line is wrong"
    BAD_DATA = os.EX_DATAERR, "the data is not JSON, too large, or the broker does not accept the topic or the command"
    NO_INPUT = os.EX_NOINPUT, "standard input cannot be read"
    UNAVAILABLE = os.EX_UNAVAILABLE, "no broker can be reached there, or it refused or ended the connection"
    FAULT = os.EX_SOFTWARE, "the extension `broker._speedups` is missing"
    NO_OUTPUT = os.EX_IOERR, "standard output cannot be written"
    TRY_AGAIN = (
        os.EX_TEMPFAIL,
        "the broker cannot do it now, or ended the connection for a while: the same may work later",
    )
    NOT_A_BROKER = os.EX_PROTOCOL, "what answers there is not a wsbroker, or one of another version"
    NO_PERMISSION = (
        os.EX_NOPERM,
        "the token is missing, not valid or does not allow it; or an operator ended the connection",
    )
    BAD_CONFIG = os.EX_CONFIG, "the configuration has mistakes, each was reported"
    INTERRUPTED = 128 + signal.SIGINT, "Ctrl-C, or SIGINT; the connection was closed properly"
    BROKEN_PIPE = 128 + signal.SIGPIPE, "whoever read the output has closed it; the connection was closed properly"
    TERMINATED = 128 + signal.SIGTERM, "SIGTERM; the connection was closed properly"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args`, which is by default that of the process, and return the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    report = Report("--json" in args)
    try:
        status = wsbroker.main(args, prog_name="wsbroker", standalone_mode=False)
    except click.UsageError as error:
        if report.as_json:
            report.error("usage", error.format_message())
        else:
            error.show()
        return Status.USAGE
    except ImportError as error:
        if error.name != EXTENSION:
            raise
        report.error("no_extension", f"{EXTENSION} is not built, or not for this Python: {error}")
        return Status.FAULT
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # or one more would come out of the exit
        return Status.INTERRUPTED
    return int(status or 0)


_Command = TypeVar("_Command", bound=Callable[..., Any])


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Put several options together, to give them to several commands."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Print errors as JSON objects, one a line.")
_config_option = click.option(
    "--config",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TOML file. By default /etc/wsbroker/wsbroker.toml, if there is one.",
)
_connection_options = _options(
    click.option(
        "--url",
        metavar="U",
        default=URL,
        show_default=True,
        envvar="WSBROKER_URL",
        help="The broker: ws://host:port, wss://host:port or unix:/path.  [env: WSBROKER_URL]",
    ),
    click.option(
        "--token",
        metavar="T",
        envvar="WSBROKER_TOKEN",
        help="Says who you are. Others on this machine may see it on the command line, not in WSBROKER_TOKEN.",
    ),
    click.option(
        "--ca",
        metavar="FILE",
        envvar="WSBROKER_CA",
        type=click.Path(path_type=Path),
        help="Certificates to trust at wss://, in place of the system's.  [env: WSBROKER_CA]",
    ),
    _json_option,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s", prog_name="wsbroker")
def wsbroker() -> None:
    """A message broker for WebSockets."""


@wsbroker.command()
@_config_option
@click.option(
    "--listen",
    metavar="ADDRESS",
    multiple=True,
    help="host:port, [v6]:port, unix:/path or systemd; may be given several times.  [default: 127.0.0.1:8765]",
)
@click.option("--admin", metavar="ADDRESS", help="The admin listener, in HTTP; '' for none.  [default: 127.0.0.1:8766]")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="How the log is written.  [default: text]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
def serve(
    file: Path | None, listen: tuple[str, ...], admin: str | None, log_format: str | None, log_level: str | None
) -> int:
    """Run the broker until SIGTERM or Ctrl-C."""
    flags = {
        "server.listen": list(listen) or None,
        "server.admin": admin,
        "log.format": log_format,
        "log.level": log_level,
    }
    from broker.config import load, log_of
    from broker.errors import ConfigError

    try:
        config = load(file, os.environ, flags)
    except ConfigError as error:
        from broker.log import report_start_failure, set_up_log

        # In the way of the log, as everything else that keeps the broker from starting.
        found = log_of(file, os.environ, flags)
        set_up_log(found)
        for problem in error.problems:
            report_start_failure(found, problem)
        return Status.BAD_CONFIG
    from broker.daemon import run

    # By the path that it has now, whatever the working directory is then.
    file = None if file is None else file.absolute()
    return run(config, functools.partial(load, file, dict(os.environ), flags))


@wsbroker.command()
@_config_option
@_json_option
def check(file: Path | None, as_json: bool) -> int:
    """Read the configuration as `serve` does, and say every mistake.

    Exits with 0 if there is none, else with 78.
    """
    report = Report(as_json)
    config = _load(file, {}, report)
    if config is None:
        return Status.BAD_CONFIG
    from broker.daemon import check_resources
    from broker.errors import ConfigError

    try:
        check_resources(config)
    except ConfigError as error:
        return report.config_error(error)
    return _print(f"The configuration is good: serve listens on {', '.join(config.server.listen)}.\n", as_json)


@wsbroker.group()
def config() -> None:
    """Show what can be configured."""


@config.command("default")
def config_default() -> int:
    """Print a commented configuration file with every default."""
    from broker.config import default_toml

    return _print(default_toml())


@config.command("schema")
def config_schema() -> int:
    """Print the JSON Schema of the configuration file."""
    from broker.config import schema

    return _print(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")


@wsbroker.command()
@click.argument("topic")
@click.argument("data", required=False)
@click.option("--text", is_flag=True, help="The data is plain text, published as a JSON string.")
@click.option("--key", metavar="K", help="The key of the events.")
@_connection_options
def pub(
    topic: str,
    data: str | None,
    text: bool,
    key: str | None,
    url: str,
    token: str | None,
    ca: Path | None,
    as_json: bool,
) -> int:
    """Publish DATA, which is JSON, or each line of standard input.

    Every event is answered by the broker before the command ends. A line that is not published is reported with its
    number, the others are, and the exit status is 1 then.
    """
    from broker.client.shell import json_value, publish_lines, publish_one, text_value
    from broker.errors import CommandError
    from broker.topics import check_topic

    report = Report(as_json)
    _check_connection(url, token, ca)
    if key is not None and not _is_text(key):
        raise click.BadParameter("it is not UTF-8", param_hint="--key")
    try:
        check_topic(topic)
        # Arguments are bytes for the system. Python hands those that are not UTF-8 over as halves of surrogate pairs.
        value = None if data is None else (text_value if text else json_value)(os.fsencode(data))
    except CommandError as error:
        return report.command_error(error)
    if value is not None:
        return _run(publish_one(topic, value, key=key, url=url, token=token, ca=ca), report)
    if sys.stdin is None:
        report.error("no_input", "standard input is closed")
        return Status.NO_INPUT
    work = publish_lines(topic, text=text, key=key, url=url, token=token, ca=ca, failed=report.command_error)
    return _run(work, report)


@wsbroker.command()
@click.argument("topics", metavar="TOPIC...", nargs=-1, required=True)
@click.option("--overflow", metavar="P", cls=OverflowOption, help="When too slow.")
@click.option("--max-queue", metavar="N", type=click.IntRange(min=1), help="How many events may wait in the broker.")
@click.option(
    "--credit",
    metavar="N",
    type=click.IntRange(min=1),
    help="Let at most N events of each topic be under way: more come when those are printed.",
)
@_connection_options
def sub(
    topics: tuple[str, ...],
    overflow: Overflow | None,
    max_queue: int | None,
    credit: int | None,
    url: str,
    token: str | None,
    ca: Path | None,
    as_json: bool,
) -> int:
    """Print the events of topics and patterns as they come, one JSON object a line.

    A line with "op":"gap" stands where events were lost. Ctrl-C ends it.
    """
    from broker.client.shell import print_events
    from broker.errors import CommandError
    from broker.topics import check_pattern

    report = Report(as_json)
    _check_connection(url, token, ca)
    try:
        for topic in topics:
            check_pattern(topic)
    except CommandError as error:
        return report.command_error(error)
    if sys.stdout is None:
        report.error("no_output", "standard output is closed")
        return Status.NO_OUTPUT
    work = print_events(topics, overflow=overflow, max_queue=max_queue, credit=credit, url=url, token=token, ca=ca)
    return _run(work, report)


@wsbroker.command()
@click.option(
    "--subscribers",
    "--connections",
    metavar="N",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    help="Connections that subscribe; one more publishes.",
)
@click.option(
    "--topics",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=1,
    show_default=True,
    help="The subscribers are spread over so many topics, of which their number is a multiple.",
)
@click.option("--window", metavar="N", type=click.IntRange(1, 65_536), help="Publishes kept under way.  [default: 16]")
@click.option(
    "--rate",
    metavar="R",
    type=click.FloatRange(0, 10_000_000, min_open=True),
    help="Publishes a second, in place of a window: latencies count from when each is due.",
)
@click.option(
    "--payload",
    metavar="BYTES",
    type=click.IntRange(2, 65_000),
    default=128,
    show_default=True,
    help="Bytes of data of an event.",
)
@click.option(
    "--seconds",
    metavar="S",
    type=click.FloatRange(0.1, 86_400),
    default=5.0,
    show_default=True,
    help="How long to measure.",
)
@_connection_options
def bench(
    subscribers: int,
    topics: int,
    window: int | None,
    rate: float | None,
    payload: int,
    seconds: float,
    url: str,
    token: str | None,
    ca: Path | None,
    as_json: bool,
) -> int:
    """Load a running broker and measure it.

    Everything happens in topics of a random name below "bench.", so that nobody else's are touched; but the broker has
    less time for others meanwhile.
    """
    from broker.client.bench import Outcome, Plan, measure, missing_files
    from broker.client.bench_view import View, as_line, table

    report = Report(as_json)
    _check_connection(url, token, ca)
    if window is not None and rate is not None:
        raise click.UsageError("--window and --rate exclude each other")
    if subscribers % topics:
        raise click.BadParameter(f"{subscribers} is not a multiple of the {topics} topics", param_hint="--subscribers")
    if reason := missing_files(subscribers):
        raise click.BadParameter(reason, param_hint="--subscribers")
    plan = Plan(url, subscribers, topics, window or 16, rate, payload, seconds, token, ca)
    outcomes: list[Outcome] = []

    async def work(view: View) -> bool:
        outcomes.append(await measure(plan, view.show))
        return True

    with View(plan, quiet=as_json) as view:
        status = _run(work(view), report)
    if status != Status.OK:
        return status
    return _print((as_line if as_json else table)(outcomes[0]), as_json)


@wsbroker.command()
@_json_option
def version(as_json: bool) -> int:
    """Print the versions of the broker, its extension and its main dependencies."""
    import importlib
    import importlib.metadata
    import platform

    extension = importlib.import_module(EXTENSION)
    found = {
        "wsbroker": __version__,
        EXTENSION: f"built as {Path(str(extension.__file__)).name}",
        "Python": platform.python_version(),
    }
    for name in ("uvloop", "msgspec", "websockets", "click", "structlog", "rich"):
        found[name] = importlib.metadata.version(name)
    width = max(map(len, found))
    lines = json.dumps(found) if as_json else "\n".join(f"{name:{width}}  {text}" for name, text in found.items())
    return _print(lines + "\n", as_json)


class ShutdownSignal:
    """INT and TERM: the first one cancels what runs, so that it closes its connection; the second one is the end.

    Python's own way, KeyboardInterrupt, comes out wherever the program is, also while it cleans up or exits, and then
    as a traceback. The handlers stay until the process ends.
    """

    def __init__(self) -> None:
        self.status = 0
        """What to exit with after a signal; 0 as long as there was none."""
        self._cancel: Callable[[], object] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell without job control starts what runs in the background so that it ignores SIGINT.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._signal)

    async def or_else(self, work: Coroutine[Any, Any, bool]) -> bool:
        """Do `work`. Raises asyncio.CancelledError after a signal."""
        import asyncio

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._cancel = functools.partial(loop.call_soon_threadsafe, task.cancel)
        try:
            return await work
        finally:
            self._cancel = None

    def _signal(self, number: int, frame: object) -> None:
        if self.status or self._cancel is None:
            os._exit(128 + number)
        self.status = 128 + number
        self._cancel()


class Report:
    """Says on standard error what went wrong, as a line of text or as a JSON object a line."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def error(self, error: str, message: str, **details: object) -> None:
        """Say one thing: `error` is a word for programs, `message` for people; details that are None are left out."""
        if self.as_json:
            given = {name: value for name, value in details.items() if value is not None}
            text = json.dumps({"error": error, "message": message, **given}, ensure_ascii=False)
        else:
            # Some of it comes from the other side, and must not command the terminal.
            text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in f"wsbroker: {message}")
        click.echo(text.encode("utf-8", "replace"), err=True)

    def command_error(self, error: CommandError, line: int | None = None) -> int:
        """Say why a command was not carried out, and return the status that a program ends with for it alone."""
        message = f"line {line}: {error}" if line is not None and not self.as_json else str(error)
        if self.as_json:
            message = error.message
        self.error(error.code, message, retry=error.retry, retry_after_ms=error.retry_after_ms, line=line)
        if error.retry:
            return Status.TRY_AGAIN
        return Status.NO_PERMISSION if error.code in ("unauthorized", "forbidden") else Status.BAD_DATA

    def config_error(self, error: ConfigError) -> int:
        """Say every mistake in the configuration, and return the status of a program that fails for it."""
        for problem in error.problems:
            self.error("config", problem)
        return Status.BAD_CONFIG

    def failure(self, failure: ClientError) -> int:
        """Say why there is no connection, or no longer, and return the status that the program ends with."""
        from broker.client import Closed, LoadFailed, NotABroker, Refused
        from broker.errors import CloseCode

        error, status, details = "unreachable", Status.UNAVAILABLE, {}
        if isinstance(failure, NotABroker):
            error, status = "not_a_broker", Status.NOT_A_BROKER
        elif isinstance(failure, LoadFailed):
            error = "load"
        elif isinstance(failure, Refused):
            error, details = "refused", {"status": failure.status, "retry_after": failure.retry_after}
            status = Status.NO_PERMISSION if failure.status in (401, 403) else status
        elif isinstance(failure, Closed):
            error, details = "closed", {"code": failure.code, "retry_after_ms": failure.retry_after_ms}
            if failure.code in (CloseCode.UNAUTHORIZED, CloseCode.EXPIRED, CloseCode.DISCONNECTED):
                status = Status.NO_PERMISSION
        if failure.retry:
            status = Status.TRY_AGAIN
        self.error(error, str(failure), retry=failure.retry, **details)
        return status


def _print(text: str, as_json: bool = False) -> int:
    """Write to standard output, at once. Returns the exit status; an error is reported."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is still in Python's buffer would be written at exit, and fail again, aloud.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return Status.BROKEN_PIPE
        Report(as_json).error("no_output", f"cannot write: {error.strerror}")
        return Status.NO_OUTPUT
    return Status.OK


def _load(file: Path | None, flags: Mapping[str, object], report: Report) -> Config | None:
    """Read the configuration. None if there are mistakes, which are reported then."""
    from broker.config import load
    from broker.errors import ConfigError

    try:
        return load(file, os.environ, flags)
    except ConfigError as error:
        report.config_error(error)
        return None


def _check_connection(url: str, token: str | None, ca: Path | None) -> None:
    """Check what both `pub` and `sub` are given."""
    from broker.client.stream import check_url, trust

    try:
        check_url(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--url") from None
    if ca is not None:
        try:
            trust(ca)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--ca") from None
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise click.BadParameter("a token is printable ASCII without blanks", param_hint="--token")


def _run(work: Coroutine[Any, Any, bool], report: Report) -> int:
    """Run `work`, which closes its connection properly whatever ends it, a signal too. Returns the exit status."""
    import asyncio

    from broker.client import ClientError
    from broker.client.shell import InputFailed, OutputFailed
    from broker.errors import CommandError

    ending = ShutdownSignal()
    try:
        return Status.OK if asyncio.run(ending.or_else(work)) else Status.INCOMPLETE
    except asyncio.CancelledError:
        return ending.status
    except ClientError as failure:
        return report.failure(failure)
    except CommandError as error:
        return report.command_error(error)
    except InputFailed as error:
        report.error("no_input", str(error))
        return Status.NO_INPUT
    except BrokenPipeError:
        return Status.BROKEN_PIPE
    except OutputFailed as error:
        report.error("no_output", str(error))
        return Status.NO_OUTPUT


def _is_text(argument: str) -> bool:
    """Whether an argument of the command line was UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True
