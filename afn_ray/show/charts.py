"""Vega-Lite charts of a run's figures, each with a table of the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.stats import midranks
from afn_ray.show.figures import number, percent
from afn_ray.show.page_tables import Table
from afn_ray.show.summary import LayerFacts, RunSummary, frequent_classes
from afn_ray.show.vega import (
    ALL_OF_IT,
    BEFORE,
    DASHED,
    DOT,
    FAINT,
    LINE,
    NOW,
    ROW_AXIS,
    SHARE_AXIS,
    Chart,
    VegaSpec,
    category,
    chart_spec,
    class_colours,
    colours_of,
    intervals,
    quantity,
)

NUM_BARS = 80
TAIL = 0.0005
"""Share of the tokens that a histogram leaves out at each end.

One sink would flatten all other bars.
"""
NUM_RARITY_BINS = 20

Float64s = npt.NDArray[np.float64]


def _bars(
    histogram: pa.Table, layer: int, edges: Float64s | None = None
) -> tuple[Float64s, Float64s]:
    """Edges [NUM_BARS + 1] of the bars, and the share of the layer's tokens in each [NUM_BARS].

    Special tokens are left out.
    """
    strengths, n = _ordinary(histogram, layer)
    if edges is None:
        below = np.cumsum(n) / n.sum()
        low = strengths[np.searchsorted(below, TAIL)]
        high = strengths[np.searchsorted(below, 1 - TAIL)]
        if not high > low:
            high = low + 1
        edges = np.linspace(low, high, NUM_BARS + 1)
    counts, _ = np.histogram(strengths, edges, weights=n)
    return edges, counts / n.sum()


def _ordinary(histogram: pa.Table, layer: int) -> tuple[Float64s, Float64s]:
    """Strengths of a layer, and the number of tokens of each, without special tokens."""
    here = histogram.filter((pc.field("layer") == layer) & ~pc.field("special"))
    strengths = here["strength"].to_numpy().astype(np.float64)
    n = here["n"].to_numpy().astype(np.float64)
    return strengths, n


def histogram_chart(
    layer: int, now: pa.Table, limits: Sequence[float], before: pa.Table | None
) -> Chart:
    """Histogram of strengths at ``layer``, coloured by quartile, with a line for the baseline.

    ``limits`` [3] are the thresholds Q1 to Q3; they are none where those of a layer without normal
    tokens label. ``now`` and ``before`` are histogram tables; ``before`` is None without a baseline
    that has the layer.
    """
    edges, shares = _bars(now, layer)
    x = quantity(
        "from",
        "strength",
        scale={"zero": False, "nice": False},
        axis={"grid": False, "tickCount": 6},
    )
    y = quantity("share", axis={"format": ".1%", "tickCount": 4})
    layers = [_bars_layer(edges, shares, limits, x, y)]
    if before is not None:
        _, shares_before = _bars(before, layer, edges)
        layers.append(_line_layer(edges, shares_before, x, y))
    layers += _limit_layers(limits, x)
    name = f"Layer {layer}" + (" (embeddings, the control)" if layer == 0 else "")
    spec = chart_spec(f"Histogram of strengths, {name}, with its quartiles", 170, layers)
    left_out = 1 - float(shares.sum())
    drawn = "all tokens are drawn"
    if left_out >= 1e-9:
        drawn = f"{left_out:.2%} of the tokens lie outside of what is drawn"
    strengths, n = _ordinary(now, layer)
    cells = []
    for i, limit in enumerate(limits, 1):
        below = float(n[strengths < limit].sum() / n.sum())
        cells.append((f"Q{i}", number(limit), percent(below)))
    heads = ("quartile", "strength", "of the tokens below")
    return Chart(f"histogram-{layer}", name, spec, Table(f"{name}: {drawn}", heads, tuple(cells)))


def _bars_layer(
    edges: Float64s, shares: Float64s, limits: Sequence[float], x: VegaSpec, y: VegaSpec
) -> VegaSpec:
    """Layer of the bars, each with the colour of the quartile that its middle is in."""
    middles = (edges[:-1] + edges[1:]) / 2
    quartiles = 1 + np.searchsorted(limits, middles, side="right")
    values = []
    for i, share in enumerate(shares):
        bar = {
            "from": round(float(edges[i]), 5),
            "to": round(float(edges[i + 1]), 5),
            "share": round(float(share), 7),
            "quartile": int(quartiles[i]),
        }
        values.append(bar)
    tooltip = [
        quantity("from", "from", format=".5~g"),
        quantity("to", "to", format=".5~g"),
        quantity("share", "of the tokens", format=".2%"),
        quantity("quartile", "quartile"),
    ]
    colour = {"domain": [1, 2, 3, 4], "range": [f"var(--quartile-{i})" for i in (1, 2, 3, 4)]}
    return {
        "data": {"values": values},
        "mark": "rect",
        "encoding": {
            "x": x,
            "x2": {"field": "to"},
            "y": y,
            "y2": {"datum": 0},
            "tooltip": tooltip,
            "color": category("quartile", scale=colour, legend=None),
        },
    }


def _line_layer(edges: Float64s, shares: Float64s, x: VegaSpec, y: VegaSpec) -> VegaSpec:
    """Layer of the baseline's shares, as a line of steps."""
    values = []
    for edge, share in zip(edges[:-1], shares, strict=True):
        values.append({"from": round(float(edge), 5), "share": round(float(share), 7)})
    mark = {"type": "line", "interpolate": "step-after", "stroke": BEFORE, "strokeWidth": 1.5}
    return {"data": {"values": values}, "mark": mark, "encoding": {"x": x, "y": y}}


def _limit_layers(limits: Sequence[float], x: VegaSpec) -> list[VegaSpec]:
    """Layers of the thresholds: a dashed rule and a name for each."""
    layers: list[VegaSpec] = []
    aligned = zip(limits, ("right", "center", "left"), strict=bool(limits))
    for i, (limit, align) in enumerate(aligned, 1):
        data = {"values": [{"from": float(limit), "name": f"Q{i}", "exact": number(limit)}]}
        rule = {"x": x, "tooltip": [category("exact", f"Q{i}")]}
        layers.append({"data": data, "mark": DASHED, "encoding": rule})
        mark = {"type": "text", "align": align, "baseline": "bottom", "y": -2}
        label = {"x": x, "text": {"field": "name"}}
        layers.append({"data": data, "mark": mark, "encoding": label})
    return layers


def share_by_rarity(words: pa.Table) -> Float64s:
    """HIGH share of each type or word if only its rarity mattered, [types].

    Rows without an idf, of folded words, are the rarest. Types are ordered by idf and cut into at
    most ``NUM_RARITY_BINS`` bins of about the same number of tokens; types of one idf share a bin.
    A type gets the HIGH share of all tokens of its bin, its own tokens included.
    """
    n = words["n"].to_numpy().astype(np.float64)
    n_high = words["n_high"].to_numpy().astype(np.float64)
    idf = pc.fill_null(words["idf"], np.inf).to_numpy()
    middle = midranks(idf, n) / n.sum()
    bins = np.minimum((middle * NUM_RARITY_BINS).astype(np.int64), NUM_RARITY_BINS - 1)
    shares_of_bins = np.bincount(bins, n_high) / np.maximum(1, np.bincount(bins, n))
    shares: Float64s = shares_of_bins[bins]
    return shares


def classes_chart(summary: RunSummary, words: pa.Table) -> Chart:
    """HIGH share of each class at the deepest layer, beside layer 0 and beside rarity alone.

    ``words`` are rows of ``word_vocabulary`` at the deepest layer, or of the vocabulary without
    special tokens where the summary has no words.
    """
    main = summary.layers[-1]
    first = summary.layers[0]
    kinds = {f"layer {main.layer}": main}
    if first.layer == 0 != main.layer:
        kinds["layer 0, the control"] = first
    names = np.array(words["class"].to_pylist())
    n = words["n"].to_numpy()
    rarity = share_by_rarity(words)
    drawn = frequent_classes(main)
    values: list[VegaSpec] = []
    cells = []
    for at in drawn:
        name = main.shown_classes[at].name
        total = main.shown_classes[at].n
        row = [name, f"{total:,}"]
        for kind, facts in kinds.items():
            found = facts.shown_classes[at]
            point = {"class": name, "kind": kind, "share": found.share}
            values.append({**point, "low": found.low, "high": found.high, "n": total})
            row.append(f"{found.share:.3f} ({found.low:.3f}–{found.high:.3f})")
        is_of_class = names == name
        alone = float(n[is_of_class] @ rarity[is_of_class]) / total
        values.append({"class": name, "kind": "rarity alone", "share": alone, "n": total})
        row.append(f"{alone:.3f}")
        cells.append(tuple(row))
    title = f"Share of each class that is HIGH at layer {main.layer}, beside its controls"
    class_names = [main.shown_classes[at].name for at in drawn]
    layers = _class_layers(class_names, [*kinds, "rarity alone"], share_high(main), main.unit)
    spec = chart_spec(title, 66 * len(drawn), layers, values)
    heads = (
        "class",
        f"{main.unit}s",
        *(f"{kind} (95 % interval)" for kind in kinds),
        "rarity alone",
    )
    return Chart("classes", title, spec, Table(title, heads, tuple(cells)))


def share_high(facts: LayerFacts) -> float:
    """Share of all that ``facts.shown_classes`` count that is HIGH."""
    n = sum(share.n for share in facts.shown_classes)
    return sum(share.n_high for share in facts.shown_classes) / n


def _class_layers(
    names: list[str], kinds: list[str], share_of_all: float, unit: str
) -> list[VegaSpec]:
    """Layers of the chart of classes: the share of all, the intervals and the dots.

    ``names``: those of the classes. ``kinds``: those of the dots of each class. ``unit``: what they
    count.
    """
    shapes = {"domain": kinds, "range": ["circle", "diamond", "cross"][-len(kinds) :]}
    place = {
        "y": category("class", sort=names, axis=ROW_AXIS),
        "yOffset": category("kind", sort=kinds),
        "color": colours_of("kind", kinds, [NOW, BEFORE, FAINT][-len(kinds) :]),
    }
    x_title = f"share of the class's {unit}s that is HIGH"
    tooltip = [
        category("class", "class"),
        category("kind", "by"),
        quantity("share", "share HIGH", format=".3f"),
        quantity("low", "from", format=".3f"),
        quantity("high", "to", format=".3f"),
        quantity("n", f"{unit}s", format=","),
    ]
    dots = {
        **place,
        "shape": category("kind", sort=kinds, scale=shapes),
        "x": quantity("share", x_title, scale=ALL_OF_IT, axis=SHARE_AXIS),
        "tooltip": tooltip,
    }
    all_tokens = {
        "data": {"values": [{"share": share_of_all}]},
        "mark": DASHED,
        "encoding": {"x": quantity("share")},
    }
    return [all_tokens, intervals(place), {"mark": DOT, "encoding": dots}]


def layers_charts(summary: RunSummary) -> list[Chart]:
    """Charts of figures comparable across layers: HIGH shares and ratios, not strengths."""
    return [_classes_by_layer(summary), _spread_by_layer(summary)]


BY_LAYER = category("layer", "layer (0 = embeddings)", axis={"labelAngle": 0})
"""Horizontal encoding of charts by layer."""


def _classes_by_layer(summary: RunSummary) -> Chart:
    """HIGH share of each class by layer."""
    drawn = frequent_classes(summary.layers[0])
    names = [summary.layers[0].shown_classes[at].name for at in drawn]
    values: list[VegaSpec] = []
    rows = []
    for facts in summary.layers:
        classes = [facts.shown_classes[at] for at in drawn]
        values += [asdict(found) | {"class": found.name} for found in classes]
        shares = [f"{found.share:.3f}" for found in classes]
        rows.append((f"{facts.layer}", *shares))
    place = {
        "x": BY_LAYER,
        "y": quantity("share", "share HIGH", scale=ALL_OF_IT, axis=SHARE_AXIS),
        "color": class_colours(names),
    }
    tooltip = [
        category("class", "class"),
        category("layer", "layer"),
        quantity("share", "share HIGH", format=".3f"),
        quantity("low", "from", format=".3f"),
        quantity("high", "to", format=".3f"),
    ]
    title = "HIGH share of each class by layer"
    layers: list[VegaSpec] = [
        {"mark": LINE, "encoding": place},
        {"mark": DOT, "encoding": {**place, "tooltip": tooltip}},
    ]
    spec = chart_spec(title, 260, layers, values)
    return Chart("layers-classes", title, spec, Table(title, ("layer", *names), tuple(rows)))


def _spread_by_layer(summary: RunSummary) -> Chart:
    """Spread of the strengths, by layer."""
    kinds = ("Q3 above the median", "CV (sd / mean)")
    values: list[VegaSpec] = []
    rows = []
    for facts in summary.layers:
        above = facts.q3_over_q2 - 1
        for kind, value in zip(kinds, (above, facts.cv), strict=True):
            values.append({"layer": facts.layer, "kind": kind, "value": value})
        name = str(facts.layer)
        rows.append((name, percent(above), number(facts.cv, 3), number(facts.idf_auc, 2)))
    place = {
        "x": BY_LAYER,
        "y": quantity("value", "ratio", axis=SHARE_AXIS),
        "color": colours_of("kind", kinds, [NOW, BEFORE]),
    }
    tooltip = [
        category("kind", "ratio"),
        category("layer", "layer"),
        quantity("value", "value", format=".2%"),
    ]
    title = "How far strengths spread, by layer"
    layers: list[VegaSpec] = [
        {"mark": LINE, "encoding": place},
        {"mark": DOT, "encoding": {**place, "tooltip": tooltip}},
    ]
    spec = chart_spec(title, 260, layers, values)
    heads = ("layer", "Q3 above the median", "CV", "AUC of rarity alone")
    return Chart("layers-spread", title, spec, Table(title, heads, tuple(rows)))
