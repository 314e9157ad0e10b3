"""Tables on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from afn_ray.text import printable


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
