"""Claims as text and as JSON: each question, its figures, and a sentence on their controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from afn_ray.analysis.bootstrap import Figure
from afn_ray.analysis.claims import AUC, CLAIMS, RANK_CORRELATION, Claims
from afn_ray.text import count, printable

ROUNDING = 1e-12
"""Absolute value below which a figure is 0."""


def to_json(found: Claims) -> dict[str, object]:
    """The claims as plain values; missing interval bounds are null."""
    value = asdict(found)
    for figure in value["figures"]:
        for name, number in figure.items():
            if isinstance(number, float) and not math.isfinite(number):
                figure[name] = None
    return value | {"claims": CLAIMS}


def render(found: Claims, console: Console) -> None:
    """Print for each claim its question, a sentence on its controls, and its figures."""
    for claim, question in CLAIMS.items():
        figures = [f for f in found.figures if f.claim == claim]
        if not figures:
            continue
        console.print(Text(f"\n{question}", style="bold"))
        if sentence := against_controls(figures):
            console.print(Text(printable(sentence)))
        console.print(_table(figures))
    console.print()
    for note in found.notes:
        console.print(note, markup=False)


def _table(figures: Sequence[Figure]) -> Table:
    """The figures of one claim, below the quantity that they are values of."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", ratio=1)
    table.add_column("layer", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    for what in dict.fromkeys(f.what for f in figures):
        of_this = [f for f in figures if f.what == what]
        tokens = _amount([f.n for f in of_this], "token")
        documents = _amount([f.n_docs for f in of_this], "document")
        table.add_row(Text(f"{what}, of {tokens} in {documents}:"))
        for f in of_this:
            name = f"  {f.of}{' (control)' if f.is_control else ''}"
            layer = "" if f.layer is None else str(f.layer)
            interval = "" if math.isnan(f.low) else f"{shown(f.low)} to {shown(f.high)}"
            table.add_row(Text(printable(name)), layer, shown(f.value), interval)
    return table


def against_controls(figures: Sequence[Figure]) -> str:
    """Name the controls that equal or beat the main figure, in one sentence with numbers.

    ``figures`` belong to one claim. The main figure is the first one of the deepest layer. A
    control beats it when its interval is above, and equals it when the two overlap. A main figure
    below what chance gives is reversed: then one that is below it beats it. Empty where there is no
    control.
    """
    known = [f for f in figures if math.isfinite(f.value)]
    main, controls = _main_and_controls(known)
    if main is None:
        return ""
    chance = _by_chance(main.what)
    is_reversed = chance is not None and main.value < chance
    low, high = _interval(main, is_reversed)
    beat, equal = [], []
    for control in controls:
        control_low, control_high = _interval(control, is_reversed)
        if control_low > high:
            beat.append(control)
        elif control_high >= low:
            equal.append(control)
    parts = [f"{main.what[0].upper()}{main.what[1:]}: {_named([main])}."]
    if chance is not None and main.low <= chance <= main.high:
        parts.append(f"Its interval contains the {chance:g} of chance.")
    elif is_reversed:
        parts.append(f"It is reversed, below the {chance:g} of chance.")
    if beat:
        parts.append(f"Beaten by: {_named(beat)}.")
    if equal:
        parts.append(f"Equalled by: {_named(equal)}.")
    if not beat and not equal:
        most = min if is_reversed else max
        nearest = most(controls, key=lambda figure: figure.value)
        parts.append(f"No control reaches it; the nearest: {_named([nearest])}.")
    return " ".join(parts)


def _main_and_controls(figures: Sequence[Figure]) -> tuple[Figure | None, list[Figure]]:
    """The main figure that has controls, and these; AUC before other quantities."""
    layers = [f.layer for f in figures if f.layer is not None and not f.is_control]
    deepest = max(layers, default=None)
    whats = list(dict.fromkeys(f.what for f in figures))
    whats.sort(key=lambda what: what != AUC)
    for what in whats:
        of_this = [f for f in figures if f.what == what and f.layer in (None, 0, deepest)]
        mine = [f for f in of_this if not f.is_control and f.layer == deepest]
        if not mine:
            continue
        main = mine[0]
        if main.claim == "tags":
            main = max(mine, key=lambda f: f.value)
        # Controls are the same variable at layer 0, and controls that are no measure of a layer. A
        # different quantity at layer 0 is not a control of this figure.
        controls = []
        for figure in of_this:
            is_other_at_0 = figure.layer == 0 and figure.of != main.of
            if figure.is_control and not is_other_at_0:
                controls.append(figure)
        if controls:
            return main, controls
    return None, []


def _by_chance(what: str) -> float | None:
    """Value of the quantity ``what`` that separates its two directions;
    None: it has one direction.
    """
    if what == AUC:
        return 0.5
    return 0.0 if what.startswith(RANK_CORRELATION) else None


def _interval(figure: Figure, is_reversed: bool) -> tuple[float, float]:
    """The interval of ``figure``, or its value, mirrored if less is more."""
    low, high = figure.low, figure.high
    if math.isnan(low):
        low = high = figure.value
    return (-high, -low) if is_reversed else (low, high)


def _named(figures: Sequence[Figure]) -> str:
    names = []
    for f in figures:
        place = "" if f.layer is None else f", layer {f.layer}"
        names.append(f"{f.of}{place}, {shown(f.value)}")
    return "; ".join(names)


def _amount(numbers: Sequence[int], noun: str) -> str:
    least, most = min(numbers), max(numbers)
    return count(most, noun) if least == most else f"{least:,} to {count(most, noun)}"


def shown(value: float) -> str:
    """Format with three decimals, or with two significant digits where these would show 0.

    What is left of 0 by rounding shows as 0, and has no sign.
    """
    if abs(value) < ROUNDING:
        value = 0.0
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
