"""An explained text on a terminal, coloured by quartile."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from afn_ray.analysis.explanation import (
    Decision,
    ExplainedToken,
    Explanation,
    index_of,
    running_text,
)
from afn_ray.show.colours import LIGHT_HEAT
from afn_ray.show.explanation import (
    DECISION_HEADS,
    HEADS,
    NEURON_HEADS,
    TEXTS,
    WORD_HEADS,
    answer,
    attribution_note,
    decision_rows,
    heat_cell,
    layer_name,
    legends,
    limits_of,
    neuron_rows,
    reading_cells,
    signal_rows,
    token_name,
    word_cells,
)
from afn_ray.text import visible

TABLE_ROWS = 40
"""Largest number of rows of the terminal's table, without ``show_all``."""
TERMINAL = {
    1: "",
    2: "#10202c on #9cc3dc",
    3: "#241a00 on #f2b84b",
    4: "bold underline #ffffff on #b23a0e",
}
"""Styles of the quartiles.

The first keeps the terminal's colours; the others set their own background, so all four are legible
on dark and light. Bold and underline mark HIGH without colour.
"""


def render_terminal(
    explanation: Explanation, layer: int | None, console: Console, *, show_all: bool = False
) -> None:
    """Print the text coloured by quartile at ``layer``, then a table of its tokens.

    ``layer`` None is the deepest recorded one. The table stops after ``TABLE_ROWS`` rows unless
    ``show_all``. Raises ``ConfigError`` for a layer that was not recorded.
    """
    at = index_of(explanation.layers, layer)
    n = f"{explanation.thresholds[at].n:,}"
    head = f"{layer_name(explanation.layers[at])}, against {n} tokens of {visible(explanation.run)}"
    console.print(Text(head, "bold"), soft_wrap=True)
    running = Text(overflow="fold")
    for text, token in running_text(explanation):
        running.append(text, TERMINAL[token.readings[at].quartile or 1] if token else "")
    console.print(Padding(running, (1, 2)))
    legend = Text("  quartile ")
    for quartile, limits in limits_of(explanation.thresholds[at]).items():
        legend.append(" ").append(f" {limits} ", TERMINAL[quartile])
    console.print(legend)
    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(HEADS):
        justify: JustifyMethod = "left" if head in ("token", "quartile") else "right"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=i > 0)
    shown = explanation.tokens if show_all else explanation.tokens[:TABLE_ROWS]
    for token in shown:
        reading = token.readings[at]
        label = Text.assemble(
            (token_name(token), TERMINAL[reading.quartile or 1])
        )  # colours only its letters
        table.add_row(label, *reading_cells(reading), style="dim" if token.special else "")
    console.print(table)
    _print_words(explanation, at, console, show_all=show_all)
    _print_signals(explanation, at, console, len(shown))
    _print_sweep(explanation, console, len(shown))
    if hidden := len(explanation.tokens) - len(shown):
        console.print(Text(f"  {hidden:,} more tokens are not listed; --all lists them"))
    if explanation.decision is not None:
        _print_decision(explanation, explanation.decision, console)
    for note in legends(explanation, at):
        line = Text(visible(note), "dim")
        console.print(Padding(line, (0, 2)))


def _print_words(explanation: Explanation, at: int, console: Console, *, show_all: bool) -> None:
    rows = word_cells(explanation, at)
    shown = rows if show_all else rows[:TABLE_ROWS]
    if not shown:
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Words of several tokens at layer {explanation.layers[at]}",
        title_justify="left",
        title_style="bold",
    )
    for i, head in enumerate(WORD_HEADS):
        justify: JustifyMethod = "left" if head in ("word", "is") else "right"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=i > 0)
    for cells in shown:
        table.add_row(*map(Text, cells))
    console.print(table)
    if hidden := len(rows) - len(shown):
        console.print(Text(f"  {hidden:,} more words are not listed; --all lists them"))


def _print_signals(explanation: Explanation, at: int, console: Console, n: int) -> None:
    names, rows = signal_rows(explanation, at)
    if not names:
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Signals at layer {explanation.layers[at]}",
        title_justify="left",
        title_style="bold",
    )
    longest = _longest_name(explanation.tokens)
    table.add_column("token", overflow="fold", min_width=min(12, longest))
    for name in names:
        table.add_column(Text(name.replace("_", "_\n")), justify="right", no_wrap=True)
    for token, row in zip(explanation.tokens[:n], rows, strict=False):
        values = [Text.assemble((text, TERMINAL[quartile or 1])) for text, quartile in row]
        table.add_row(Text(token_name(token)), *values, style="dim" if token.special else "")
    console.print(table)


NAME_WIDTH = 24


def _longest_name(tokens: Sequence[ExplainedToken]) -> int:
    """The width of the longest name of ``tokens``, in columns of the terminal."""
    return max(cell_len(token_name(token)) for token in tokens)


def _print_sweep(explanation: Explanation, console: Console, n: int) -> None:
    """Print the heat map of the first ``n`` tokens, in parts that fit the console's width."""
    layers = list(explanation.sweep)
    width = min(NAME_WIDTH, _longest_name(explanation.tokens[:n]))
    if layers:
        console.print(Text("Rank of strength within each layer", "bold"))
    while layers:
        part: list[int] = []
        while layers and width + 7 * (len(part) + 1) < console.width - 2:
            part.append(layers.pop(0))
        part = part or [layers.pop(0)]
        at = [explanation.sweep.index(k) for k in part]
        widths = [5 if k in explanation.layers else 3 for k in part]
        heads = "".join(f"{k:^{w}} " for k, w in zip(part, widths, strict=True))
        console.print(Text(f"\n  {set_cell_size('layer', width)}  {heads}", "bold"), no_wrap=True)
        for token in explanation.tokens[:n]:
            line = Text(
                f"  {set_cell_size(token_name(token), width)}  ", "dim" if token.special else ""
            )
            for i, w in zip(at, widths, strict=True):
                cell = token.cells[i]
                colours = "" if cell.decile is None else "{} on {}".format(*LIGHT_HEAT[cell.decile])
                line.append(f"{heat_cell(cell):^{w}}", colours).append(" ")
            console.print(line, no_wrap=True)
    if explanation.sweep:
        console.print()


def _print_decision(explanation: Explanation, decision: Decision, console: Console) -> None:
    console.print(Text(f"Decision: {answer(decision)}", "bold"), soft_wrap=True)
    note = Text(attribution_note(explanation, decision))
    console.print(Padding(note, (0, 2)))
    for heads, rows in (
        (DECISION_HEADS, decision_rows(explanation, decision)),
        (NEURON_HEADS, neuron_rows(explanation, decision)),
    ):
        if rows:
            table = Table(box=box.SIMPLE_HEAD)
            for head in heads:
                justify: JustifyMethod = "left" if head in TEXTS else "right"
                table.add_column(head, justify=justify, overflow="fold", no_wrap=justify == "right")
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
