"""The plots of the report: small SVG files that are readable on a light and on a dark page, and the same each time they
are made from the same runs.

Each can be read without the text around it: the title names the metric, the line below says under which load and which
direction is better, and a note explains the C floor where it is shown.
"""

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


FLOOR_NOTE = (
    "C floor: a C program that only forwards WebSocket frames (no topics, JSON or limits): what the kernel allows;\n"
    "“per message” sends each event by itself, “per read batch” sends all events together that arrived together."
)
SPREAD_NOTE = "Thin lines: lowest and highest value of the repetitions, around the median."


def draw(scenario: Scenario, plot: Plot, runs: Sequence[Run], folder: Path) -> Path | None:
    """Draws one plot and gives its file; None if there are no runs for it."""
    loads = [load for load in measured_loads(runs) if plot.chosen(load)]
    names = [name for name in PEERS if any(run.peer == name and run.load in loads for run in runs)]
    if not loads or not names:
        return None
    with mpl.rc_context(STYLE):
        kinds = {"lines": _lines, "bars": _bars, "pairs": _pairs, "samples": _samples}
        drawing = kinds[plot.kind](plot, runs, loads, names)
        _explain(drawing, scenario, plot, names)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{scenario.name}-{plot.name}.svg"
        drawing.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
    # matplotlib leaves spaces at the ends of lines.
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))
    return file


def _explain(drawing: Drawing, scenario: Scenario, plot: Plot, names: Sequence[str]) -> None:
    """The title, the load and the direction above the plot, the notes below it."""
    notes = [FLOOR_NOTE] if any(name.startswith("floor") for name in names) else []
    if plot.kind == "bars":
        notes.append(SPREAD_NOTE)
    if plot.logarithmic or plot.kind in ("pairs", "samples"):
        notes.append("Logarithmic scale.")
    text = "\n".join(notes)
    height = drawing.get_figheight() + 0.5 + 0.16 * (text.count("\n") + 1 if text else 0)
    drawing.set_figheight(height)
    drawing.text(
        0.01, 1 - 0.06 / height, f"{scenario.title}: {plot.metric or plot.axis}", va="top", fontsize=10.5, weight="bold"
    )
    better = "Lower is better." if scenario.less_is_better else "Higher is better."
    drawing.text(0.01, 1 - 0.28 / height, f"{plot.title}. {better}", va="top", fontsize=9)
    if text:
        drawing.text(0.01, 0.05 / height, text, va="bottom", fontsize=7.5, linespacing=1.3)
    below = 0.16 * (text.count("\n") + 1) + 0.1 if text else 0.0
    drawing.tight_layout(rect=(0, below / height, 1, 1 - 0.45 / height))


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
    else:
        axes.set_ylim(bottom=0)
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
        for row, each in enumerate(found.values()):
            if each:
                end = each.median * (1 + each.spread)
                axes.annotate(
                    _figure(each.median), (end, row), (3, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.margins(x=0.22 if len(loads) < 3 else 0.38)
        if len(loads) > 1:
            axes.set_title(plot.label(load), loc="left")
        axes.set_xlabel(plot.axis)
        axes.xaxis.grid(visible=True)
        axes.set_axisbelow(True)
        if plot.logarithmic:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[0][0].invert_yaxis()  # of all: they share it
    return drawing


def _pairs(plot: Plot, runs: Sequence[Run], loads: Sequence[Load], names: Sequence[str]) -> Drawing:
    """Two loads, one row for each server: a hollow mark for the first load, a filled one for the second."""
    drawing, axes = _drawing(0.9 + 0.32 * len(names))
    for row, name in enumerate(names):
        before, after = (figure(runs, load, name, plot.value) for load in loads[:2])
        if before is None or after is None:
            continue
        colour = COLOURS[name]
        axes.plot([before.median, after.median], [row, row], color=colour, linewidth=2, zorder=2)
        axes.plot([before.median], [row], marker="o", markersize=8, color=colour, fillstyle="none", markeredgewidth=1.5)
        axes.plot([after.median], [row], marker="o", markersize=8, color=colour, zorder=3)
        right = max(before.median, after.median)
        axes.annotate(
            f"{_figure(before.median)} → {_figure(after.median)}",
            (right, row),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), [PEERS[name].title for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.margins(x=0.18)
    axes.set_title(f"○ {plot.label(loads[0])}   ● {plot.label(loads[-1])}", loc="left")
    axes.set_xlabel(plot.axis)
    axes.xaxis.grid(visible=True)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(NullFormatter())
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
    axes.set_ylabel(plot.axis)
    axes.grid(visible=True)
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(value: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _short(value: float, _: object) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g}"
