"""What the bench shows on a terminal, and the plainer same where there is none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from bench.tables import Table
from bench.turns import Step

# What is longer than this is no figure.
FIGURE = 24


def console(stderr: bool = False) -> Console:
    """A console that is as wide as the terminal, or wide enough for every table where there is none."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=160)


class Remaining(ProgressColumn):
    """The time that is left: what was expected of the steps to come, corrected by how long those before really took."""

    def render(self, task: Task) -> Text:
        """As minutes and seconds."""
        left = remaining(task.completed, task.total or 0.0, task.elapsed or 0.0)
        return Text(f"{int(left) // 60}:{int(left) % 60:02} left", style="cyan")


def remaining(done: float, total: float, elapsed: float) -> float:
    """Seconds left, from the expected seconds of what is done and of everything, and from those that went by."""
    # The first step or two say little about the pace.
    pace = elapsed / done if done >= 5 else 1.0
    return max(0.0, (total - done) * pace)


class Display:
    """Follows the steps: a bar on a terminal, a line for each step elsewhere."""

    def __init__(self, console: Console, progress: Progress | None, count: int, expected: float) -> None:
        self._console = console
        self._progress = progress
        self._count = count
        self._number = 0
        self._task = progress.add_task("", total=expected) if progress else None

    def before(self, step: Step) -> None:
        """A step begins."""
        self._number += 1
        text = f"{step.scenario}: {step.peer.name}, {step.load}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        else:
            self._console.print(f"{self._number}/{self._count} {text}", soft_wrap=True)

    def after(self, step: Step) -> None:
        """The step has ended."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, step.load.expected)


@contextmanager
def following(console: Console, steps: Sequence[Step]) -> Iterator[Display]:
    """Shows the progress through these steps for as long as the context lasts."""
    expected = sum(step.load.expected for step in steps)
    if not console.is_terminal:
        yield Display(console, None, len(steps), expected)
        return
    columns = (BarColumn(24), Remaining(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        yield Display(console, progress, len(steps), expected)


def show(console: Console, table: Table) -> None:
    """Prints a table."""
    made = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, heading in enumerate(table.headings):
        # Elsewhere than on a terminal a name stays in one line, so that a program finds it.
        whole = number == 0 and not console.is_terminal
        made.add_column(heading, justify="left" if number == 0 else "right", no_wrap=whole)
    for first, *others in table.rows:
        # A figure keeps its unit beside it; headings, names and remarks may break.
        made.add_row(first, *(_unbroken(cell.replace("**", "")) for cell in others))
    console.print(made)
    console.print()


def _unbroken(cell: str) -> str:
    return cell.replace(" ", "\N{NO-BREAK SPACE}") if len(cell) <= FIGURE else cell
