"""The model card of the measure on a terminal; its tables fit into 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from afn_ray.show.card import Card, LayerCard
from afn_ray.show.figures import cut, number, percent
from afn_ray.show.run_facts import model_title
from afn_ray.show.summary import by_frequency
from afn_ray.show.terminal_tables import print_whole, titled_table
from afn_ray.text import count, printable

WIDTH = 80
"""Least width that the tables use, in columns."""
NAME_CHARS = 12
"""Longest name of a class as the head of a column, in characters."""


def render(card: Card, console: Console) -> None:
    """Print the sample, the figures of every layer, the HIGH share of every class, and notes."""
    console.print(_facts(card))
    print_whole(_strengths(card), console)
    if any(layer.centred is not None for layer in card.layers):
        print_whole(_distances(card), console)
    if any(layer.moment_shares is not None for layer in card.layers):
        print_whole(_moments(card), console)
    print_whole(_classes(card, max(WIDTH, console.width)), console)
    for note in _notes(card):
        console.print(printable(note), markup=False)


def _facts(card: Card) -> Table:
    table = titled_table(f"Model card of {model_title(card.model)}", "", "", left=2)
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"
    table.show_header = False
    of_model = (
        f"{card.model_type}, {count(card.depth, 'layer')}, {card.hidden_size:,} dimensions, "
        f"{card.dtype}, windows of {count(card.window_tokens, 'token')}"
    )
    sample = (
        f"{count(card.documents, 'document')} of {', '.join(card.corpus)}: "
        f"{count(card.tokens - card.special, 'token')} and {card.special:,} special ones"
    )
    for name, value in (("model", of_model), ("sample", sample), ("run", card.run)):
        table.add_row(name, Text(printable(value)))
    return table


def _strengths(card: Card) -> Table:
    columns = ("median", "CV", "max", "special", "sinks", "outliers")
    table = titled_table("Strength by layer", "layer", *columns, left=0)
    for layer in card.layers:
        table.add_row(
            str(layer.layer),
            number(layer.median),
            number(layer.cv, 3),
            number(layer.max),
            number(layer.special_max),
            f"{layer.n_sinks:,}",
            percent(layer.outlier_share),
        )
    return table


def _distances(card: Card) -> Table:
    title = "Strength without the layer's mean state (centred_mean)"
    table = titled_table(title, "layer", "median", "CV", "max", left=0)
    for layer in card.layers:
        median, cv, largest = layer.centred or (None, None, None)
        table.add_row(str(layer.layer), number(median), number(cv, 3), number(largest))
    return table


def _moments(card: Card) -> Table:
    title = "Second moment of frequent types by layer: shares of its parts"
    table = titled_table(title, "layer", "mean of all", "between types", "within types", left=0)
    for layer in card.layers:
        shares = layer.moment_shares or (None, None, None)
        table.add_row(str(layer.layer), *map(percent, shares))
    return table


def _classes(card: Card, width: int) -> Table:
    """HIGH shares: a row for each layer, a column for each class, as many as fit into ``width``."""
    first = card.layers[0]
    shown = _fitting([part.name for part in first.classes], by_frequency(first.classes), width)
    heads = [_head(first.classes[at].name) for at in shown]
    table = titled_table("Share that is HIGH, by class", "layer", *heads, left=0)
    sizes = [percent(first.classes[at].n / first.n) for at in shown]
    table.add_row("tokens", *sizes, end_section=True)
    for layer in card.layers:
        table.add_row(str(layer.layer), *(percent(layer.classes[at].share) for at in shown))
    if rarer := len(first.classes) - len(shown):
        table.caption, table.caption_justify = f"and {count(rarer, 'rarer one')}: --json", "left"
    return table


def _head(name: str) -> str:
    return cut(name)[:NAME_CHARS]


def _fitting(names: Sequence[str], by_n: Sequence[int], width: int) -> list[int]:
    """First indexes ``by_n`` of ``names`` that fit into ``width``, ascending."""
    left = width - len("tokens ")
    fitting = []
    for at in by_n:
        left -= max(len(_head(names[at])), len("100.0%")) + 2
        if left < 0:
            break
        fitting.append(at)
    return sorted(fitting)


def _notes(card: Card) -> list[str]:
    """Meaning of the columns, and the figures to compare them with."""
    lines = [
        "Tokens are without special ones, whose largest strength is 'special'. CV is the standard "
        f"deviation over the mean; a sink is over {card.sink_factor:g} medians. 'tokens' is the "
        "share of all tokens that a class has."
    ]
    if any(layer.outlier_share is not None for layer in card.layers):
        lines.append(
            "'outliers' is the share of the squared norms in "
            f"{_dimensions(card.layers)} of a layer."
        )
    else:
        lines.append("'outliers' needs a run with --signals trimmed.")
    if any(layer.moment_shares is not None for layer in card.layers):
        lines.append(
            "The second moment of the frequent types' states is the squared norm of their mean, "
            "plus the variance between the means of types, plus that within types."
        )
    else:
        lines.append("A run with --mean-vectors has the split of the second moment too.")
    if card.thresholds is not None:
        lines.append(f"HIGH is decided by the frozen thresholds, of {card.thresholds}.")
    lines.append(
        "Medians and maxima are of norms: the largest activation that a paper reports for the same "
        "token is at most its norm. Compare them at one layer of one model, on similar text."
    )
    return lines


def _dimensions(layers: Sequence[LayerCard]) -> str:
    num = max(len(layer.outlier_dimensions) for layer in layers)
    return f"the {count(num, 'largest dimension')}"
