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
    VegaSpec,
    category,
    chart_spec,
    colours_of,
    intervals,
    quantity,
)


def claims_charts(found: claims.Claims, layer: int) -> list[tuple[str, str, list[Chart]]]:
    """Each claim's question, the sentence on its controls, and one chart per quantity.

    Charts show figures of ``layer``, of layer 0 and without a layer; for the claim about layers,
    those of all layers. The tables have every layer.
    """
    groups = []
    for claim, question in claims.CLAIMS.items():
        of_claim = [figure for figure in found.figures if figure.claim == claim]
        if not of_claim:
            continue
        drawn = []
        for what in dict.fromkeys(figure.what for figure in of_claim):
            figures = [figure for figure in of_claim if figure.what == what]
            drawn.append(_claim_chart(claim, what, figures, layer))
        groups.append((question, claims_text.against_controls(of_claim), drawn))
    return groups


COLOURS = {"figure": NOW, "control": BEFORE}
SHAPES = {"figure": "circle", "control": "diamond"}


def _claim_chart(claim: str, what: str, figures: Sequence[bootstrap.Figure], layer: int) -> Chart:
    values: list[VegaSpec] = []
    for figure in figures:
        if claim == "layers" or figure.layer in (None, 0, layer):
            values.append(_point(figure))
    present = {value["kind"] for value in values}
    kinds = [kind for kind in COLOURS if kind in present]
    colours = [COLOURS[kind] for kind in kinds]
    shapes = [SHAPES[kind] for kind in kinds]
    rows = [value["row"] for value in values]
    place = {
        "y": category("row", sort=rows, axis=ROW_AXIS),
        "color": colours_of("kind", kinds, colours) | {"legend": None},
    }
    tooltip = [
        category("row", "of"),
        category("kind", "is"),
        quantity("value", "value", format=".3~r"),
        quantity("low", "from", format=".3~r"),
        quantity("high", "to", format=".3~r"),
        quantity("n", "tokens", format=","),
    ]
    encoding = {
        **place,
        "x": quantity("value", axis={"tickCount": 5}),
        "tooltip": tooltip,
        "shape": category("kind", scale={"domain": kinds, "range": shapes}, legend=None),
    }
    layers: list[VegaSpec] = [{"mark": DOT, "encoding": encoding}]
    if any("low" in value for value in values):  # Vega warns about a field that no row has
        layers.insert(0, intervals(place))
    title = what[0].upper() + what[1:]
    spec = chart_spec(f"{claims.CLAIMS[claim]} {what}", 26 * len(values), layers, values)
    heads = ("of", "layer", "", "value", "95 % interval", "tokens", "documents")
    cells = tuple(_cells(figure) for figure in figures)
    words = re.findall("[a-z0-9]+", f"{claim} {what}".lower())
    return Chart("-".join(["claim", *words]), title, spec, Table(title, heads, cells, left=3))


def _point(figure: bootstrap.Figure) -> VegaSpec:
    """``figure`` as a row of a chart's data."""
    point: VegaSpec = {
        "row": figure.of if figure.layer is None else f"{figure.of}, layer {figure.layer}",
        "value": figure.value,
        "n": figure.n,
        "kind": "control" if figure.is_control else "figure",
    }
    if not math.isnan(figure.low):
        point |= {"low": figure.low, "high": figure.high}
    return point


def _cells(figure: bootstrap.Figure) -> tuple[str, ...]:
    """``figure`` as a row of a table."""
    interval = ""
    if not math.isnan(figure.low):
        interval = f"{claims_text.shown(figure.low)} to {claims_text.shown(figure.high)}"
    return (
        figure.of,
        "" if figure.layer is None else str(figure.layer),
        "control" if figure.is_control else "",
        claims_text.shown(figure.value),
        interval,
        f"{figure.n:,}",
        f"{figure.n_docs:,}",
    )
