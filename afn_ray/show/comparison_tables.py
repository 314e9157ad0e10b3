"""The comparison of two runs as tables on a terminal."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from afn_ray.reduce import compare
from afn_ray.reduce.groups import group_name
from afn_ray.show.figures import figure
from afn_ray.show.terminal_tables import print_in_parts, print_whole, titled_table
from afn_ray.text import count, printable

MOVERS = 15
MOVED_SOURCES = 8
"""Number of types and of sources of a comparison that a terminal shows."""


def render_comparison(found: compare.Comparison, console: Console) -> None:
    """Print both runs, the distances at every layer, and the changes at the deepest layer."""
    rows = []
    for name, run in (("A", found.a), ("B", found.b)):
        about = compare.describe(run)
        rows.append((name, f"{about['tokens']:,}", f"{about['documents']:,}", run.uri))
    heads = ("", "tokens", "documents", "run")
    print_in_parts("Compared", heads, rows, console)
    for name, run in (("A", found.a), ("B", found.b)):
        corpus = printable(", ".join(compare.describe(run)["corpus"]))
        console.print(f"corpus of {name}: {corpus}", markup=False, soft_wrap=True)
    console.print()
    whole = pc.is_null(found.drift["source"])
    _render_drift(
        "Strengths of all tokens", "layer", found.drift.filter(whole).to_pylist(), console
    )
    layer = max(found.drift["layer"].to_pylist())
    _render_class_drift(layer, found, console)
    _render_movers(layer, found, console)
    at_layer = pc.and_(pc.invert(whole), pc.equal(found.drift["layer"], layer))
    if sources := found.drift.filter(at_layer).to_pylist():
        apart = sorted(sources, key=lambda row: (_nearness(row), row["source"]))
        title = (
            f"Sources at layer {layer}: new or gone, then the furthest apart ({len(sources):,} in "
            "all)"
        )
        _render_drift(title, "source", apart[:MOVED_SOURCES], console)
    of_groups = found.groups.drift
    if groups := of_groups.filter(pc.equal(of_groups["layer"], layer)).to_pylist():
        apart = sorted(groups, key=_nearness)
        title = (
            f"Groups by {found.groups.by} at layer {layer}: new or gone, then the furthest apart "
            f"({len(groups):,} in all)"
        )
        named = [{**row, "group": group_name(row["group"])} for row in apart[:MOVED_SOURCES]]
        _render_drift(title, "group", named, console)
    notes = ["To be careful about", *map(printable, found.notes)]
    console.print(Text("\n".join(notes)), soft_wrap=True)


def _nearness(row: dict[str, Any]) -> float:
    """A number that grows as the distributions of ``row`` get closer; lowest for new or gone."""
    return -1.0 if row["ks"] is None else -float(row["ks"])


def _render_drift(title: str, first: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print ``DRIFT_SCHEMA`` rows: quartiles of B, their shift from A, HIGH shares, distances."""
    heads = (
        first,
        "tokens A",
        "tokens B",
        "Q1 B",
        "shift",
        "Q2 B",
        "shift",
        "Q3 B",
        "shift",
        "HIGH A",
        "HIGH B",
        "PSI",
        "KS",
        "JS",
    )
    cells = []
    for row in rows:
        quartiles = []
        for q in ("q1", "q2", "q3"):
            a, b = row[f"{q}_a"], row[f"{q}_b"]
            quartiles += [
                "" if b is None else figure(b),
                f"{b / a - 1:+.2%}" if a and b is not None else "",
            ]
        shares = [
            "" if row[s] is None else f"{row[s]:.1%}" for s in ("share_high_a", "share_high_b")
        ]
        distances = ["" if row[d] is None else f"{row[d]:.4f}" for d in ("psi", "ks", "js")]
        n = (f"{row['n_a']:,}", f"{row['n_b']:,}")
        cells.append((str(row[first]), *n, *quartiles, *shares, *distances))
    print_in_parts(title, heads, cells, console)


def _render_class_drift(layer: int, found: compare.Comparison, console: Console) -> None:
    """Print each class's share of the words or tokens and its HIGH share, in both runs."""
    classes = found.classes_to_read
    unit = "words" if found.kind == "word" else "tokens"
    table = titled_table(
        f"Classes at layer {layer} (HIGH: share, 95 % interval)",
        "class",
        f"{unit} A",
        f"{unit} B",
        "HIGH A",
        "HIGH B",
    )
    for row in classes.filter(pc.equal(classes["layer"], layer)).to_pylist():
        highs = (
            f"{row[f'share_high_{r}']:.3f} "
            f"({row[f'share_high_low_{r}']:.3f}-{row[f'share_high_high_{r}']:.3f})"
            for r in "ab"
        )
        table.add_row(
            Text(printable(row["class"])), f"{row['share_a']:.1%}", f"{row['share_b']:.1%}", *highs
        )
    print_whole(table, console)


def _render_movers(layer: int, found: compare.Comparison, console: Console) -> None:
    """Print the words or types that moved most surely, and the most
    frequent new and vanished ones.
    """
    movers, kind = found.movers_to_read, found.kind
    here = movers.filter(pc.equal(movers["layer"], layer))
    of_status = {s: here.filter(pc.equal(here["status"], s)) for s in ("both", "new", "vanished")}
    both = of_status["both"]
    moved = compare.moved(here)
    words = compare.whole_words(moved)
    title = (
        f"{kind.title()}s at layer {layer}: {len(moved):,} of {len(both):,} in both moved (q < "
        f"{compare.SIGNIFICANT})"
    )
    heads = (
        "word",
        "class",
        "n A",
        "n B",
        "HIGH A",
        "HIGH B",
        "z",
        "q",
        "median A",
        "median B",
    )
    cells = []
    for row in words.slice(0, MOVERS).to_pylist():
        medians = ("" if row[f"median_{r}"] is None else figure(row[f"median_{r}"]) for r in "ab")
        cells.append(
            (
                row["text"],
                row["class"],
                f"{row['n_a']:,}",
                f"{row['n_b']:,}",
                f"{row['share_high_a']:.1%}",
                f"{row['share_high_b']:.1%}",
                f"{row['z']:+.1f}",
                f"{row['q']:.1e}",
                *medians,
            )
        )
    if len(moved):
        print_in_parts(title, heads, cells, console, left=2)
        if parts := len(moved) - len(words):
            console.print(f"and {count(parts, 'part')} of words: afn compare --json")
    else:
        console.print(Text(title, style="bold"))
    for status, verb, n in (("new", "are new", "n_b"), ("vanished", "have vanished", "n_a")):
        types = of_status[status]
        words = compare.whole_words(types).slice(0, MOVERS).to_pylist()
        most = ", ".join(f"{r['text']} ({r[n]:,})" for r in words)
        line = f"{len(types):,} {kind}s {verb}"
        if most:
            line += f": {most}"
        console.print(Text(printable(line)), soft_wrap=True)
