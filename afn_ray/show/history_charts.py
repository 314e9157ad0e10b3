"""Charts of the last nights of a series, with the broken ones marked, and
a table of their figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.show.figures import cut, number, percent
from afn_ray.show.history_table import night_name, verdict_name
from afn_ray.show.page_tables import Table
from afn_ray.show.vega import (
    BEFORE,
    FAINT,
    NOW,
    Chart,
    VegaSpec,
    category,
    chart_spec,
    colours_of,
    quantity,
)

MOST_NIGHTS = 30
"""Number of nights that a page shows, the newest."""
MOST_LABELS = 8
"""Number of nights that an axis names."""
STATES = {
    "held": (BEFORE, "circle"),
    "warned": (NOW, "triangle-up"),
    "broken": (NOW, "cross"),
    "not judged": (FAINT, "diamond"),
    "no audit": (FAINT, "circle"),
}
"""Colour and shape of a night's mark by its state."""
DRAWN = {
    "psi": ("PSI from the baseline", ".4f"),
    "n_tokens": ("tokens", ",d"),
    "q3": ("Q3", ".5~g"),
}
"""Title and format of each figure that has a chart of its own."""


def history_charts(history: pa.Table, layer: int) -> list[Chart]:
    """A chart of each of ``DRAWN`` over the nights of ``history`` at ``layer``; none of one night.

    ``history`` has rows of ``HISTORY_SCHEMA``. The first chart has the table with all figures.
    """
    is_shown = pc.and_(pc.is_null(history["group_by"]), pc.equal(history["layer"], layer))
    nights = history.filter(is_shown).to_pylist()
    if len(nights) < 2:
        return []
    return [_chart(name, nights, layer) for name in DRAWN]


def _chart(name: str, nights: Sequence[Mapping[str, Any]], layer: int) -> Chart:
    what, form = DRAWN[name]
    values: list[VegaSpec] = []
    for night, row in zip(_names(nights), nights, strict=True):
        value = {
            "night": night,
            "value": row[name],
            "state": verdict_name(row),
            "limits": cut(", ".join([*row["broken"], *row["warned"]])),
        }
        values.append(value)
    found = {value["state"] for value in values}
    states = [state for state in STATES if state in found]
    title = f"{what[0].upper()}{what[1:]} by night, layer {layer}"
    spec = chart_spec(title, 150, _layers(what, form, states, values), values)
    if name == next(iter(DRAWN)):
        return Chart(f"history-{name}", title, spec, _table(nights, layer))
    heads = ("night", "verdict", what)
    cells = []
    for night, row in zip(_names(nights), nights, strict=True):
        shown = number(row[name]) if name == "q3" else f"{row[name]:,}"
        cells.append((night, verdict_name(row), shown))
    return Chart(f"history-{name}", title, spec, Table(title, heads, tuple(cells), left=2))


def _names(nights: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each night; a partition that was measured again has its number too."""
    names: list[str] = []
    times: Counter[str] = Counter()
    for row in nights:
        name = night_name(row)
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name} ({times[name]})")
    return names


def _layers(
    what: str, form: str, states: Sequence[str], values: Sequence[VegaSpec]
) -> list[VegaSpec]:
    """Layers of a chart: a line through the nights, and a mark of its state on each."""
    step = -(-len(values) // MOST_LABELS)
    names = [value["night"] for value in values]
    axis = {"labelAngle": 0, "grid": False, "values": names[::step], "labelFlush": True}
    place = {
        "x": category("night", sort=names, axis=axis, scale={"type": "point"}),
        "y": quantity("value", what, scale={"zero": False}, axis={"format": form, "tickCount": 4}),
    }
    shapes = {"domain": list(states), "range": [STATES[state][1] for state in states]}
    marks = {
        **place,
        "color": colours_of("state", states, [STATES[state][0] for state in states]),
        "shape": category("state", sort=list(states), scale=shapes),
        "size": {"condition": {"test": "datum.state === 'broken'", "value": 150}, "value": 50},
        "tooltip": [
            category("night", "night"),
            quantity("value", what, format=form),
            category("state", "verdict"),
            category("limits", "limits"),
        ],
    }
    line = {"type": "line", "stroke": FAINT, "strokeWidth": 1}
    point = {"type": "point", "filled": True, "opacity": 1}
    return [{"mark": line, "encoding": place}, {"mark": point, "encoding": marks}]


def _table(nights: Sequence[Mapping[str, Any]], layer: int) -> Table:
    heads = (
        "night",
        "verdict",
        "limits",
        "tokens",
        "documents",
        "quarantined",
        "Q3",
        "HIGH",
        "PSI",
        "KS",
    )
    rows = []
    for night, row in zip(_names(nights), nights, strict=True):
        quarantined = row["n_quarantined"]
        figures = (
            f"{row['n_tokens']:,}",
            f"{row['n_documents']:,}",
            "–" if quarantined is None else f"{quarantined:,}",
            number(row["q3"]),
            percent(row["share_high"]),
            number(row["psi"], 4),
            number(row["ks"], 4),
        )
        broken = ", ".join([*row["broken"], *row["warned"]])
        rows.append((night, verdict_name(row), broken, *figures))
    return Table(f"The nights at layer {layer}", heads, tuple(rows), left=3)
