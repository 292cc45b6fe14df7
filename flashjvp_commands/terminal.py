"""What is printed fits: consoles as wide as the terminal, tables of which no digit is cut, and bars. Needs rich.

A table that is wider than the console is printed in parts, each with the columns that name a row and as many others as
there is room for. A bar shows the step, the total, the rate and the time left, and below them what is being done.
"""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.progress import TextColumn as Words
from rich.table import Column, Table
from rich.text import Text

NARROWEST = 14  # of a column of words: longer ones go on in the next line
SPEED_OVER_S = 300.0  # what a bar averages over: single steps may take a minute
FRAME = 3  # of each column: a line and two spaces


def console(wide: int = 160) -> Console:
    """A console as wide as the terminal, or as COLUMNS says; else, as in a file, `wide`."""
    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else wide)


class Fitted:
    """A table that is printed in parts where it is too wide.

    Its first `names` columns name the rows and are in every part. Columns on the right side hold numbers, which stay in
    one line; all others may be folded.
    """

    def __init__(self, table: Table, names: int = 1) -> None:
        self._table, self._names = table, names

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the parts."""
        columns, room = self._table.columns, options.max_width - 1
        least, most = zip(*(_widths(console, options, column) for column in columns), strict=True)
        widest = max(least[self._names :], default=0) + FRAME
        least = (*_narrowed(least[: self._names], room - widest), *least[self._names :])
        starts = _starts(least, self._names, room)
        for first, (start, end) in enumerate(pairwise([*starts, len(columns)])):
            chosen = [*range(self._names), *range(start, end)]
            part = _part(self._table, title=first == 0, caption=end == len(columns))
            for i, width in zip(
                chosen, _widened([least[i] for i in chosen], [most[i] for i in chosen], room), strict=True
            ):
                fold = i < self._names or not _one_line(columns[i])
                _add_column(part, columns[i], width, fold=fold)
            cells = [list(columns[i].cells) for i in chosen]
            for place, row in enumerate(self._table.rows):
                part.add_row(*(column[place] for column in cells), style=row.style, end_section=row.end_section)
            yield part


def _narrowed(widths: Sequence[int], room: int) -> list[int]:
    """Widths of columns of words, the widest made narrower until they fit where they can."""
    narrow = list(widths)
    while sum(width + FRAME for width in narrow) > room and max(narrow, default=1) > 1:
        narrow[narrow.index(max(narrow))] -= 1
    return narrow


def _widened(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths of columns with what room there is left, the narrowest first."""
    widths = list(least)
    while sum(width + FRAME for width in widths) < room:
        small = [i for i, width in enumerate(widths) if width < most[i]]
        if not small:
            break
        widths[min(small, key=lambda i: widths[i])] += 1
    return widths


def _starts(widths: Sequence[int], names: int, room: int) -> list[int]:
    """The column after the names at which each part starts."""
    left = room - sum(width + FRAME for width in widths[:names])
    starts, used = [names], 0
    for place in range(names, len(widths)):
        used += widths[place] + FRAME
        if used > left and place > starts[-1]:
            starts.append(place)
            used = widths[place] + FRAME
    return starts


def _one_line(column: Column) -> bool:
    return column.no_wrap or column.justify == "right"


def _widths(console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
    """The least width of a column, that of its longest number or of a word of its texts and heading, and the best."""
    cells = [Measurement.get(console, options.update(width=10_000), cell) for cell in column.cells]
    best = max([1, *(cell.maximum for cell in cells), *map(len, str(column.header).split("\n"))])
    words = [len(word) for word in str(column.header).split()]
    if _one_line(column):
        least = max([1, *(cell.maximum for cell in cells), *words])
        return least, max(least, best)
    return min(max([1, *(cell.minimum for cell in cells), *words]), NARROWEST), best


def _part(table: Table, *, title: bool, caption: bool) -> Table:
    """A table like `table`, without its columns and rows."""
    return Table(
        title=table.title if title else None, caption=table.caption if caption else None,
        title_style=table.title_style, caption_justify=table.caption_justify, border_style=table.border_style,
        show_lines=table.show_lines, title_justify=table.title_justify,
    )  # fmt: skip


def _add_column(table: Table, like: Column, width: int, *, fold: bool) -> None:
    """Adds a column of a width: of words that may go on in the next line, or of numbers that may not."""
    lines = "\n".join(textwrap.fill(line, width) for line in str(like.header).split("\n"))
    header = like.header if fold else lines
    table.add_column(header, justify=like.justify, no_wrap=not fold, overflow="fold", width=width)


class Bar(Progress):
    """A bar of one task: `with Bar(console, "cases", 12) as bar`, then `bar.advance_by(1, "what comes next")`."""

    def __init__(self, console: Console, unit: str, total: int, *, done: int = 0, hidden: bool = False) -> None:
        """unit: what is counted. done: how many of them earlier runs did; rate and time left are those of this one."""
        self._doing = ""
        bar, left = BarColumn(bar_width=None), TimeRemainingColumn(compact=True)
        columns = (Words(unit), MofNCompleteColumn(), bar, _Rate(), left, Words("left"))
        super().__init__(*columns, console=console, expand=True, speed_estimate_period=SPEED_OVER_S, disable=hidden)
        self._only = self.add_task(unit, total=total, completed=done)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The lines of the bar."""
        yield self.make_tasks_table(self.tasks)
        if self._doing:
            yield Text(self._doing, overflow="fold")

    def doing(self, what: str) -> None:
        """Says what is being done."""
        self._doing = what
        self.refresh()

    def advance_by(self, count: int, what: str = "") -> None:
        """Counts what was done, and says what is being done next."""
        self._doing = what
        self.update(self._only, advance=count, refresh=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """How many a second, or how many seconds one takes."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.3g}/s" if speed >= 1 else f"{1 / speed:.3g} s each")
