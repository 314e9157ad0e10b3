"""The comparison of two layers on a terminal of 80 columns."""

from __future__ import annotations

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from afn_ray.analysis.layers import MOSTLY_HIGH, LayerComparison, Side
from afn_ray.analysis.matched_words import Overlap
from afn_ray.query.word_counts import LEAST_N
from afn_ray.reduce import compare
from afn_ray.show.figures import cut, number, percent
from afn_ray.show.terminal_tables import print_whole, titled_table
from afn_ray.text import count, printable

WORDS = 15
"""Number of words of each kind that a terminal shows."""
WORD_CHARS = 18
"""Longest word in a table, in characters."""


def render(found: LayerComparison, console: Console) -> None:
    """Print both layers, how far they agree, the classes, and the words that differ most."""
    for name, side in (("A", found.a), ("B", found.b)):
        _print(console, f"{name}: {_described(side)}", style="bold")
        _print(console, f"   {side.run.uri}", soft_wrap=True)
    console.print()
    _render_agreement(found, console)
    _render_classes(found, console)
    _render_words(found, console)
    console.print()
    _print(console, "To be careful about", style="bold")
    for note in found.notes:
        _print(console, note)


def _print(console: Console, text: str, *, style: str = "", soft_wrap: bool = False) -> None:
    console.print(Text(printable(text), style=style), soft_wrap=soft_wrap)


def _described(side: Side) -> str:
    """Description of a side, in one line."""
    depth = side.run.info["model"]["depth"]
    words = side.words
    share = percent(words.n_high / words.n)
    return f"layer {side.layer} of {depth}, {count(words.n, 'word')}, {share} HIGH"


def _render_agreement(found: LayerComparison, console: Console) -> None:
    """Print rank correlations and the overlap of HIGH, by occurrence and by word."""
    table = titled_table(
        "Agreement: rank correlation, and words that are HIGH",
        "",
        "n",
        "rho",
        "in both",
        "only A",
        "only B",
        "Jaccard",
        "chance",
    )
    if found.matched is not None:
        matched = found.matched
        table.add_row("same places", *_agreement(matched.high.n, matched.spearman, matched.high))
    mostly = found.mostly_high
    table.add_row("different words", *_agreement(mostly.n, found.spearman, mostly))
    print_whole(table, console)
    if found.matched is not None:
        _print(
            console,
            f"Matched: {found.matched.high.n:,} of {found.matched.n_a:,} words of A and "
            f"{found.matched.n_b:,} of B, in {count(found.matched.num_documents, 'document')}.",
        )
    _print(
        console,
        f"Different words: those that occur {LEAST_N} times or more in A and in B; HIGH here means "
        f"HIGH in {MOSTLY_HIGH:.0%} or more.",
    )


def _agreement(n: int, rho: float | None, overlap: Overlap) -> list[str]:
    """Cells of a row of the table of agreement."""
    sizes = (f"{size:,}" for size in (overlap.n_both, overlap.n_only_a, overlap.n_only_b))
    shares = (number(value, 3) for value in (overlap.jaccard, overlap.by_chance))
    return [f"{n:,}", number(rho, 3), *sizes, *shares]


def _render_classes(found: LayerComparison, console: Console) -> None:
    """Print each class's share of the words, its HIGH share and its rank, on both sides."""
    headings = ("words", "HIGH", "rank")
    table = titled_table(
        "Classes", "class", *(f"{heading} {side}" for heading in headings for side in "AB")
    )
    for row in found.classes.to_pylist():
        cells = [Text(cut(row["class"]))]
        cells += [Text(percent(row[f"share_{side}"])) for side in "ab"]
        cells += [Text(percent(row[f"share_high_{side}"])) for side in "ab"]
        cells += [Text(number(row[f"rank_{side}"], 2)) for side in "ab"]
        table.add_row(*cells)
    print_whole(table, console)


def _render_words(found: LayerComparison, console: Console) -> None:
    """Print the words whose HIGH share differs most, and the most frequent ones of one side."""
    moved = compare.moved(found.words)
    title = (
        f"Words: {len(moved):,} of {len(found.in_both):,} in both differ in HIGH (q < "
        f"{compare.SIGNIFICANT})"
    )
    if len(moved):
        _render_moved(title, moved.slice(0, WORDS), console)
    else:
        _print(console, title, style="bold")
    for side in "AB":
        if rows := found.of_status(f"only_{side.lower()}"):
            _print(console, _only(rows, side))


def _render_moved(title: str, moved: pa.Table, console: Console) -> None:
    table = titled_table(title, "word", "n A", "n B", "HIGH A", "HIGH B", "rank A", "rank B", "z")
    for row in moved.to_pylist():
        table.add_row(
            Text(_word(row["word"])),
            *(f"{row[f'n_{side}']:,}" for side in "ab"),
            *(percent(row[f"share_high_{side}"]) for side in "ab"),
            *(number(row[f"rank_{side}"], 2) for side in "ab"),
            f"{row['z']:+.1f}",
        )
    print_whole(table, console)


def _word(word: str) -> str:
    """A word as a cell, cut to fit the table."""
    shown = cut(word)
    return shown if len(shown) <= WORD_CHARS else shown[: WORD_CHARS - 1] + "…"


def _only(rows: pa.Table, side: str) -> str:
    """The most frequent words of one ``side``, in one line; ``rows`` are sorted."""
    other = "B" if side == "A" else "A"
    name = f"n_{side.lower()}"
    listed = (f"{_word(row['word'])} ({row[name]:,})" for row in rows.slice(0, WORDS).to_pylist())
    head = f"Only in {side}, or too rare in {other}: {count(len(rows), 'word')}"
    return f"{head}: {', '.join(listed)}"
