"""Results of the doctor's checks: one for each, a table of all, and both printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from afn_ray import notebook
from afn_ray.text import printable

CHECKS = pa.schema(
    [("name", pa.string()), ("ok", pa.bool_()), ("found", pa.string()), ("advice", pa.string())]
)
"""Columns of ``Diagnosis.table``, the fields of ``Check``."""
MARKS = {
    True: ("ok", "bold green"),
    None: ("warning", "bold yellow"),
    False: ("FAILED", "bold red"),
}
"""Mark of a result, and its style."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check."""

    name: str
    ok: bool | None  # None: a warning, or not tried
    found: str
    advice: str = ""  # what to do; empty where nothing is wrong


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Results of all checks of an installation, in the order of their use by a run."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.ok is False)

    @property
    def table(self) -> pa.Table:
        """One row for each check; ``ok`` null: a warning, or not tried."""
        rows = [asdict(check) for check in self.checks]
        return pa.Table.from_pylist(rows, CHECKS)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table("Checks of this installation", self.table)


def render(found: Diagnosis, console: Console) -> None:
    """Print the checks as a table; each mark has a word as well as a colour."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("", "check", "found"):
        table.add_column(head, no_wrap=head != "found", overflow="fold")
    for c in found.checks:
        text = Text(printable(c.found, keep="\n"))
        if c.advice:
            text.append("\n-> " + printable(c.advice, keep="\n"), "bold")
        table.add_row(Text(*MARKS[c.ok]), Text(c.name), text)
    console.print(table)
    num_failed = len(found.failed)
    num_warned = sum(c.ok is None for c in found.checks)
    console.print(
        f"  {len(found.checks)} checks: {num_failed} failed, {num_warned} warnings"
        if num_failed or num_warned
        else "  all good"
    )
