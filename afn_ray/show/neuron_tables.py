"""Neurons on a terminal: the selective ones, those of a word, and what one responds to."""

from __future__ import annotations

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from afn_ray.analysis.concepts import LEAST_N, MOST_OCCURRENCES, Neuron
from afn_ray.analysis.neuron_questions import (
    NeuronLayer,
    NeuronUses,
    SelectiveNeurons,
    WordNeurons,
)
from afn_ray.text import printable

SHOWN_TYPES = 6
"""Largest number of types that a row names."""


def render(found: SelectiveNeurons | WordNeurons | NeuronUses, console: Console) -> None:
    """Print ``found`` below the layer that it is of."""
    console.print(_heading(found.of), markup=False)
    if isinstance(found, SelectiveNeurons):
        _render_selective(found, console)
    elif isinstance(found, WordNeurons):
        _render_word(found, console)
    else:
        _render_uses(found, console)


def _heading(of: NeuronLayer) -> str:
    """The layer, other recorded layers, and a note on HIGH-only neurons."""
    heading = f"Layer {of.layer}"
    others = [str(k) for k in of.recorded if k != of.layer]
    if others:
        heading += f" (--layer: {', '.join(others)})"
    if of.high_only:
        heading += "; neurons of HIGH tokens alone were recorded: all figures are of these"
    return heading


def _render_selective(found: SelectiveNeurons, console: Console) -> None:
    table = _headed_table("neuron", "n", "share", "mean", "largest", "bits", "answers to")
    for x in found.neurons:
        figures = (
            f"{x.n:,}",
            f"{x.share:.2%}",
            f"{x.mean:.2f}",
            f"{x.largest:.2f}",
            f"{x.selectivity:.1f}",
        )
        table.add_row(str(x.neuron), *figures, _types(x))
    console.print(table)
    _legend(
        console,
        "n: tokens that have the neuron among their neurons. bits: how far its tokens' types are "
        "from all tokens' types, which is more by chance where n is small. answers to: types that "
        f"make most of these bits. Neurons met less than {LEAST_N} times are left out.",
    )


def _render_word(found: WordNeurons, console: Console) -> None:
    limit = ", the early ones" if found.occurrences == MOST_OCCURRENCES else ""
    head = f"{printable(found.word)}: {found.occurrences:,} occurrences{limit}"
    console.print(Text(head, "bold"))
    if not found.neurons:
        console.print(
            "no neuron that was recorded of its tokens is met more often in it than elsewhere"
        )
        return
    table = _headed_table("neuron", "in the word", "elsewhere", "lift", "mean", "answers to")
    for x in found.neurons:
        table.add_row(
            str(x.neuron.neuron),
            f"{x.share:.1%}",
            f"{x.elsewhere:.2%}",
            _shown_lift(x.lift),
            f"{x.mean:.2f}",
            _types(x.neuron),
        )
    console.print(table)
    _legend(
        console,
        "in the word: share of its tokens that have the neuron among their neurons. lift: times "
        "as often as in all other tokens. mean: its value in the word.",
    )


def _shown_lift(lift: float | None) -> str:
    if lift is None:
        return "only here"
    return f"{lift:,.0f}" if lift >= 10 else f"{lift:.1f}"


def _render_uses(found: NeuronUses, console: Console) -> None:
    neuron = found.neuron
    console.print(Text(f"Layer {neuron.layer}, neuron {neuron.neuron}", "bold"))
    console.print(
        f"among the neurons of {neuron.n:,} tokens ({neuron.share:.2%}) of {neuron.n_types:,} "
        f"types; mean {neuron.mean:.2f}, largest {neuron.largest:.2f}, selectivity "
        f"{neuron.selectivity:.1f} bits"
    )
    table = _headed_table("type", "n", "lift")
    for text, n, lift in neuron.types:
        table.add_row(Text(printable(text)), f"{n:,}", f"{lift:,.1f}")
    console.print(table)
    _legend(
        console,
        "largest: with its sign, as the mean. selectivity: how far its tokens' types are from all "
        "tokens' types. Types come by their part in that, n of their tokens with the neuron, and "
        "lift: times as often as by chance. Below, tokens in which it is furthest from 0.",
    )
    lines = Table(box=None, show_header=False, pad_edge=False)
    sides: tuple[JustifyMethod, ...] = ("right", "right", "left")
    for justify in sides:
        lines.add_column(justify=justify, overflow="fold")
    for c in found.contexts:
        lines.add_row(
            f"{c.value:.2f}",
            Text(printable(c.left)),
            Text.assemble((printable(c.word), "bold underline"), f" {printable(c.right)}"),
        )
    console.print(lines)


def _headed_table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        is_text = head in ("type", "answers to")
        justify: JustifyMethod = "left" if is_text else "right"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=not is_text)
    return table


def _types(neuron: Neuron) -> Text:
    return Text(", ".join(printable(text) for text, _, _ in neuron.types[:SHOWN_TYPES]))


def _legend(console: Console, text: str) -> None:
    console.print(Text(text, "dim"))
