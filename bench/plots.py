"""The plots of the report: small SVG files that are readable on a light and on a dark page, and the same each time they
are made from the same runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.figures import Run, figure
from bench.measure import Load, Published
from bench.peers import BROKER, PEERS
from bench.scenarios import Plot, Scenario
from bench.tables import measured_loads

# Between black and white, so that it can be read on both.
INK = "#808080"
# Inches.
WIDTH = 7.2
COLOURS = {
    "wsbroker": "#e4572e",
    "websockets": "#4c8fd6",
    "picows": "#9a6dd7",
    "socketify": "#3aa655",
    "nats": "#19a7b5",
    "nchan": "#b58900",
    "redis": "#d6589f",
    "floor-message": "#a0a0a0",
    "floor": "#808080",
}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Text stays text, and what names the parts of the file is the same in every run.
    "svg.fonttype": "none",
    "svg.hashsalt": "wsbroker",
}


def draw(scenario: Scenario, plot: Plot, runs: Sequence[Run], folder: Path) -> Path | None:
    """Draws one plot and gives its file; None if there are no runs for it."""
    loads = [load for load in measured_loads(runs) if plot.chosen(load)]
    names = [name for name in PEERS if any(run.peer == name and run.load in loads for run in runs)]
    if not loads or not names:
        return None
    with mpl.rc_context(STYLE):
        drawing = {"lines": _lines, "bars": _bars, "samples": _samples}[plot.kind](plot, runs, loads, names)
        drawing.tight_layout()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{scenario.name}-{plot.name}.svg"
        drawing.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
    # matplotlib leaves spaces at the ends of lines.
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))
    return file


def _lines(plot: Plot, runs: Sequence[Run], loads: Sequence[Load], names: Sequence[str]) -> Drawing:
    drawing, axes = _drawing(3.6)
    for name in names:
        points = [
            (plot.x(load), found.median)
            for load in loads
            if (found := figure(runs, load, name, plot.value)) is not None
        ]
        points.sort()
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=PEERS[name].title,
            color=COLOURS[name],
            marker="o",
            markersize=3.5,
            linewidth=2.4 if name == BROKER.name else 1.2,
            linestyle="--" if name.startswith("floor") else "-",
            zorder=3 if name == BROKER.name else 2,
        )
    ticks = sorted({plot.x(load) for load in loads})
    if plot.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(plot.x_axis)
    _finish(plot, axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing


def _bars(plot: Plot, runs: Sequence[Run], loads: Sequence[Load], names: Sequence[str]) -> Drawing:
    height = 0.6 + 0.24 * len(names) + 0.3
    drawing = Drawing(figsize=(WIDTH, height))
    grid = drawing.subplots(1, len(loads), sharey=True, squeeze=False)
    for axes, load in zip(grid[0], loads, strict=True):
        found = {name: figure(runs, load, name, plot.value) for name in names}
        medians = [each.median if each else 0.0 for each in found.values()]
        axes.barh(
            [PEERS[name].title for name in names],
            medians,
            xerr=[each.median * each.spread if each else 0.0 for each in found.values()],
            color=[COLOURS[name] for name in names],
            ecolor=INK,
            error_kw={"linewidth": 0.8},
            height=0.65,
        )
        axes.set_title(plot.label(load) if len(loads) > 1 else plot.title, loc="left")
        axes.set_xlabel(plot.axis)
        axes.xaxis.grid(visible=True)
        axes.set_axisbelow(True)
        if plot.logarithmic:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[0][0].invert_yaxis()  # of all: they share it
    return drawing


def _samples(plot: Plot, runs: Sequence[Run], loads: Sequence[Load], names: Sequence[str]) -> Drawing:
    drawing, axes = _drawing(3.2)
    for name in names:
        # The last run stands for all.
        run = [run for run in runs if run.peer == name and run.load in loads][-1]
        if isinstance(run.result, Published):
            axes.plot(
                [seconds for seconds, _ in run.result.samples],
                [rss / 1e6 for _, rss in run.result.samples],
                label=PEERS[name].title,
                color=COLOURS[name],
                linewidth=2.4 if name == BROKER.name else 1.2,
            )
    axes.set_yscale("log")
    axes.set_xlabel("seconds")
    _finish(plot, axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing


def _drawing(height: float) -> tuple[Drawing, Axes]:
    drawing = Drawing(figsize=(WIDTH, height))
    return drawing, drawing.subplots()


def _finish(plot: Plot, axes: Axes) -> None:
    axes.set_title(plot.title, loc="left")
    axes.set_ylabel(plot.axis)
    axes.grid(visible=True)
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float, _: object) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g}"
