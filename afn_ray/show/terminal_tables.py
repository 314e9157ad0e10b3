"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from afn_ray.text import printable

GAP = 2
"""Width between two columns, and of the edges of a table, in characters."""


def titled_table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(
        title=Text(printable(title)), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.title_justify, table.title_style = "left", "bold"
    for at, column in enumerate(columns):
        # Text, since a name may hold brackets, which rich reads as markup
        table.add_column(Text(column), justify="left" if at < left else "right", no_wrap=True)
    return table


def print_whole(table: Table, console: Console) -> None:
    """Print ``table`` at its full width: a narrow terminal wraps lines but cuts no figure."""
    table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


def print_in_parts(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console,
    *,
    left: int = 1,
) -> None:
    """Print a table in as many parts below each other as its columns need to fit ``console``.

    Each part has the first column, which is folded where it takes over a third of the width. A
    head that occurs twice says something of the column before it, and stays there. The first
    ``left`` columns are text.
    """
    widths = [max(map(cell_len, column)) for column in zip(heads, *rows, strict=True)]
    if sum(widths) + GAP * len(widths) > console.width:
        widths[0] = min(widths[0], console.width // 3)
    for part in _parts(heads, widths, console.width):
        of_text = sum(at < left for at in part)
        table = titled_table(title if 1 in part else "", *(heads[at] for at in part), left=of_text)
        for row in rows:
            table.add_row(*(Text(printable(row[at])) for at in part))
        first = table.columns[0]
        first.no_wrap = False
        first.overflow = "fold"
        first.max_width = widths[0]
        print_whole(table, console)


def _parts(heads: Sequence[str], widths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the columns of each part, the first column in all."""
    bound: list[list[int]] = []  # columns that stay together
    for at in range(1, len(heads)):
        if bound and heads.count(heads[at]) > 1:
            bound[-1].append(at)
        else:
            bound.append([at])
    parts = [[0]]
    for together in bound:
        width = sum(GAP + widths[at] for at in [*parts[-1], *together])
        if width > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1] += together
    return parts
