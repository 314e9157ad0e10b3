"""Charts of types: frequency against HIGH share, and what moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.classes import in_order
from afn_ray.reduce import compare
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
    VegaSpec,
    category,
    chart_spec,
    class_colours,
    quantity,
)

MAX_POINTS = 6000
"""Number of types in the scatter, the most frequent ones; a browser can animate about as many."""
MAX_SCATTER_LAYERS = 12
BY_FREQUENCY = [("n", "descending"), ("token_id", "ascending")]
"""Order of types, the most frequent first."""


def named_words(words: Mapping[int, pa.Table]) -> dict[int, pa.Table]:
    """The words of rows of ``word_vocabulary`` by layer, numbered in place of types.

    Folded words are left out. Empty if no word has a row.
    """
    found = {}
    for layer, table in words.items():
        named = table.filter(pc.is_valid(table["word"])).sort_by("word")
        at = named.schema.get_field_index("token_id")
        numbers = pa.array(np.arange(len(named), dtype=np.int32))
        found[layer] = named.combine_chunks().set_column(at, "token_id", numbers)
    return found if all(map(len, found.values())) else {}


def points(vocabulary: Mapping[int, pa.Table], kind: str = "type") -> VegaSpec:
    """Data of the scatter, in columns: the most frequent types and their HIGH counts by layer.

    ``kind`` says what they are: types, or words from ``named_words``.
    """
    layers = list(vocabulary)
    deepest = vocabulary[layers[-1]]
    if len(layers) > MAX_SCATTER_LAYERS:
        places = np.linspace(0, len(layers) - 1, MAX_SCATTER_LAYERS)
        layers = [layers[i] for i in places.round().astype(int)]
    types = deepest.sort_by(BY_FREQUENCY).slice(0, MAX_POINTS)
    n = types["n"].to_numpy()
    ids = types["token_id"].to_numpy()
    classes = in_order(types["class"].to_pylist())
    n_high: dict[str, list[int]] = {}
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
        "kind": kind,
        "num_types": len(deepest),
        "share_of_tokens": float(n.sum() / deepest["n"].to_numpy().sum()),
    }


def vocabulary_chart(words: pa.Table, kind: str = "type") -> Chart:
    """Frequency against HIGH share, a point for each type or word, as in ``points``.

    The page's script fills it from ``points`` and marks those that match a search.
    """
    title = f"Frequency against HIGH share, a point for each {kind}"
    layers = _scatter_layers(words, kind)
    params = [{"name": "query", "value": ""}]
    spec = chart_spec(title, 420, layers, data={"name": "types"}, params=params)
    frequent = compare.whole_words(words).sort_by(BY_FREQUENCY)
    cells = []
    for row in frequent.slice(0, MAX_ROWS).to_pylist():
        cells.append((cut(row["text"]), row["class"], f"{row['n']:,}", f"{row['share_high']:.3f}"))
    heads = ("word", "class", "n", "HIGH")
    table = Table("The most frequent words", heads, tuple(cells), 2)
    return Chart("vocabulary", title, spec, table)


def _scatter_layers(words: pa.Table, kind: str) -> list[VegaSpec]:
    """Layers of the scatter: points, a curve, and the types that match a search."""
    names = in_order(words["class"].to_pylist())
    most = int(words["n"].to_numpy().max())
    x_scale = {"type": "log", "domain": [0.9, max(2, most) * 1.3], "nice": False}
    x_axis = {"format": "~s", "tickCount": 6, "grid": False}
    y_scale = {"domain": [-0.02, 1.02], "nice": False}
    place = {
        "x": quantity("n", "occurrences (log)", scale=x_scale, axis=x_axis),
        "y": quantity("share", "share HIGH", scale=y_scale, axis=SHARE_AXIS),
    }
    tooltip = [
        category("text", kind),
        category("class", "class"),
        quantity("n", "n", format=","),
        quantity("share", "share HIGH", format=".3f"),
    ]
    shown = place | {"color": class_colours(names), "tooltip": tooltip}
    # The wheel alone scrolls the page.
    zoom = {"type": "interval", "zoom": "wheel![event.ctrlKey || event.metaKey]"}
    faded = {"condition": {"test": "query != ''", "value": 0.12}, "value": 0.5}
    curve = {"type": "line", "stroke": INK, "strokeWidth": 2, "strokeDash": [5, 3]}
    label = {"type": "text", "dy": -12, "fontSize": 13, "fontWeight": "bold", "fill": INK}
    return [
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


def movers_chart(movers: pa.Table, layer: int) -> Chart | None:
    """Words with the most significant changes of HIGH share, before and now; None without any."""
    here = movers.filter(pc.field("layer") == layer)
    words = compare.whole_words(compare.moved(here))
    rows = sorted(words.to_pylist(), key=lambda row: (row["q"], -abs(row["z"])))[:MAX_ROWS]
    if not rows:
        return None
    names = _distinct_names(rows)
    title = f"Words that moved most surely at layer {layer}"
    values: list[VegaSpec] = []
    cells = []
    for name, row in zip(names, rows, strict=True):
        values.append(_moved_point(name, row))
        cells.append(_moved_cells(name, row))
    spec = chart_spec(title, 24 * len(rows), _moved_layers(names), values)
    return Chart("movers", title, spec, Table(title, MOVED_HEADS, tuple(cells), 2))


def _distinct_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Texts of the words or types in ``rows``, with a number where two have the same text."""
    texts = [cut(row["text"]) for row in rows]
    num_of = Counter(texts)
    names = []
    for at, (text, row) in enumerate(zip(texts, rows, strict=True)):
        names.append(text if num_of[text] == 1 else f"{text} ({row.get('token_id', at)})")
    return names


def _moved_point(name: str, row: Mapping[str, Any]) -> VegaSpec:
    """A moved word as a row of the chart's data."""
    return {
        "type": name,
        "before": row["share_high_a"],
        "now": row["share_high_b"],
        "n_a": row["n_a"],
        "n_b": row["n_b"],
        "z": row["z"],
        "q": row["q"],
    }


MOVED_HEADS = (
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
"""Heads of the columns of ``_moved_cells``."""


def _moved_cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """A moved word as a row of the table."""
    return (
        name,
        row["class"],
        f"{row['n_a']:,}",
        f"{row['n_b']:,}",
        number(row["share_high_a"], 3),
        number(row["share_high_b"], 3),
        number(row["median_a"]),
        number(row["median_b"]),
        number(row["z"], 1),
        f"{row['q']:.2g}",
    )


def _moved_layers(names: Sequence[str]) -> list[VegaSpec]:
    """Layers of the chart of moved words: a rule between two dots for each of ``names``."""
    y = category("type", sort=list(names), axis=ROW_AXIS)
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
    layers: list[VegaSpec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {"y": y, "x": quantity("before") | x, "x2": {"field": "now"}},
        }
    ]
    for run in ("before", "now"):
        encoding = {
            "y": y,
            "x": quantity(run) | x,
            "tooltip": tooltip,
            "color": {"datum": run, "scale": colours, "legend": {"title": None}},
        }
        layers.append({"mark": DOT, "encoding": encoding})
    return layers
