"""Charts of types: frequency against HIGH share, and what moved."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce import compare
from afn_ray.schema import in_order
from afn_ray.show.figures import cut, number
from afn_ray.show.page_tables import MAX_ROWS, Table
from afn_ray.show.vega import (
    ALL_OF_IT,
    BEFORE,
    DOT,
    INK,
    NOW,
    ROW_AXIS,
    SHARE_AXIS,
    Chart,
    Spec,
    category,
    chart_spec,
    class_colours,
    quantity,
)

MAX_POINTS = 6000
"""Number of types in the scatter, the most frequent ones; a browser can animate about as many."""
MAX_SCATTER_LAYERS = 12


def points(vocabulary: Mapping[int, pa.Table]) -> Spec:
    """Data of the scatter, in columns: the most frequent types and their HIGH counts by layer."""
    layers = list(vocabulary)
    deepest = vocabulary[layers[-1]]
    if len(layers) > MAX_SCATTER_LAYERS:
        layers = [
            layers[i]
            for i in np.linspace(0, len(layers) - 1, MAX_SCATTER_LAYERS).round().astype(int)
        ]
    types = deepest.sort_by([("n", "descending"), ("token_id", "ascending")]).slice(0, MAX_POINTS)
    n, ids = types["n"].to_numpy(), types["token_id"].to_numpy()
    n_high, classes = {}, in_order(types["class"].to_pylist())
    for layer in layers:
        by_id = vocabulary[layer].sort_by("token_id")
        at = np.searchsorted(by_id["token_id"].to_numpy(), ids)  # every layer has the same types
        n_high[str(layer)] = by_id["n_high"].to_numpy()[at].tolist()
    return {
        "text": [cut(text) for text in types["text"].to_pylist()],
        "n": n.tolist(),
        "n_high": n_high,
        "class": [classes.index(name) for name in types["class"].to_pylist()],
        "classes": classes,
        "layers": layers,
        "layer": layers[-1],
        "num_types": len(deepest),
        "share_of_tokens": float(n.sum() / deepest["n"].to_numpy().sum()),
    }


def vocabulary_chart(words: pa.Table) -> Chart:
    """Frequency against HIGH share, a point for each type.

    The page's script fills it from ``points`` and marks the types that match a search.
    """
    names = in_order(words["class"].to_pylist())
    most = int(words["n"].to_numpy().max())
    scale = {"type": "log", "domain": [0.9, max(2, most) * 1.3], "nice": False}
    place = {
        "x": quantity(
            "n",
            "occurrences (log)",
            scale=scale,
            axis={"format": "~s", "tickCount": 6, "grid": False},
        ),
        "y": quantity(
            "share", "share HIGH", scale={"domain": [-0.02, 1.02], "nice": False}, axis=SHARE_AXIS
        ),
    }
    tooltip = [
        category("text", "type"),
        category("class", "class"),
        quantity("n", "n", format=","),
        quantity("share", "share HIGH", format=".3f"),
    ]
    shown = place | {"color": class_colours(names), "tooltip": tooltip}
    zoom = {
        "type": "interval",
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
    }  # the wheel alone scrolls the page
    faded = {"condition": {"test": "query != ''", "value": 0.12}, "value": 0.5}
    curve = {"type": "line", "stroke": INK, "strokeWidth": 2, "strokeDash": [5, 3]}
    label = {"type": "text", "dy": -12, "fontSize": 13, "fontWeight": "bold", "fill": INK}
    layers: list[Spec] = [
        {
            "params": [{"name": "zoom", "bind": "scales", "select": zoom}],
            "mark": {"type": "point", "filled": True, "size": 22},
            "encoding": shown | {"opacity": faded},
        },
        {"data": {"name": "curve"}, "mark": curve, "encoding": place},
        {
            "transform": [{"filter": "query != '' && indexof(datum.key, query) >= 0"}],
            "mark": DOT | {"stroke": INK, "strokeWidth": 1.5},
            "encoding": shown,
        },
        {
            "transform": [{"filter": "query != '' && datum.key == query"}],
            "mark": label,
            "encoding": place | {"text": {"field": "text"}},
        },
    ]
    title = "Frequency against HIGH share, a point for each type"
    spec = chart_spec(
        title, 420, layers, data={"name": "types"}, params=[{"name": "query", "value": ""}]
    )
    frequent = compare.whole_words(words).sort_by([("n", "descending"), ("token_id", "ascending")])
    rows = frequent.slice(0, MAX_ROWS).to_pylist()
    cells = tuple(
        (cut(r["text"]), r["class"], f"{r['n']:,}", f"{r['share_high']:.3f}") for r in rows
    )
    return Chart(
        "vocabulary",
        title,
        spec,
        Table("The most frequent words", ("word", "class", "n", "HIGH"), cells, 2),
    )


def movers_chart(movers: pa.Table, layer: int) -> Chart | None:
    """Words with the most significant changes of HIGH share, before and now; None without any."""
    words = compare.whole_words(compare.moved(movers.filter(pc.field("layer") == layer)))
    rows = sorted(words.to_pylist(), key=lambda r: (r["q"], -abs(r["z"])))[:MAX_ROWS]
    if not rows:
        return None
    texts = [cut(r["text"]) for r in rows]
    names = [
        t if texts.count(t) == 1 else f"{t} ({r['token_id']})"
        for t, r in zip(texts, rows, strict=True)
    ]
    values = [
        {
            "type": name,
            "before": r["share_high_a"],
            "now": r["share_high_b"],
            "n_a": r["n_a"],
            "n_b": r["n_b"],
            "z": r["z"],
            "q": r["q"],
        }
        for name, r in zip(names, rows, strict=True)
    ]
    y = category("type", sort=names, axis=ROW_AXIS)
    tooltip = [
        category("type", "type"),
        quantity("before", "HIGH before", format=".3f"),
        quantity("now", "HIGH now", format=".3f"),
        quantity("n_a", "n before", format=","),
        quantity("n_b", "n now", format=","),
        quantity("z", "z", format=".1f"),
        quantity("q", "q", format=".2g"),
    ]
    colours = {"domain": ["before", "now"], "range": [BEFORE, NOW]}
    x = {"title": "share HIGH", "scale": ALL_OF_IT, "axis": SHARE_AXIS}
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {"y": y, "x": quantity("before") | x, "x2": {"field": "now"}},
        },
        *(
            {
                "mark": DOT,
                "encoding": {
                    "y": y,
                    "x": quantity(run) | x,
                    "tooltip": tooltip,
                    "color": {"datum": run, "scale": colours, "legend": {"title": None}},
                },
            }
            for run in ("before", "now")
        ),
    ]
    title = f"Words that moved most surely at layer {layer}"
    cells = tuple(
        (
            name,
            r["class"],
            f"{r['n_a']:,}",
            f"{r['n_b']:,}",
            number(r["share_high_a"], 3),
            number(r["share_high_b"], 3),
            number(r["median_a"]),
            number(r["median_b"]),
            number(r["z"], 1),
            f"{r['q']:.2g}",
        )
        for name, r in zip(names, rows, strict=True)
    )
    heads = (
        "word",
        "class",
        "n before",
        "now",
        "HIGH before",
        "now",
        "median before",
        "now",
        "z",
        "q",
    )
    return Chart(
        "movers",
        title,
        chart_spec(title, 24 * len(rows), layers, values),
        Table(title, heads, cells, 2),
    )
