"""Charts of claims, each beside its controls."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from afn_ray.analysis import bootstrap, claims, claims_text
from afn_ray.show.page_tables import Table
from afn_ray.show.vega import (
    BEFORE,
    DOT,
    NOW,
    ROW_AXIS,
    Chart,
    Spec,
    category,
    chart_spec,
    colours_of,
    quantity,
)


def claims_charts(found: claims.Claims, layer: int) -> list[tuple[str, str, list[Chart]]]:
    """For each claim its question, the sentence on its controls, and one chart per quantity.

    Charts show figures of ``layer``, of layer 0 and without a layer; for the claim about layers,
    those of all layers. The tables have every layer.
    """
    return [
        (
            question,
            claims_text.against_controls(mine),
            [
                _claim_chart(claim, what, [f for f in mine if f.what == what], layer)
                for what in dict.fromkeys(f.what for f in mine)
            ],
        )
        for claim, question in claims.CLAIMS.items()
        if (mine := [f for f in found.figures if f.claim == claim])
    ]


def _claim_chart(claim: str, what: str, figures: Sequence[bootstrap.Figure], layer: int) -> Chart:
    drawn = [f for f in figures if claim == "layers" or f.layer in (None, 0, layer)]
    values = [
        {
            "row": f.of if f.layer is None else f"{f.of}, layer {f.layer}",
            "value": f.value,
            "n": f.n,
            "kind": "control" if f.is_control else "figure",
            **({} if math.isnan(f.low) else {"low": f.low, "high": f.high}),
        }
        for f in drawn
    ]
    rows = [v["row"] for v in values]
    kinds = [k for k in ("figure", "control") if any(v["kind"] == k for v in values)]
    colours = [{"figure": NOW, "control": BEFORE}[k] for k in kinds]
    shapes = [{"figure": "circle", "control": "diamond"}[k] for k in kinds]
    place = {
        "y": category("row", sort=rows, axis=ROW_AXIS),
        "color": colours_of("kind", kinds, colours) | {"legend": None},
    }
    x = quantity("value", axis={"tickCount": 5})
    tooltip = [
        category("row", "of"),
        category("kind", "is"),
        quantity("value", "value", format=".3~r"),
        quantity("low", "from", format=".3~r"),
        quantity("high", "to", format=".3~r"),
        quantity("n", "tokens", format=","),
    ]
    mark = {
        **place,
        "x": x,
        "tooltip": tooltip,
        "shape": category("kind", scale={"domain": kinds, "range": shapes}, legend=None),
    }
    layers: list[Spec] = [{"mark": DOT, "encoding": mark}]
    if any("low" in v for v in values):  # Vega warns about a field that no row has
        layers.insert(
            0,
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {**place, "x": quantity("low"), "x2": {"field": "high"}},
            },
        )
    cells = tuple(
        (
            f.of,
            "" if f.layer is None else str(f.layer),
            "control" if f.is_control else "",
            claims_text.shown(f.value),
            ""
            if math.isnan(f.low)
            else f"{claims_text.shown(f.low)} to {claims_text.shown(f.high)}",
            f"{f.n:,}",
            f"{f.n_docs:,}",
        )
        for f in figures
    )
    title = what[0].upper() + what[1:]
    heads = ("of", "layer", "", "value", "95 % interval", "tokens", "documents")
    name = "claim-" + "-".join(re.findall("[a-z0-9]+", f"{claim} {what}".lower()))
    spec = chart_spec(f"{claims.CLAIMS[claim]} {what}", 26 * len(values), layers, values)
    return Chart(name, title, spec, Table(title, heads, cells, left=3))
