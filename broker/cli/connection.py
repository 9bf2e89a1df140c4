"""What the commands share that connect to a broker: the checks of their options, and how they run and end."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from broker.cli.report import Report, Status


def check_connection(url: str, token: str | None, ca: Path | None) -> None:
    """Check what both `pub` and `sub` are given."""
    from wsbroker_client.stream import check_url, trust

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


def run(work: Coroutine[Any, Any, bool], report: Report) -> int:
    """Run `work`, which closes its connection properly whatever ends it, a signal too. Returns the exit status."""
    import asyncio

    from broker.cli.lines import InputFailed, OutputFailed
    from broker.errors import CommandError
    from wsbroker_client import ClientError, CommandRefused

    ending = ShutdownSignal()
    try:
        return Status.OK if asyncio.run(ending.or_else(work)) else Status.INCOMPLETE
    except asyncio.CancelledError:
        return ending.status
    except (CommandError, CommandRefused) as error:
        return report.command_error(error)
    except ClientError as failure:
        return report.failure(failure)
    except InputFailed as error:
        report.error("no_input", str(error))
        return Status.NO_INPUT
    except BrokenPipeError:
        return Status.BROKEN_PIPE
    except OutputFailed as error:
        report.error("no_output", str(error))
        return Status.NO_OUTPUT


def is_text(argument: str) -> bool:
    """Whether an argument of the command line was UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


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
