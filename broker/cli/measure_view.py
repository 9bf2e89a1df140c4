"""The output of `wsbroker bench`: the progress, and a table at the end.

On a terminal a bar with the rate of the moment; elsewhere a plain line a second. Both go to standard error, the table
to standard output.
"""

from __future__ import annotations

import io
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, Self

import msgspec
import orjson
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from broker.cli.measure import WARMUP, Outcome, Plan, Progress

BUSY: Final = 0.9
"""Above this share of a core the load program may be what limits the rate."""


class View(AbstractContextManager["View"]):
    """Follows one run. `quiet`: only where there is a terminal, because lines would be among errors in JSON."""

    def __init__(self, plan: Plan, quiet: bool = False) -> None:
        self._plan = plan
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._bar: Bar | None = None
        self._second = 0
        self._connected = 0.0
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[now]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("connecting", total=plan.seconds + WARMUP, now="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        if progress.phase == "connecting":
            now = f"{progress.open:,} of {self._plan.subscribers + 1:,} connections"
        else:
            now = f"{rate(progress.deliveries_per_second)} deliveries/s, p50 {duration(progress.p50_us)}, "
            now += f"p99 {duration(progress.p99_us)}"
        if self._bar is not None:
            if progress.phase == "connecting":
                self._connected = progress.seconds
            done = progress.seconds - self._connected
            self._bar.update(self._task, description=progress.phase, completed=max(0.0, done), now=now)
        elif not self._quiet and int(progress.seconds) > self._second:
            self._second = int(progress.seconds)
            self._console.print(f"{self._second:4} s  {progress.phase}: {now}", soft_wrap=True)


def table(outcome: Outcome) -> str:
    """The figures as a table, and below it what a reader has to know about them; plain where there is no terminal."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, highlight=False, width=None if terminal else 100)
    plan = outcome.plan
    load = f"{plan.rate:g} publishes/s" if plan.rate is not None else f"window {plan.window}"
    title = (
        f"{plan.subscribers:,} subscribers, {plan.topics:,} topic{'s' if plan.topics != 1 else ''}, {load}, "
        f"{plan.payload:,} bytes, {outcome.measured.seconds:.1f} s"
    )
    console.print(f"[bold]{outcome.server}[/]: {title}", soft_wrap=True)
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column()
    shown.add_column(justify="right")
    for name, value in rows(outcome):
        shown.add_row(name, value)
    console.print(shown)
    for warning in warnings(outcome):
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    return text.getvalue()


def rows(outcome: Outcome) -> list[tuple[str, str]]:
    """The names of the figures, and the figures, as they are shown."""
    measured, count = outcome.measured, outcome.plan.subscribers + 1
    latency = measured.delivery_us
    percentiles = ("p50", latency.p50), ("p90", latency.p90), ("p99", latency.p99), ("p99.9", latency.p999)
    broker = outcome.broker
    watched = f"broker ({broker.name}, process {broker.pid})" if broker.pid is not None else "broker"
    return [
        ("deliveries/s", rate(measured.deliveries_per_second)),
        ("publishes/s", rate(outcome.publishes_per_second)),
        *((f"latency {name}", duration(value)) for name, value in (*percentiles, ("max", latency.max))),
        (f"connecting {count:,}", duration(measured.connect_seconds * 1e6)),
        ("CPU of this load, of one core", f"{measured.load_cpu:.0%}"),
        (f"CPU of the {watched}", f"{measured.server_cpu:.0%}" if broker.pid is not None else "-"),
        (f"memory of the {watched}", f"{measured.server_rss / 1e6:.1f} MB" if broker.pid is not None else "-"),
    ]


def warnings(outcome: Outcome) -> list[str]:
    """What a reader of the figures has to know."""
    found = []
    measured = outcome.measured
    if measured.load_cpu > BUSY:
        found.append("The load program was busy all the time: the broker may be able to do more.")
    if measured.unsent and outcome.plan.rate is not None:
        found.append(
            f"{measured.unsent:,} publishes were not sent in time: the broker, or this load, does not keep up with "
            f"{outcome.plan.rate:g} a second. Latencies count from the time at which each was due."
        )
    if outcome.broker.why_not:
        found.append(f"CPU and memory of the broker are not known: {outcome.broker.why_not}.")
    return found


def as_line(outcome: Outcome) -> str:
    """The figures as one JSON object in a line: times in seconds, latencies in microseconds, memory in bytes."""
    plan, measured, broker = outcome.plan, outcome.measured, outcome.broker
    watched = broker.pid is not None
    found = {
        "server": outcome.server,
        "subscribers": plan.subscribers,
        "topics": plan.topics,
        "window": None if plan.rate is not None else plan.window,
        "rate": plan.rate,
        "payload": plan.payload,
        "seconds": measured.seconds,
        "deliveries_per_second": measured.deliveries_per_second,
        "publishes_per_second": round(outcome.publishes_per_second, 1),
        "unsent": measured.unsent,
        "latency_us": measured.delivery_us,
        "connect_seconds": measured.connect_seconds,
        "load_cpu": measured.load_cpu,
        "broker_pid": broker.pid,
        "broker_cpu": measured.server_cpu if watched else None,
        "broker_rss": measured.server_rss if watched else None,
        "warnings": warnings(outcome),
    }
    return orjson.dumps(found, default=msgspec.to_builtins).decode() + "\n"


def rate(value: float) -> str:
    """A rate in three digits: 216 k, 3.05 M."""
    for unit, factor in ((" M", 1e6), (" k", 1e3)):
        if value >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def duration(microseconds: float) -> str:
    """A time in the unit that fits it."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    return f"{microseconds / 1e3:.1f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} µs"
