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
from afn_ray.show.summary import Summary, frequent_classes
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
    Spec,
    category,
    chart_spec,
    class_colours,
    colours_of,
    quantity,
)

NUM_BARS = 80
TAIL = 0.0005
"""Share of the tokens that a histogram leaves out at each end.

One sink would flatten all other bars.
"""
NUM_RARITY_BINS = 20

Floats = npt.NDArray[np.float64]


def _bars(histogram: pa.Table, layer: int, edges: Floats | None = None) -> tuple[Floats, Floats]:
    """Edges [NUM_BARS + 1] of the bars, and the share of the layer's tokens in each [NUM_BARS].

    Special tokens are left out.
    """
    here = histogram.filter((pc.field("layer") == layer) & ~pc.field("special"))
    strengths, n = (here[name].to_numpy().astype(np.float64) for name in ("strength", "n"))
    if edges is None:
        below = np.cumsum(n) / n.sum()
        low, high = (strengths[np.searchsorted(below, q)] for q in (TAIL, 1 - TAIL))
        edges = np.linspace(low, high if high > low else low + 1, NUM_BARS + 1)
    counts, _ = np.histogram(strengths, edges, weights=n)
    return edges, counts / n.sum()


def histogram_chart(
    layer: int, now: pa.Table, limits: Sequence[float], before: pa.Table | None
) -> Chart:
    """Histogram of strengths at ``layer``, coloured by quartile, with a line for the baseline.

    ``limits`` [3] are the thresholds Q1 to Q3. ``now`` and ``before`` are histogram tables;
    ``before`` is None without a baseline that has the layer.
    """
    edges, shares = _bars(now, layer)
    quartiles = 1 + np.searchsorted(limits, (edges[:-1] + edges[1:]) / 2, side="right")
    values = [
        {
            "from": round(float(a), 5),
            "to": round(float(b), 5),
            "share": round(float(s), 7),
            "quartile": int(q),
        }
        for a, b, s, q in zip(edges[:-1], edges[1:], shares, quartiles, strict=True)
    ]
    x = quantity(
        "from",
        "strength",
        scale={"zero": False, "nice": False},
        axis={"grid": False, "tickCount": 6},
    )
    y = quantity("share", axis={"format": ".1%", "tickCount": 4})
    tooltip = [
        quantity("from", "from", format=".5~g"),
        quantity("to", "to", format=".5~g"),
        quantity("share", "of the tokens", format=".2%"),
        quantity("quartile", "quartile"),
    ]
    colour = {"domain": [1, 2, 3, 4], "range": [f"var(--quartile-{i})" for i in (1, 2, 3, 4)]}
    layers: list[Spec] = [
        {
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
    ]
    if before is not None:
        _, was = _bars(before, layer, edges)
        line = [
            {"from": v["from"], "share": round(float(s), 7)}
            for v, s in zip(values, was, strict=True)
        ]
        mark = {"type": "line", "interpolate": "step-after", "stroke": BEFORE, "strokeWidth": 1.5}
        layers.append({"data": {"values": line}, "mark": mark, "encoding": {"x": x, "y": y}})
    for i, (limit, align) in enumerate(zip(limits, ("right", "center", "left"), strict=True), 1):
        data = {"values": [{"from": float(limit), "name": f"Q{i}", "exact": number(limit)}]}
        mark = {"type": "text", "align": align, "baseline": "bottom", "y": -2}
        layers += [
            {
                "data": data,
                "mark": DASHED,
                "encoding": {"x": x, "tooltip": [category("exact", f"Q{i}")]},
            },
            {"data": data, "mark": mark, "encoding": {"x": x, "text": {"field": "name"}}},
        ]
    name = f"Layer {layer}" + (" (embeddings, the control)" if layer == 0 else "")
    left_out = 1 - float(shares.sum())
    drawn = (
        "all tokens are drawn"
        if left_out < 1e-9
        else f"{left_out:.2%} of the tokens lie outside of what is drawn"
    )
    here = now.filter((pc.field("layer") == layer) & ~pc.field("special"))
    strengths, n = here["strength"].to_numpy(), here["n"].to_numpy()
    below = [float(n[strengths < limit].sum() / n.sum()) for limit in limits]
    rows = tuple(
        (f"Q{i}", number(q), percent(b))
        for i, (q, b) in enumerate(zip(limits, below, strict=True), 1)
    )
    return Chart(
        f"histogram-{layer}",
        name,
        chart_spec(f"Histogram of strengths, {name}, with its quartiles", 170, layers),
        Table(f"{name}: {drawn}", ("quartile", "strength", "of the tokens below"), rows),
    )


def share_by_rarity(words: pa.Table) -> Floats:
    """HIGH share of each type if only its rarity mattered, [types].

    Types are ordered by idf and cut into at most ``NUM_RARITY_BINS`` bins of about the same number
    of tokens; types of one idf share a bin. A type gets the HIGH share of all tokens of its bin,
    its own tokens included.
    """
    n, n_high = (words[name].to_numpy().astype(np.float64) for name in ("n", "n_high"))
    middle = midranks(words["idf"].to_numpy(), n) / n.sum()
    bins = np.minimum((middle * NUM_RARITY_BINS).astype(np.int64), NUM_RARITY_BINS - 1)
    shares: Floats = (np.bincount(bins, n_high) / np.maximum(1, np.bincount(bins, n)))[bins]
    return shares


def classes_chart(summary: Summary, words: pa.Table) -> Chart:
    """HIGH share of each class at the deepest layer, beside layer 0 and beside rarity alone.

    ``words``: rows of the vocabulary at the deepest layer, without special tokens.
    """
    main, first = summary.layers[-1], summary.layers[0]
    label = main.labels["tokens"]
    kinds = {f"layer {main.layer}": main} | (
        {"layer 0, the control": first} if first.layer == 0 != main.layer else {}
    )
    names = np.array(words["class"].to_pylist())
    n, rarity = words["n"].to_numpy(), share_by_rarity(words)
    values: list[Spec] = []
    rows = []
    drawn = [(at, main.classes[at].name, main.classes[at].n) for at in frequent_classes(main)]
    for at, name, total in drawn:
        shares = [facts.classes[at] for facts in kinds.values()]
        alone = float(n[names == name] @ rarity[names == name]) / total
        values += [
            {
                "class": name,
                "kind": kind,
                "share": c.share,
                "low": c.low,
                "high": c.high,
                "n": total,
            }
            for kind, c in zip(kinds, shares, strict=True)
        ]
        values.append({"class": name, "kind": "rarity alone", "share": alone, "n": total})
        rows.append(
            (
                name,
                f"{total:,}",
                *(f"{c.share:.3f} ({c.low:.3f}–{c.high:.3f})" for c in shares),
                f"{alone:.3f}",
            )
        )
    order = [*kinds, "rarity alone"]
    shapes = {"domain": order, "range": ["circle", "diamond", "cross"][-len(order) :]}
    place = {
        "y": category("class", sort=[name for _, name, _ in drawn], axis=ROW_AXIS),
        "yOffset": category("kind", sort=order),
        "color": colours_of("kind", order, [NOW, BEFORE, FAINT][-len(order) :]),
    }
    x = quantity(
        "share", "share of the class's tokens that is HIGH", scale=ALL_OF_IT, axis=SHARE_AXIS
    )
    tooltip = [
        category("class", "class"),
        category("kind", "by"),
        quantity("share", "share HIGH", format=".3f"),
        quantity("low", "from", format=".3f"),
        quantity("high", "to", format=".3f"),
        quantity("n", "tokens", format=","),
    ]
    layers: list[Spec] = [
        {
            "data": {"values": [{"share": label["n_high"] / label["n"]}]},
            "mark": DASHED,
            "encoding": {"x": quantity("share")},
        },
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {**place, "x": quantity("low"), "x2": {"field": "high"}},
        },
        {
            "mark": DOT,
            "encoding": {
                **place,
                "shape": category("kind", sort=order, scale=shapes),
                "x": x,
                "tooltip": tooltip,
            },
        },
    ]
    title = f"Share of each class that is HIGH at layer {main.layer}, beside its controls"
    heads = ("class", "tokens", *(f"{kind} (95 % interval)" for kind in kinds), "rarity alone")
    spec = chart_spec(title, 66 * len(drawn), layers, values)
    return Chart("classes", title, spec, Table(title, heads, tuple(rows)))


def layers_charts(summary: Summary) -> list[Chart]:
    """Charts of figures comparable across layers: HIGH shares and ratios, not strengths."""
    x = category("layer", "layer (0 = embeddings)", axis={"labelAngle": 0})
    drawn = frequent_classes(summary.layers[0])
    names = [summary.layers[0].classes[at].name for at in drawn]
    values = [
        asdict(c) | {"class": c.name}
        for facts in summary.layers
        for c in (facts.classes[at] for at in drawn)
    ]
    place = {
        "x": x,
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
    layers: list[Spec] = [
        {"mark": LINE, "encoding": place},
        {"mark": DOT, "encoding": {**place, "tooltip": tooltip}},
    ]
    rows = [
        (f"{facts.layer}", *(f"{facts.classes[at].share:.3f}" for at in drawn))
        for facts in summary.layers
    ]
    shares = Chart(
        "layers-classes",
        title,
        chart_spec(title, 260, layers, values),
        Table(title, ("layer", *names), tuple(rows)),
    )

    kinds = ("Q3 above the median", "CV (sd / mean)")
    values = [
        {"layer": facts.layer, "kind": kind, "value": value}
        for facts in summary.layers
        for kind, value in zip(kinds, (facts.q3_over_q2 - 1, facts.cv), strict=True)
    ]
    place = {
        "x": x,
        "y": quantity("value", "ratio", axis=SHARE_AXIS),
        "color": colours_of("kind", kinds, [NOW, BEFORE]),
    }
    tooltip = [
        category("kind", "ratio"),
        category("layer", "layer"),
        quantity("value", "value", format=".2%"),
    ]
    title = "How far strengths spread, by layer"
    layers = [
        {"mark": LINE, "encoding": place},
        {"mark": DOT, "encoding": {**place, "tooltip": tooltip}},
    ]
    cells = tuple(
        (str(f.layer), percent(f.q3_over_q2 - 1), number(f.cv, 3), number(f.idf_auc, 2))
        for f in summary.layers
    )
    heads = ("layer", "Q3 above the median", "CV", "AUC of rarity alone")
    return [
        shares,
        Chart(
            "layers-spread",
            title,
            chart_spec(title, 260, layers, values),
            Table(title, heads, cells),
        ),
    ]
